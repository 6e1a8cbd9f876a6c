"""Weights from elsewhere as the first checkpoint of a run: safetensors in the Hugging Face layout, or a DCP directory.

Streamed: a tensor is read, a bounded piece at a time, when the writer comes to it.
"""

from __future__ import annotations

import math
import posixpath
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow.fs
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ray_stateful import hf_layout
from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint
from ray_stateful.format import layout
from ray_stateful.format.chunks import Box, span_of, split
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.index import KeyPath, StoredChunk
from ray_stateful.format.layout import CheckpointName
from ray_stateful.storage import commit, opening
from ray_stateful.storage.base import Storage
from ray_stateful.storage.commit import Description
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.reader import read_requests, value_of
from ray_stateful.storage.reading import Request, read_exactly
from ray_stateful.storage.writer import DEFAULT_NUM_FILES, CheckpointWriter

# Of one piece of a tensor; as many of them are in memory as files are written at a time.
MAX_PIECE_BYTES = 256 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something to import: a tensor in pieces, or, with no dtype, a value. `read` gives a piece, or the value."""

    path: KeyPath
    dtype: str | None
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    read: Callable[[Box], Any]

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The checkpoint that was made."""

    name: str
    path: str
    num_entries: int
    num_bytes: int
    verified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What there is to import. `trees` are containers without tensors; `verified` says that bytes have checksums."""

    entries: tuple[Entry, ...]
    trees: tuple[StoredChunk, ...] = ()
    verified: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(math.prod(e.shape) * ITEM_BYTES[e.dtype] for e in self.entries if e.dtype is not None)


def find(storage: Storage, path: str, part: str = "model") -> Source:
    """What there is to import at `path`.

    Args:
        path: A safetensors file, a directory of them, or a directory that DCP wrote, or this package.
        part: The name under which weights without one are put.

    Raises:
        DamagedCheckpoint: there is nothing of these kinds; or it can't be read.
    """
    if path.endswith(hf_layout.SUFFIX):
        directory, name = posixpath.split(path)
        return _of_safetensors(storage, directory, [name], part)
    sizes = _sizes(storage, path)
    indexes = sorted(name for name in sizes if name.endswith(hf_layout.INDEX_SUFFIX))
    if len(indexes) > 1:
        raise DamagedCheckpoint(path, f"has {len(indexes)} indexes of safetensors; name one file or another directory")
    if indexes:
        where = posixpath.join(path, indexes[0])
        if sizes[indexes[0]] > hf_layout.MAX_HEADER_BYTES:
            raise HostileCheckpoint(where, f"an index of {sizes[indexes[0]]:,} bytes")
        files = hf_layout.weight_map(storage.read(where), where)
        found = _of_safetensors(storage, path, sorted(set(files.values())), part)
        # A file of another model, or of another version of it, has its place and none of its tensors.
        missing = sorted(files.keys() - {str(entry.path[1]) for entry in found.entries})
        if missing:
            raise DamagedCheckpoint(
                where, f"names {len(missing)} tensors that are in no file, {missing[0]!r} among them"
            )
        return found
    names = sorted(name for name in sizes if name.endswith(hf_layout.SUFFIX))
    if names:
        return _of_safetensors(storage, path, names, part)
    if layout.DCP_METADATA not in sizes and layout.MANIFEST not in sizes:
        raise DamagedCheckpoint(path, "nothing to import: neither safetensors nor a DCP checkpoint is there")
    opened = opening.parse(opening.fetch(storage, path))
    return _of_checkpoint(storage, opened, part)


def import_checkpoint(
    source: Source,
    run_storage: Storage,
    run_path: str,
    *,
    step: int = 0,
    progress: Progress | None = None,
) -> Imported:
    """Write `source` as a committed checkpoint of the run at `run_path`, which has none yet.

    Raises:
        FileExistsError: the run has checkpoints: resuming from this one instead would lose them.
    """
    present = [name for name in run_storage.directories(run_path) if layout.parse_name(name) is not None]
    if present:
        raise FileExistsError(f"{run_path} has checkpoints already, {present[-1]} among them; import into a new run")
    attempt = secrets.token_hex(3)
    name = str(CheckpointName(step, attempt))
    path = posixpath.join(run_path, name)
    parts = {str(e.path[0]) for e in source.entries} | {str(row.path[0]) for row in source.trees}
    description = Description(world_size=1, step=step, attempt=attempt, parts=tuple(sorted(parts)))
    writer = CheckpointWriter(path, run_storage, num_files=DEFAULT_NUM_FILES, description=description)
    writer.set_up_storage_writer(True, rank=0)
    plan, metadata = _plan(source.entries)
    results = writer.write_data(plan, _Planner(source.entries, progress)).wait()
    writer.finish(metadata, [[*results, *map(commit.tree_result, source.trees)]])
    return Imported(
        name=name,
        path=path,
        num_entries=len(source.entries),
        num_bytes=sum(result.size_in_bytes for result in results),
        verified=source.verified,
    )


class _Planner(DefaultSavePlanner):
    """Gives the writer each piece when it comes to it."""

    def __init__(self, found: Sequence[Entry], progress: Progress | None) -> None:
        super().__init__()
        self._entries = {entry.key: entry for entry in found}
        self._progress = progress
        self.mappings: Any = {entry.key: entry.path for entry in found}

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._entries[index.fqn].read(Box((), ()))

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        tensor: torch.Tensor = self._entries[write_item.index.fqn].read(Box(tuple(chunk.offsets), tuple(chunk.sizes)))
        if self._progress is not None:
            self._progress(tensor.numel() * tensor.element_size())
        return tensor


def _plan(found: Sequence[Entry]) -> tuple[SavePlan, Metadata]:
    items: list[WriteItem] = []
    metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for entry in found:
        if entry.dtype is None:
            items.append(WriteItem(index=MetadataIndex(entry.key), type=WriteItemType.BYTE_IO))
            metadata[entry.key] = BytesStorageMetadata()
            continue
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in entry.boxes]
        size = torch.Size(entry.shape)
        items += [
            WriteItem(
                index=MetadataIndex(entry.key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
            )
            for chunk in chunks
        ]
        metadata[entry.key] = TensorStorageMetadata(properties, size, chunks)
    return SavePlan(items), Metadata(metadata, planner_data={entry.key: entry.path for entry in found})


def _of_safetensors(storage: Storage, directory: str, names: list[str], part: str) -> Source:
    sizes = _sizes(storage, directory)
    found: dict[str, Entry] = {}
    for name in names:
        where = posixpath.join(directory, name)
        if name not in sizes:
            raise DamagedCheckpoint(where, "the file is missing")
        length = hf_layout.header_bytes(storage.read(where, 0, 8), sizes[name], where)
        for weight in hf_layout.parse_header(storage.read(where, 8, length), sizes[name], where):
            if weight.name in found:
                raise DamagedCheckpoint(where, f"{weight.name!r} is in another file as well")
            found[weight.name] = Entry(
                path=(part, weight.name),
                dtype=weight.dtype,
                shape=weight.shape,
                boxes=_pieces(weight),
                read=_reader(storage, directory, name, weight),
            )
    return Source(entries=tuple(found.values()))


def _sizes(storage: Storage, path: str) -> dict[str, int]:
    """The files of a directory; also weights behind links, which is how the cache of Hugging Face keeps them."""
    sizes = dict(storage.sizes(path))
    filesystem = getattr(getattr(storage, "inner", storage), "filesystem", None)
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        with suppress(NotADirectoryError):
            for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)):
                if info.is_file and info.base_name.endswith((hf_layout.SUFFIX, hf_layout.INDEX_SUFFIX)):
                    sizes.setdefault(info.base_name, info.size)
    return sizes


def _pieces(weight: hf_layout.Weight) -> tuple[Box, ...]:
    whole = Box((0,) * len(weight.shape), weight.shape)
    if whole.num_elements == 0:
        return (whole,)
    return tuple(split(whole, weight.shape, max(1, MAX_PIECE_BYTES // ITEM_BYTES[weight.dtype]), 0))


def _reader(storage: Storage, directory: str, name: str, weight: hf_layout.Weight) -> Callable[[Box], torch.Tensor]:
    dtype, item_bytes = getattr(torch, weight.dtype), ITEM_BYTES[weight.dtype]

    def read(box: Box) -> torch.Tensor:
        if box.num_elements == 0:
            return torch.empty(box.sizes, dtype=dtype)
        # A piece is one run of the tensor's elements.
        first, stop = span_of(box, weight.shape)
        begin = weight.offset + first * item_bytes
        data = bytearray(read_exactly(storage, directory, name, begin, weight.offset + stop * item_bytes))
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(box.sizes)

    return read


def _of_checkpoint(storage: Storage, opened: OpenCheckpoint, part: str) -> Source:
    # `dcp.save(model.state_dict())` has no parts, and what has some has more than one step on every path.
    flat = any(len(row.path) < 2 for row in opened.first_rows())

    def entry(key: str) -> Entry:
        chunks = opened.chunks[key]
        by_box = {chunk.box: chunk for chunk in chunks}

        def read(box: Box) -> Any:
            chunk = by_box[box]
            if chunk.dtype is None:
                return value_of(storage, opened.path, chunk)
            tensor = torch.empty(box.sizes, dtype=getattr(torch, chunk.dtype))
            read_requests(storage, opened.path, {"": [Request(chunk, box.relative_to(box), tensor)]}, None)
            return tensor

        return Entry(
            path=(part, *chunks[0].path) if flat else chunks[0].path,
            dtype=chunks[0].dtype,
            shape=chunks[0].shape,
            boxes=tuple(by_box),
            read=read,
        )

    return Source(
        entries=tuple(entry(key) for key in sorted(opened.chunks)),
        trees=tuple(opened.trees.values()),
        verified=opened.manifest is not None,
    )
