"""Tensors of a checkpoint as a stream of slabs: whole runs of rows in order, in bounded memory, each byte checked.

For work that passes over a whole checkpoint and keeps none of it: an export, a comparison. The next batch of slabs is
read while this one is in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch

from ray_stateful.format.chunks import Box, split
from ray_stateful.storage.base import Storage
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.reader import read_requests, requests_for

# Elements of one slab, at most; and bytes of one batch, of which two are in memory at a time.
MAX_ELEMENTS = 8 << 20
BATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Slab:
    """A box of one tensor whose elements follow one another in the tensor's row-major order."""

    key: str
    box: Box
    tensor: torch.Tensor


def cut(opened: OpenCheckpoint, keys: Iterable[str]) -> list[tuple[str, Box]]:
    """The slabs of the tensors at `keys`, in their order.

    A foreign tensor is one slab: its items can only be opened whole.
    """
    boxes = []
    for key in keys:
        first = opened.chunks[key][0]
        whole = Box((0,) * len(first.shape), first.shape)
        limit = MAX_ELEMENTS if first.data_offset >= 0 else whole.num_elements
        boxes += [(key, box) for box in split(whole, first.shape, max(1, limit), 0)]
    return boxes


def stream(storage: Storage, opened: OpenCheckpoint, boxes: Iterable[tuple[str, Box]]) -> Iterator[Slab]:
    """The slabs of `boxes`, as `cut` made them.

    Raises:
        DamagedCheckpoint: bytes are missing, or not those that were written.
    """
    batches = _batches(opened, boxes)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-slabs") as pool:
        pending: Future[list[Slab]] | None = None
        for batch in chain(batches, [None]):
            ready: list[Slab] = pending.result() if pending is not None else []
            pending = pool.submit(_read, storage, opened, batch) if batch is not None else None
            yield from ready


def _batches(opened: OpenCheckpoint, boxes: Iterable[tuple[str, Box]]) -> Iterator[list[Slab]]:
    """Group slabs that are read together: small tensors would otherwise cost a round trip each."""
    batch: list[Slab] = []
    size = 0
    for key, box in boxes:
        dtype = getattr(torch, opened.chunks[key][0].dtype or "")
        num_bytes = box.num_elements * dtype.itemsize
        if batch and size + num_bytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        # Not filled, and so not backed by memory, before it is read into.
        batch.append(Slab(key, box, torch.empty(box.sizes, dtype=dtype, device="cpu")))
        size += num_bytes
    if batch:
        yield batch


def _read(storage: Storage, opened: OpenCheckpoint, batch: list[Slab]) -> list[Slab]:
    requests = [request for slab in batch for request in requests_for(opened.chunks[slab.key], slab.box, slab.tensor)]
    read_requests(storage, opened.path, {"": requests}, None)
    return batch
