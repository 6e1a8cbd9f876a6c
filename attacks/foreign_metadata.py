"""Plain DCP directories whose metadata runs nothing, and asks for what it must not get."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from attacks.archives import saved
from attacks.corpus import Workshop, attack
from attacks.hashes import MODULUS, offsets_of_one_hash
from attacks.pickles import assemble, items_are, metadata_is, text
from ray_stateful.format import layout


def change(workshop: Workshop, function: Callable[[Any], object]) -> None:
    """Change the metadata's objects, and write it as DCP does."""
    path = workshop.directory / layout.DCP_METADATA
    metadata = pickle.loads(path.read_bytes())
    function(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place(metadata: Any, key: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def add_tensor(metadata: Any, key: str, shape: torch.Size, chunks: list[dcp.ChunkStorageMetadata]) -> None:
    """Another tensor, whose first chunk is stored, without bytes."""
    properties = dcp.TensorProperties(dtype=torch.uint8)
    metadata.state_dict_metadata[key] = dcp.TensorStorageMetadata(properties, shape, chunks)
    metadata.storage_data[dcp.MetadataIndex(key, chunks[0].offsets)] = empty(metadata)


def add_value(metadata: Any, key: str, path: Any) -> None:
    """Another value, stored without bytes."""
    metadata.state_dict_metadata[key] = dcp.BytesStorageMetadata()
    metadata.storage_data[dcp.MetadataIndex(key)] = empty(metadata)
    metadata.planner_data[key] = path


def empty(metadata: Any) -> Any:
    """A place of no bytes in a file that is there."""
    file = next(info.relative_path for info in metadata.storage_data.values())
    return _StorageInfo(file, 0, 0)


@attack(foreign=True)
def item_file_above_the_directory(workshop):
    """An item's file is `../secret`, which is there."""
    (workshop.directory.parent / "secret").write_bytes(os.urandom(100_000))
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "relative_path", "../secret"))


@attack(foreign=True)
def item_file_of_the_machine(workshop):
    """An item's file is an absolute path."""
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "relative_path", "/etc/passwd"))


@attack(foreign=True)
def item_file_with_backslashes(workshop):
    """An item's file leads upwards where backslashes separate."""
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "relative_path", "..\\secret"))


@attack(foreign=True)
def item_file_with_a_nul(workshop):
    """An item's file has a NUL byte, at which C ends a name."""
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "relative_path", "__0_0.distcp\0"))


@attack(foreign=True)
def item_before_the_file(workshop):
    """An item begins at a negative offset."""
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "offset", -1))


@attack(foreign=True)
def item_of_a_terabyte(workshop):
    """An item is longer than its file, by far."""
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "length", 1 << 40))


@attack(foreign=True)
def item_with_an_overflowing_end(workshop):
    """Offset and length add up to a small number in 64 bits."""
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "offset", (1 << 64) - 1))


@attack(foreign=True)
def item_transformed(workshop):
    """An item is said to be compressed, by a transformation that its reader would have to load."""
    change(workshop, lambda m: setattr(place(m, "thing.weights"), "transform_descriptors", ["zstd"]))


@attack(foreign=True)
def tensor_of_an_exabyte(workshop):
    """A tensor's shape takes more memory than there is on Earth; its chunk is small."""

    def grow(metadata):
        metadata.state_dict_metadata["thing.weights"].size = torch.Size([1 << 40, 1 << 20])

    change(workshop, grow)


@attack(foreign=True)
def tensor_not_covered(workshop):
    """The chunks leave a part of the tensor as it was: half of a model would not be loaded, without a word."""

    def shrink(metadata):
        metadata.state_dict_metadata["thing.weights"].size = torch.Size([80, 30])

    change(workshop, shrink)


@attack(foreign=True, late=True)
def tensor_of_another_dtype(workshop):
    """The metadata says int64 where the item is float32: copying would cast, to values nobody trained."""

    def cast(metadata):
        metadata.state_dict_metadata["thing.layers.0"].properties.dtype = torch.float16

    change(workshop, cast)


