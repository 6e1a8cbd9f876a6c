"""Checkpoints that stock `dcp.save` wrote: no manifest, no checksums, values as pickles.

Their items are zip archives of `torch.save`. If an item holds a plain tensor, its first bytes say where the tensor's
bytes begin, and only the wanted ranges are read. Any other item is read whole and opened with `weights_only=True`,
which builds tensors and plain containers and runs nothing.
"""

from __future__ import annotations

import io
import math
import posixpath
import re
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint
from ray_stateful.format.chunks import Box
from ray_stateful.format.dtypes import ITEM_BYTES, dtype_name
from ray_stateful.format.index import MAX_REPEATED_BYTES
from ray_stateful.format.layout import is_item_file
from ray_stateful.format.rows import MAX_DIMS, MAX_PATH_LENGTH, MAX_POSITION, KeyPath, StoredChunk
from ray_stateful.format.stock_item import HEAD_BYTES, data_position
from ray_stateful.storage.base import Storage
from ray_stateful.storage.dcp_metadata import StorageInfo, is_index
from ray_stateful.storage.pickle_folds import MAX_DEPTH, MAX_UNFOLDED, folding_problem
from ray_stateful.storage.ranges import ReadLimits, joined
from ray_stateful.storage.reading import ReadStatistics, Request, in_threads, read_exactly

# torch.save adds some 2 KiB to the bytes of one tensor; some writers save a view with its whole storage.
MAX_ENVELOPE_BYTES = 1 << 20
MAX_VALUE_BYTES = 1 << 30
# Characters and bytes of the texts that a value has more than once.
MAX_SHARED_BYTES = 64 << 20

# As a rule an item is one chunk; an old writer that did not leave replicas out has several chunks for one item.
_FREE_CHUNKS, _CHUNKS_OF_A_ROW = 1 << 18, 16

_OF_ANY_SIZE = (torch.Tensor, dict, list, tuple, set, frozenset, str, bytes, bytearray)
_MEMBER_HEADER_BYTES = 30
_END_OF_DIRECTORY, _END_BYTES = b"PK\x05\x06", 22
_END_64, _END_64_BYTES = b"PK\x06\x06", 56
_END_64_LOCATOR, _END_64_LOCATOR_BYTES = b"PK\x06\x07", 20
_MEMBER = re.compile(
    r"[^/]+/(data\.pkl|data/[0-9]+|version|byteorder|\.data/serialization_id|\.format_version|\.storage_alignment)"
)


def rows(metadata: Metadata, where: str, sizes: Mapping[str, int]) -> list[StoredChunk]:
    """The rows that an index of a foreign checkpoint would have, each checked; they have no checksums.

    Raises:
        DamagedCheckpoint: a file is missing, or cut short.
        HostileCheckpoint: the metadata names files outside of the checkpoint, or tensors no file could hold.
    """
    stored = metadata.storage_data
    if type(stored) is not dict:
        raise HostileCheckpoint(where, "says nothing of where its items are")
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    found: list[StoredChunk] = []
    entries: dict[str, _Entry] = {}
    num_chunks, most_chunks = 0, _FREE_CHUNKS + _CHUNKS_OF_A_ROW * len(stored)
    for item, info in stored.items():
        try:
            if not is_index(item) or type(info) is not StorageInfo:
                raise TypeError("it is not the place of a chunk")
            # Once for each entry, not for each of its chunks: the time would grow with the square of their number.
            if item.fqn not in entries:
                described = metadata.state_dict_metadata[item.fqn]
                # Counted, as the pickle may use one list as the chunks of every entry.
                num_chunks += len(getattr(described, "chunks", ()))
                if num_chunks > most_chunks:
                    raise ValueError(f"more than {most_chunks:,} chunks for {len(stored):,} items")
                entries[item.fqn] = _entry(item.fqn, described, paths.get(item.fqn))
            found.append(_row(entries[item.fqn], item, info))
        # The types are DCP's, but their fields may hold anything.
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise HostileCheckpoint(where, f"an entry can't be read: {type(error).__name__}: {error}") from error
        _refuse_incomplete(found[-1], posixpath.dirname(where), sizes)
        problem = _problem(found[-1], sizes)
        if problem is not None:
            raise HostileCheckpoint(where, f"{found[-1].key!r}: {problem}")
    values, room = sum(row.item_length for row in found if row.dtype is None), MAX_REPEATED_BYTES + sum(sizes.values())
    if values > room:
        # Each value is read by itself, even if many of them point to the same item.
        raise HostileCheckpoint(where, f"has values of {values:,} bytes in files of {room - MAX_REPEATED_BYTES:,}")
    missing = metadata.state_dict_metadata.keys() - {row.key for row in found}
    if missing:
        raise HostileCheckpoint(where, f"{len(missing)} entries have no stored item, for example {min(missing)!r}")
    return found


