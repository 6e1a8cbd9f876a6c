"""A DCP `StorageReader` that reads ranges of bytes, not whole chunks, and checks each block of them.

Works under bare `dcp.load(state, storage_reader=CheckpointReader(uri))`, also on what stock `dcp.save` wrote.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ray_stateful.format import values
from ray_stateful.format.chunks import Box, intersection
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage import foreign, opening, reading
from ray_stateful.storage.base import Storage
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.reading import ReadStatistics, Request
from ray_stateful.storage.uris import resolve


class CheckpointReader(StorageReader):
    """Reads a checkpoint of format 1, or a plain DCP directory.

    Args:
        path: Of the checkpoint's directory; a URI if `storage` is not given.
        storage: Where `path` is.
        limits: How much is read at a time.

    `statistics` adds up what `read_data` asked of storage.
    """

    def __init__(
        self, path: str | os.PathLike[str], storage: Storage | None = None, *, limits: ReadLimits | None = None
    ) -> None:
        super().__init__()
        self._storage, self._path = (storage, os.fspath(path)) if storage is not None else resolve(os.fspath(path))
        self._limits = limits
        self._opened: OpenCheckpoint | None = None
        self.statistics = ReadStatistics()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._storage, self._path = resolve(os.fspath(checkpoint_id))
            self._opened = None

    # Without **kwargs, DCP does not fall back on an error to a metadata file of this rank alone, which may be stale.
    def read_metadata(self) -> Metadata:
        return self._open().metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._stored: dict[Any, StoredChunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors, and give it the values.

        Raises:
            DamagedCheckpoint: bytes are missing, or are not those that were written.
        """
        tensors: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._value(self._stored[item.storage_index]))
            else:
                tensors.append((item, planner.resolve_tensor(item).detach()))
        requests = [
            Request(self._stored[item.storage_index], Box(tuple(item.storage_offsets), tuple(item.lengths)), tensor)
            for item, tensor in tensors
        ]
        self.statistics += read_requests(self._storage, self._path, {"": requests}, self._limits)[""]
        for item, tensor in tensors:
            planner.commit_tensor(item, tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def _open(self) -> OpenCheckpoint:
        if self._opened is None:
            self._opened = opening.parse(opening.fetch(self._storage, self._path))
        return self._opened

    def _value(self, chunk: StoredChunk) -> io.BytesIO:
        # The planner unpickles what it gets, so this must be a pickle made here, not the one in the file.
        value = value_of(self._storage, self._path, chunk)
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return file


def requests_of(chunks: Sequence[StoredChunk], tensor: Any) -> list[Request]:
    """The requests that fill this rank's part of `tensor`, one for each box that it shares with a stored chunk."""
    return [request for box, local in _local_boxes(tensor) for request in requests_for(chunks, box, local)]


def requests_for(chunks: Sequence[StoredChunk], box: Box, tensor: torch.Tensor) -> list[Request]:
    """The requests that fill `tensor`, which is `box` of the larger tensor that is stored in `chunks`."""
    requests = []
    for chunk in chunks:
        shared = intersection(box, chunk.box)
        if shared is None:
            continue
        into = tensor
        for dim, (offset, size) in enumerate(zip(shared.relative_to(box).offsets, shared.sizes, strict=True)):
            if size != into.shape[dim]:
                into = into.narrow(dim, offset, size)
        requests.append(Request(chunk, shared.relative_to(chunk.box), into))
    return requests


def _local_boxes(tensor: Any) -> Iterator[tuple[Box, torch.Tensor]]:
    """The boxes of a tensor that are on this rank, each with the local tensor that holds it."""
    if isinstance(tensor, ShardedTensor):
        for shard in tensor.local_shards():
            yield Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)), shard.tensor.detach()
    elif isinstance(tensor, DTensor):
        if tensor.device_mesh.get_coordinate() is not None:
            # DCP's own planners ask this way: it handles uneven shards, and a dim that is sharded over two axes.
            (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # untyped in torch
            yield Box(tuple(chunk.offsets), tuple(chunk.sizes)), tensor.to_local().detach()
    else:
        yield Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor.detach()


def read_requests(
    storage: Storage, path: str, requests: Mapping[str, Sequence[Request]], limits: ReadLimits | None
) -> dict[str, ReadStatistics]:
    """Fill tensors from a checkpoint of either kind, all groups at once.

    Returns:
        What each group of requests asked of storage.
    """
    limits = limits or ReadLimits()
    placed: dict[str, list[Request]] = {}
    whole: dict[str, list[Request]] = {}
    found = dict.fromkeys(requests, ReadStatistics())
    for name, group in requests.items():
        theirs = {request.chunk for request in group if request.chunk.data_offset < 0}
        places, found[name] = foreign.locate(storage, path, theirs, limits)
        located = [replace(one, chunk=places.get(one.chunk, one.chunk)) for one in group] if theirs else list(group)
        placed[name] = [one for one in located if one.chunk.data_offset >= 0]
        whole[name] = [one for one in located if one.chunk.data_offset < 0]
    statistics = reading.read(storage, path, placed, limits)
    return {n: statistics[n] + found[n] + foreign.read(storage, path, whole[n]) for n in requests}


def value_of(storage: Storage, path: str, chunk: StoredChunk) -> Any:
    """A value of a checkpoint of either kind, read without running code from it."""
    if chunk.value is not None:
        return values.decode(chunk.value, f"{path}: {chunk.key!r}")
    return foreign.load_item(storage, path, chunk)