@attack(foreign=True)
def two_tensors_in_one_place(workshop):
    """Two tensors are the same bytes of a file; with many of them a small file fills any memory."""

    def alias(metadata):
        info = place(metadata, "thing.weights")
        other = next(index for index in metadata.storage_data if index.fqn == "thing.other")
        metadata.storage_data[other] = _StorageInfo(info.relative_path, info.offset, info.length)

    change(workshop, alias)


@attack(foreign=True)
def entry_stored_nowhere(workshop):
    """An entry has a shape and no bytes."""

    def add(metadata):
        metadata.state_dict_metadata["thing.more"] = dcp.BytesStorageMetadata()

    change(workshop, add)


@attack(foreign=True)
def shape_of_floats(workshop):
    """A shape of numbers that are no ints, NaN among them, which no comparison refuses."""

    def confuse(metadata):
        metadata.state_dict_metadata["thing.weights"].size = [40.0, float("nan")]

    change(workshop, confuse)


@attack(foreign=True)
def list_with_a_far_position(workshop):
    """An entry is at position a billion of a list, which a reader would fill up to there."""

    def move(metadata):
        metadata.planner_data["thing.layers.0"] = ("thing", "layers", 1_000_000_000)
        entry = metadata.state_dict_metadata.pop("thing.layers.0")
        metadata.state_dict_metadata["thing.layers.1000000000"] = entry
        index = next(index for index in metadata.storage_data if index.fqn == "thing.layers.0")
        info = metadata.storage_data.pop(index)
        metadata.storage_data[dcp.MetadataIndex("thing.layers.1000000000", index.offset)] = info
        metadata.planner_data["thing.layers.1000000000"] = ("thing", "layers", 1_000_000_000)

    change(workshop, move)


@attack(foreign=True)
def memo_of_gigabytes(workshop):
    """Ten bytes that have pickle's reader in C make room for four billion remembered objects (LONG_BINPUT)."""
    metadata_is(workshop, assemble(pickle.NONE, pickle.LONG_BINPUT + b"\xf0\xff\xff\xff"))


@attack(foreign=True)
def bytes_of_an_exabyte(workshop):
    """A length of 2**60 in front of a byte string, which a reader may make room for at once (BINBYTES8)."""
    metadata_is(workshop, assemble(pickle.BINBYTES8 + (1 << 60).to_bytes(8, "little")))


@attack(foreign=True)
def text_longer_than_the_file(workshop):
    """The same with a text (BINUNICODE)."""
    metadata_is(workshop, assemble(pickle.BINUNICODE + b"\xff\xff\xff\x7f"))


@attack(foreign=True)
def key_whose_hash_never_ends(workshop):
    """A tuple of two tuples of two tuples, 60 levels deep, as a dict key: 300 bytes, 2**60 hashes."""
    doubled = b"".join((pickle.MEMOIZE, pickle.BINGET + bytes([n]), pickle.TUPLE2) for n in range(0))
    value = text("x") + pickle.MEMOIZE
    for level in range(60):
        value += pickle.BINGET + bytes([level]) + pickle.TUPLE2 + pickle.MEMOIZE
    metadata_is(workshop, assemble(doubled, pickle.EMPTY_DICT, value, pickle.NONE, pickle.SETITEM))


@attack(foreign=True)
def name_whose_text_never_ends(workshop):
    """The same tuple where a place in a file is expected, for an error message that prints it."""

    def confuse(metadata):
        value: Any = "x"
        for _ in range(60):
            value = (value, value)
        metadata.storage_data[next(iter(metadata.storage_data))] = value

    change(workshop, confuse)


@attack(foreign=True)
def nesting_without_end(workshop):
    """A hundred thousand lists, each in the next: whoever walks them by recursion dies of it."""
    depth = 100_000
    metadata_is(workshop, assemble(pickle.EMPTY_LIST * depth, pickle.APPEND * (depth - 1)))