def locate(
    storage: Storage, path: str, chunks: Iterable[StoredChunk], limits: ReadLimits
) -> tuple[dict[StoredChunk, StoredChunk], ReadStatistics]:
    """The chunks of which single ranges can be read, each with the place of its bytes; and what finding them cost.

    An item's head, its first bytes, says where its tensor's bytes begin. Heads that lie close together are read
    together.

    Raises:
        DamagedCheckpoint: an item is cut short.
    """
    heads = {(c.file, c.item_offset, c.item_offset + min(HEAD_BYTES, c.item_length)): c for c in chunks}
    groups = joined(sorted(heads), lambda head: head, limits)

    def find(
        group: tuple[str, int, int, list[tuple[str, int, int]]],
    ) -> list[tuple[StoredChunk, StoredChunk | None]]:
        file, first, last, members = group
        data = read_exactly(storage, path, file, first, last)
        return [(heads[m], _placed(heads[m], data[m[1] - first : m[2] - first])) for m in members]

    found = [pair for pairs in in_threads([partial(find, group) for group in groups], limits) for pair in pairs]
    read = sum(last - first for _, first, last, _ in groups)
    places = {chunk: placed for chunk, placed in found if placed is not None}
    return places, ReadStatistics(bytes_read=read, num_requests=len(groups))


def _placed(chunk: StoredChunk, head: bytes) -> StoredChunk | None:
    position = data_position(head, chunk.dtype or "", chunk.box.sizes)
    if position is None or position + chunk.num_bytes > chunk.item_length:
        return None
    # There are no checksums, so a block is one element: a read need not be widened beyond its range.
    item_bytes = ITEM_BYTES[chunk.dtype or ""]
    return replace(chunk, data_offset=chunk.item_offset + position, block_bytes=item_bytes)


