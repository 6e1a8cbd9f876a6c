"""Weights from elsewhere as the first checkpoint of a run: safetensors in the Hugging Face layout, or a DCP directory.

Streamed: a tensor is read, a bounded piece at a time, when the writer comes to it.
"""

from __future__ import annotations

import math
import posixpath
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

from ray_stateful.format.chunks import Box, split
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.layout import CheckpointName
from ray_stateful.format.manifest import Manifest
from ray_stateful.format.rows import KeyPath, StoredChunk
from ray_stateful.parts import check_name
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import commit, weights
from ray_stateful.storage.base import Storage
from ray_stateful.storage.commit import Description
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.planner import refuse_name
from ray_stateful.storage.reader import read_requests, value_of
from ray_stateful.storage.reading import Request
from ray_stateful.storage.writer import DEFAULT_NUM_FILES, CheckpointWriter

# Limit of one piece of a tensor. For each file that is being written, one piece is in memory.
MAX_PIECE_BYTES = 256 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something to import: a tensor in pieces, or, with no dtype, a value. `read` returns a piece, or the value."""

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
    """What there is to import. `trees` are containers without tensors; `verified` says that bytes have checksums.

    `step`, `samples` and `world_size` come from a checkpoint of this package: its parts count on from there, and its
    rank parts have one entry for each of the ranks that wrote it.
    """

    entries: tuple[Entry, ...]
    trees: tuple[StoredChunk, ...] = ()
    verified: bool = False
    step: int = 0
    samples: int = 0
    world_size: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(math.prod(e.shape) * ITEM_BYTES[e.dtype] for e in self.entries if e.dtype is not None)


def find(storage: Storage, path: str, part: str = "model") -> Source:
    """What there is to import at `path`.

    Args:
        path: A safetensors file, a directory of them, or a checkpoint directory written by DCP or by this package.
        part: The part to which weights go that are not stored under the name of a part.

    Raises:
        DamagedCheckpoint: there is nothing of these kinds, or it can't be read.
        UnsupportedState: `part` can't be the name of a part, or an entry has a name that no checkpoint can have.
    """
    check_name(part)
    opened = weights.parse(weights.fetch(storage, path))
    source = _source(storage, opened if weights.has_parts(opened) else weights.below(opened, part))
    for entry in source.entries:
        refuse_name(entry.key, entry.path)
    return source


def import_checkpoint(
    source: Source,
    run_storage: Storage,
    run_path: str,
    *,
    step: int | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write `source` as a committed checkpoint of the run at `run_path`, which has none yet.

    Args:
        step: Optimizer steps the weights were trained for; by default, as the source says.

    Raises:
        FileExistsError: the run has checkpoints: resuming from this one instead would lose them.
    """
    step = source.step if step is None else step
    # A save that was given up, or is still in progress, does not count: nobody resumes from it.
    present = next(DirectoryRun(run_storage, run_path, run_path).candidates(), None)
    if present is not None:
        raise FileExistsError(f"{run_path} has checkpoints already, {present} among them; import into a new run")
    attempt = secrets.token_hex(3)
    name = str(CheckpointName(step, attempt))
    path = posixpath.join(run_path, name)
    parts = {str(e.path[0]) for e in source.entries} | {str(row.path[0]) for row in source.trees}
    description = Description(
        world_size=source.world_size, step=step, samples=source.samples, attempt=attempt, parts=tuple(sorted(parts))
    )
    writer = CheckpointWriter(path, run_storage, num_files=DEFAULT_NUM_FILES, description=description)
    writer.set_up_storage_writer(True, rank=0)
    plan, metadata = _plan(source.entries)
    try:
        results = writer.write_data(plan, _Planner(source.entries, progress)).wait()
        writer.finish(metadata, [[*results, *map(commit.tree_result, source.trees)]])
    except BaseException:
        # Also for Ctrl-C: nobody will complete this directory.
        run_storage.delete(path)
        raise
    return Imported(
        name=name,
        path=path,
        num_entries=len(source.entries),
        num_bytes=writer.num_bytes,
        verified=source.verified,
    )


class _Planner(DefaultSavePlanner):
    """Reads each piece only when the writer comes to it."""

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


def _source(storage: Storage, opened: OpenCheckpoint) -> Source:
    return Source(
        entries=tuple(_entry(storage, opened.path, opened.chunks[key]) for key in sorted(opened.chunks)),
        trees=tuple(opened.trees.values()),
        verified=opened.manifest is not None,
        **_counts(opened.manifest),
    )


def _counts(manifest: Manifest | None) -> dict[str, int]:
    if manifest is None:
        return {}
    return {"step": manifest.step, "samples": manifest.samples, "world_size": manifest.world_size}


def _entry(storage: Storage, path: str, chunks: Sequence[StoredChunk]) -> Entry:
    first = chunks[0]
    # A tensor without checksums may be one chunk of any size: it is cut. Chunks with checksums stay as they are.
    pieces = {box: chunk for chunk in chunks for box in ([chunk.box] if chunk.checksums else _pieces(chunk))}

    def read(box: Box) -> Any:
        chunk = pieces[box]
        if chunk.dtype is None:
            return value_of(storage, path, chunk)
        tensor = torch.empty(box.sizes, dtype=getattr(torch, chunk.dtype), device="cpu")
        read_requests(storage, path, {"": [Request(chunk, box.relative_to(chunk.box), tensor)]}, None)
        return tensor

    return Entry(path=first.path, dtype=first.dtype, shape=first.shape, boxes=tuple(pieces), read=read)


def _pieces(chunk: StoredChunk) -> Sequence[Box]:
    whole = chunk.box
    if chunk.dtype is None or chunk.data_offset < 0 or whole.num_elements == 0:
        return [whole]
    return list(split(whole, chunk.shape, max(1, MAX_PIECE_BYTES // ITEM_BYTES[chunk.dtype]), 0))