@attack(foreign=True)
def metadata_is_empty(workshop):
    """No bytes at all."""
    metadata_is(workshop, b"")


@attack(foreign=True)
def metadata_is_a_terabyte(workshop):
    """A metadata file that takes no room on the disk and all of the memory: one hole."""
    with open(workshop.directory / layout.DCP_METADATA, "wb") as file:
        file.truncate(1 << 40)


@attack(foreign=True)
def path_that_doubles_itself(workshop):
    """A file's path joined of two paths that were joined of two, 40 levels deep: a terabyte of text."""
    name = text("pathlib") + text("PosixPath") + pickle.STACK_GLOBAL + pickle.BINPUT + b"\0"
    value = text("a") + pickle.BINPUT + b"\1"
    for level in range(40):
        part = pickle.BINGET + bytes([level + 1])
        value += (
            pickle.BINGET + b"\0" + part + part + pickle.TUPLE2 + pickle.REDUCE + pickle.BINPUT + bytes([level + 2])
        )
    metadata_is(workshop, assemble(name, value))


@attack(foreign=True)
def sizes_without_end(workshop):
    """A torch.Size of 100,000 dims, and a hundred thousand more of the same numbers."""
    name = text("torch") + text("Size") + pickle.STACK_GLOBAL + pickle.BINPUT + b"\0"
    numbers = pickle.MARK + (pickle.BININT1 + b"\1") * 100_000 + pickle.TUPLE + pickle.TUPLE1 + pickle.BINPUT + b"\1"
    sizes = (pickle.BINGET + b"\0" + pickle.BINGET + b"\1" + pickle.REDUCE) * 100_000
    metadata_is(workshop, assemble(name, numbers, pickle.EMPTY_LIST, pickle.MARK, sizes, pickle.APPENDS))


@attack(foreign=True)
def places_of_one_hash(workshop):
    """Forty thousand places of one tensor whose offsets have one hash: a dict compares each with each."""

    keys = []
    for number in range(1 << 15):
        # A number and the same plus 2**61 - 1 have one hash, and so have tuples of them.
        offset = torch.Size([MODULUS * (number >> bit & 1) for bit in range(15)])
        # Each by itself, without the first and last instruction: a dict of them takes as long to make here.
        keys.append(pickle.dumps(dcp.MetadataIndex("thing.weights", offset), protocol=2)[2:-1] + pickle.NONE)
    metadata_is(workshop, assemble(pickle.EMPTY_DICT, pickle.MARK, *keys, pickle.SETITEMS))