def read(storage: Storage, path: str, requests: Sequence[Request]) -> ReadStatistics:
    """Fill tensors from foreign items that hold more than a plain tensor; each item is read whole.

    Raises:
        DamagedCheckpoint: an item is cut short.
        HostileCheckpoint: an item is not the tensor that the metadata describes.
    """
    statistics = ReadStatistics()
    for request in requests:
        chunk = request.chunk
        tensor = load_item(storage, path, chunk)
        for dim, (offset, size) in enumerate(zip(request.box.offsets, request.box.sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        request.into.detach().copy_(tensor)
        statistics += ReadStatistics(chunk.item_length, request.num_bytes, 1)
    return statistics


def load_item(storage: Storage, path: str, chunk: StoredChunk) -> Any:
    """One foreign item, opened with `weights_only=True`.

    Raises:
        DamagedCheckpoint: it is cut short.
        HostileCheckpoint: it is not what torch.save makes, or not the tensor that the metadata describes.
    """
    data = read_exactly(storage, path, chunk.file, chunk.item_offset, chunk.item_offset + chunk.item_length)
    where = posixpath.join(path, chunk.file)
    problem = _archive_problem(data)
    if problem is not None:
        raise HostileCheckpoint(where, f"{chunk.key!r} is not what torch.save makes: {problem}")
    try:
        item = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # torch.load wraps whatever its unpickler met; the cause is chained.
    except Exception as error:
        # Only the line that says what it met: the rest of the message recommends loading with `weights_only=False`.
        lines = [line.strip() for line in str(error).splitlines() if "WeightsUnpickler" in line]
        met = lines[0] if lines else type(error).__name__
        raise HostileCheckpoint(where, f"{chunk.key!r} can't be opened without running its code: {met}") from error
    if chunk.dtype is not None and not _is_plain(item, chunk):
        raise HostileCheckpoint(where, f"{chunk.key!r} is not a {chunk.dtype} tensor of {chunk.box.sizes}")
    problem = _value_problem(item, len(data) if chunk.dtype is None else max(len(data), chunk.num_bytes))
    if problem is not None:
        raise HostileCheckpoint(where, f"{chunk.key!r} {problem}")
    return item


def _value_problem(value: Any, num_bytes: int) -> str | None:
    """Why a value read from `num_bytes` bytes must not be walked, copied, printed or written; `None` if it may be.

    A list that holds one list twice, which again holds one list twice, and so on, is small, and so is a tensor whose
    one element stands for a billion; a copy of either is not.
    """
    objects, texts = MAX_UNFOLDED + num_bytes, MAX_SHARED_BYTES + 8 * num_bytes
    elements = MAX_ENVELOPE_BYTES + 2 * num_bytes
    pending: list[tuple[Any, int]] = [(value, 0)] if isinstance(value, _OF_ANY_SIZE) else []
    tensors: set[int] = set()
    while pending:
        one, depth = pending.pop()
        # Of an OrderedDict or a tensor.
        attributes = getattr(one, "__dict__", {})
        hidden = next((name for name in attributes if type(name) is not str or hasattr(type(one), name)), None)
        if hidden is not None:
            return f"has a {type(one).__name__} with an attribute {str(hidden)[:80]!a} that hides its own"
        if isinstance(one, torch.Tensor):
            if one.layout is torch.strided and not one.is_meta and id(one) not in tensors:
                elements -= one.numel() * one.element_size()
            tensors.add(id(one))
            children: list[Any] = []
        elif isinstance(one, dict):
            children = [child for pair in one.items() for child in pair]
        elif isinstance(one, list | tuple | set | frozenset):
            children = list(one)
        else:
            texts -= len(one)
            children = []
        children += attributes.values()
        objects -= len(children)
        if objects < 0 or texts < 0 or elements < 0:
            return f"is {num_bytes:,} bytes, and far larger once it is copied"
        if depth > MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} deep"
        pending += [(child, depth + 1) for child in children if isinstance(child, _OF_ANY_SIZE)]
    return None


def _is_plain(tensor: Any, chunk: StoredChunk) -> bool:
    """Whether `tensor` is the chunk: dense, on the CPU, and of its shape and dtype, as copying would cast silently."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and dtype_name(tensor.dtype) == chunk.dtype
        and tuple(tensor.shape) == chunk.box.sizes
    )


def _archive_problem(data: bytes) -> str | None:
    """How a zip archive differs from those of torch.save: readers may find different pickles in it, or one may swell.

    `None` if it does not.
    """
    try:
        problem = _directory_problem(data)
        if problem is not None:
            return problem
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            problem = _names_problem(members) or _members_problem(members, len(data))
            if problem is not None:
                return problem
            pickles = [archive.read(member) for member in members if member.orig_filename.endswith("/data.pkl")]
            storages = {member.orig_filename.partition("/data/")[2]: member.file_size for member in members}
    # A damaged or hostile archive can fail in any way: it asks for a password, or has an offset before the file.
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a reason
        return f"{type(error).__name__}: {error}"
    return next(filter(None, (folding_problem(one, storages) for one in pickles)), None)


def _directory_problem(data: bytes) -> str | None:
    """What is wrong if the archive's directory is not at its end, where every reader finds the same one."""
    end = len(data) - _END_BYTES
    if end < 0 or data.rfind(_END_OF_DIRECTORY) != end:
        return "it does not end with its directory"
    size, begin = struct.unpack_from("<2I", data, end + 12)
    locator = end - _END_64_LOCATOR_BYTES
    if data.startswith(_END_64_LOCATOR, max(locator, 0)):
        (place,) = struct.unpack_from("<Q", data, locator + 8)
        end = locator - _END_64_BYTES
        if place != end or not data.startswith(_END_64, max(end, 0)):
            return "its directory is not where it is said to be"
        size, begin = struct.unpack_from("<2Q", data, end + 40)
    return None if begin + size == end else "its directory is not where it is said to be"


def _names_problem(members: list[zipfile.ZipInfo]) -> str | None:
    """What is wrong if the members' names are not those that torch.save gives.

    torch's reader ignores case, and takes the first of two members with the same name; zipfile distinguishes case, and
    takes the last. zipfile also ends `filename` at a NUL byte; `orig_filename` is the name as stored.
    """
    names = [member.orig_filename for member in members]
    strange = next((name for name in names if _MEMBER.fullmatch(name) is None), None)
    if strange is not None:
        return f"it has a member {strange[:80]!a}"
    if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        return "it has a member twice, or members of several directories"
    return None


def _members_problem(members: list[zipfile.ZipInfo], num_bytes: int) -> str | None:
    for member, following in zip(members, [*members[1:], None], strict=True):
        end = num_bytes if following is None else following.header_offset
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            return f"{member.filename!r} is compressed"
        if member.header_offset + _MEMBER_HEADER_BYTES + member.file_size > end:
            return f"{member.filename!r} does not lie where it is said to"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What the metadata says about all chunks of a key. `boxes` are sorted by offsets."""

    path: KeyPath
    dtype: str | None = None
    shape: tuple[int, ...] = ()
    boxes: Sequence[Box] = ()

    def box_at(self, offsets: tuple[int, ...]) -> Box:
        """The box at `offsets`. Not looked up in a dict: offsets with equal hashes are easily made."""
        at = bisect_right(self.boxes, offsets, key=lambda box: box.offsets)
        if at == 0 or self.boxes[at - 1].offsets != offsets:
            raise LookupError("a chunk that the entry does not have")
        return self.boxes[at - 1]


def _entry(key: str, described: Any, path: Any) -> _Entry:
    steps = _path(key, path)
    if isinstance(described, BytesStorageMetadata):
        return _Entry(path=steps)
    if not isinstance(described, TensorStorageMetadata):
        raise TypeError(f"{key!r} is neither a tensor nor bytes")
    shape, dtype = _ints(described.size), described.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{key!r} has a {type(dtype).__name__} for a dtype")
    if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) * 16 > 2**62:
        raise ValueError(f"shape {shape} of {key!r} is absurd")
    boxes = [Box(_ints(chunk.offsets), _ints(chunk.sizes)) for chunk in described.chunks]
    if not all(_is_place(box.offsets, shape) for box in boxes):
        raise ValueError(f"a chunk of {key!r} is outside of its shape {shape}")
    boxes.sort(key=lambda box: box.offsets)
    return _Entry(path=steps, dtype=dtype_name(dtype), shape=shape, boxes=boxes)


def _row(entry: _Entry, item: Any, info: Any) -> StoredChunk:
    if info.transform_descriptors:
        raise TypeError(f"{item.fqn!r} is stored transformed, which is not supported")
    offsets = _ints(item.offset) if item.offset is not None else (0,) * len(entry.shape)
    return StoredChunk(
        key=item.fqn,
        path=entry.path,
        dtype=entry.dtype,
        shape=entry.shape,
        box=Box((), ()) if entry.dtype is None else entry.box_at(offsets),
        file=info.relative_path,
        item_offset=info.offset,
        item_length=info.length,
        data_offset=-1,
        block_bytes=0,
        checksums=b"",
    )


def _is_place(offsets: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(offsets) == len(shape) and all(0 <= o <= size for o, size in zip(offsets, shape, strict=True))


def _ints(numbers: Any) -> tuple[int, ...]:
    """A shape, or the offsets of a chunk in one; checked before anything hashes, compares or prints it."""
    if type(numbers) not in (torch.Size, list, tuple) or len(numbers) > MAX_DIMS:
        raise TypeError(f"a {type(numbers).__name__} is no short list of numbers")
    if any(type(number) is not int for number in numbers):
        raise TypeError("a shape is of numbers")
    return tuple(numbers)


def _path(key: str, path: Any) -> KeyPath:
    """The path that DCP's planner stored; the key itself if there is none, or if it does not spell the key."""
    steps = path if isinstance(path, tuple | list) else ()
    # A path takes memory that grows with the square of its length, and stack depth. It is checked before it is copied:
    # the pickle may use one path for every entry.
    if len(steps) > MAX_PATH_LENGTH or any(type(s) is int and not 0 <= s < MAX_POSITION for s in steps):
        raise ValueError(f"the path of {key[:80]!r} has {len(steps)} steps, or a position out of bounds")
    if not steps or any(type(step) not in (str, int) for step in steps):
        return (key,)
    if sum(len(step) for step in steps if type(step) is str) > len(key) or ".".join(map(str, steps)) != key:
        return (key,)
    return tuple(steps)


def _refuse_incomplete(row: StoredChunk, path: str, sizes: Mapping[str, int]) -> None:
    """Refuse a missing or truncated item file as damaged, not as hostile: as a rule, nobody meant harm."""
    if type(row.file) is not str or not is_item_file(row.file):
        return
    if row.file not in sizes:
        raise DamagedCheckpoint(posixpath.join(path, row.file), "is missing; the metadata has items in it")
    if type(row.item_offset) is not int or type(row.item_length) is not int or row.item_offset < 0:
        return
    end = row.item_offset + row.item_length
    if end > sizes[row.file]:
        found = f"is cut short: {sizes[row.file]:,} bytes are there; the metadata has items up to {end:,}"
        raise DamagedCheckpoint(posixpath.join(path, row.file), found)


def _problem(row: StoredChunk, sizes: Mapping[str, int]) -> str | None:
    if type(row.key) is not str or type(row.file) is not str:
        return "its name or file is not a string"
    if row.file not in sizes:
        return f"file {row.file!r} is not in the checkpoint's directory"
    if type(row.item_offset) is not int or type(row.item_length) is not int:
        return "offset and length are not integers"
    if row.item_offset < 0 or row.item_length < 0 or row.item_offset + row.item_length > sizes[row.file]:
        return f"bytes {row.item_offset}+{row.item_length} are not within {row.file!r}"
    if row.dtype is None:
        return None if row.item_length <= MAX_VALUE_BYTES else f"a value of {row.item_length:,} bytes"
    if row.dtype not in ITEM_BYTES:
        return f"unknown dtype {row.dtype!r}"
    numbers = (*row.shape, *row.box.offsets, *row.box.sizes)
    if len(row.shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in numbers):
        return f"shape {row.shape} or chunk {row.box} is absurd"
    num_bytes = math.prod(row.box.sizes) * ITEM_BYTES[row.dtype]
    if row.item_length > 2 * num_bytes + MAX_ENVELOPE_BYTES:
        return f"{row.item_length:,} bytes for a chunk of sizes {row.box.sizes}"
    if num_bytes > row.item_length:
        return f"{row.item_length} bytes can't hold a chunk of sizes {row.box.sizes}"
    return None