@attack(foreign=True)
def chunks_of_one_hash(workshop):
    """The same among the chunks of an entry."""

    def crowd(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["thing.weights"]
        for number in range(1 << 15):
            offset = torch.Size([MODULUS * (number >> bit & 1) for bit in range(15)])
            entry.chunks.append(dcp.ChunkStorageMetadata(offset, torch.Size([1] * 15)))

    change(workshop, crowd)


@attack(foreign=True)
def chunks_without_elements_of_one_hash(workshop):
    """The same within the tensor's shape: thirty thousand chunks without elements."""

    def crowd(metadata: Any) -> None:
        empty = torch.Size((0,) * 23)
        chunks = [dcp.ChunkStorageMetadata(torch.Size(o), empty) for o in offsets_of_one_hash(30_000, 23)]
        add_tensor(metadata, "thing.empty", torch.Size((*(1,) * 22, 1 << 57)), chunks)

    change(workshop, crowd)


@attack(foreign=True)
def chunks_of_one_list(workshop):
    """A hundred thousand chunks in a list, which stands for those of each of a thousand tensors."""

    def repeat(metadata: Any) -> None:
        chunks = [dcp.ChunkStorageMetadata(torch.Size([0]), torch.Size([0]))] * 100_000
        for number in range(1000):
            add_tensor(metadata, f"thing.tensor_{number}", torch.Size([1]), chunks)

    change(workshop, repeat)


@attack(foreign=True)
def path_of_all(workshop):
    """A path of half a million steps, which stands for that of each of two thousand values."""

    def repeat(metadata: Any) -> None:
        steps = ["x"] * 500_000
        for number in range(2000):
            add_value(metadata, f"thing.value_{number}", steps)

    change(workshop, repeat)


@attack(foreign=True)
def positions_of_one_hash(workshop):
    """Forty thousand positions of a list that are multiples of 2**61 - 1."""

    def move(metadata: Any) -> None:
        for number in range(40_000):
            add_value(metadata, f"thing.list.{number * MODULUS}", ("thing", "list", number * MODULUS))

    change(workshop, move)


@attack(foreign=True)
def values_in_one_place(workshop):
    """A thousand values are the same two megabytes of a file; each is read and opened by itself."""
    items_are(workshop, saved("x" * (2 << 20)))

    def repeat(metadata: Any) -> None:
        info, entry = place(metadata, "thing.name"), metadata.state_dict_metadata["thing.name"]
        for number in range(1000):
            metadata.state_dict_metadata[f"thing.name_{number}"] = entry
            metadata.storage_data[dcp.MetadataIndex(f"thing.name_{number}")] = info
            metadata.planner_data[f"thing.name_{number}"] = ("thing", f"name_{number}")

    change(workshop, repeat)


@attack(foreign=True)
def path_of_a_hundred_thousand_steps(workshop):
    """A path so long that all its beginnings together take 40 GB."""
    key = "thing." + ".".join("a" * 100_000)

    def lengthen(metadata: Any) -> None:
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata["thing.name"]
        metadata.storage_data[dcp.MetadataIndex(key)] = place(metadata, "thing.name")
        metadata.planner_data[key] = tuple(key.split("."))

    change(workshop, lengthen)


@attack(foreign=True)
def position_before_the_first(workshop):
    """Positions -1 and 1 of a list: as many as the largest says."""

    def move(metadata: Any) -> None:
        for number in (-1, 1):
            key = f"thing.list.{number}"
            metadata.state_dict_metadata[key] = metadata.state_dict_metadata["thing.name"]
            metadata.storage_data[dcp.MetadataIndex(key)] = place(metadata, "thing.name")
            metadata.planner_data[key] = ("thing", "list", number)

    change(workshop, move)


@attack(foreign=True)
def name_that_commands_the_terminal(workshop):
    """A module's name clears the screen when the message that refuses it is printed."""
    metadata_is(workshop, assemble(text("\x1b[2Jos"), text("system"), pickle.STACK_GLOBAL))


@attack(foreign=True)
def metadata_of_empty_lists(workshop):
    """Twelve million empty lists in twelve megabytes of metadata."""
    metadata_is(workshop, assemble(pickle.EMPTY_LIST, pickle.MARK, pickle.EMPTY_LIST * 12_000_000, pickle.APPENDS))


@attack(foreign=True)
def path_that_is_joined_again_and_again(workshop):
    """One path of four thousand letters, joined three hundred thousand times: each is a text of its own."""
    name = text("pathlib") + text("PosixPath") + pickle.STACK_GLOBAL + pickle.BINPUT + b"\0"
    parts = text("x" * 4000) + text("y") + pickle.TUPLE2 + pickle.BINPUT + b"\1"
    paths = (pickle.BINGET + b"\0" + pickle.BINGET + b"\1" + pickle.REDUCE) * 300_000
    metadata_is(workshop, assemble(name, parts, pickle.EMPTY_LIST, pickle.MARK, paths, pickle.APPENDS))


@attack(foreign=True)
def metadata_of_marks(workshop):
    """Nine million marks, each of which begins a list of what comes after it."""
    metadata_is(workshop, assemble(pickle.MARK * 9_000_000))


@attack(foreign=True)
def metadata_remembered_without_end(workshop):
    """One object, put into the pickle's memory eight million times, each time under a new number."""
    metadata_is(workshop, assemble(pickle.NONE + pickle.MEMOIZE * 8_000_000))
