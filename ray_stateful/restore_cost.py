"""What a restore on another number of workers will read, worker by worker, before there are any workers. No torch.

Each tensor is taken to be sharded along dim 0 over all workers, as FSDP does it (`torch.chunk`: ceil(n / workers) rows
each, the last ones fewer or none). Values that are not tensors are in the index, which one worker reads for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ray_stateful.format import layout
from ray_stateful.format.chunks import Box, intersection
from ray_stateful.format.index import StoredChunk
from ray_stateful.format.stock_item import HEAD_BYTES
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.ranges import Piece, ReadLimits, fetches_of, pieces_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCost:
    """What one worker asks of storage: bytes it needs, bytes it reads for them, in so many requests."""

    rank: int
    bytes_wanted: int
    bytes_read: int
    num_requests: int


def costs(opened: OpenCheckpoint, num_workers: int, limits: ReadLimits | None = None) -> list[RankCost]:
    """The cost for each of `num_workers`."""
    if num_workers < 1:
        raise ValueError(f"workers is {num_workers}; at least one is needed")
    limits = limits or ReadLimits()
    pieces: dict[tuple[int, str], list[Piece]] = defaultdict(list)
    wanted, foreign_bytes, foreign_requests = [0] * num_workers, [0] * num_workers, [0] * num_workers
    saved = opened.manifest.world_size if opened.manifest else num_workers
    for key, chunks in opened.chunks.items():
        if chunks[0].dtype is None:
            continue
        for chunk, rank, box in _shares(chunks, num_workers, saved):
            item_bytes = chunk.num_bytes // max(1, chunk.box.num_elements)
            wanted[rank] += box.num_elements * item_bytes
            if chunk.data_offset < 0:
                # Of a foreign item, first the head, which says where the tensor begins. At most: heads that lie close
                # together are read together.
                foreign_bytes[rank] += min(HEAD_BYTES, chunk.item_length) + box.num_elements * item_bytes
                foreign_requests[rank] += 2
            else:
                part = str(opened.chunks[key][0].path[0])
                pieces[rank, part] += pieces_of(chunk, box.relative_to(chunk.box), len(pieces), limits)
    fetches = {place: fetches_of(of_place, limits) for place, of_place in pieces.items()}
    read, requests = foreign_bytes, foreign_requests
    for (rank, _), of_rank in fetches.items():
        read[rank] += sum(fetch.stop - fetch.start for fetch in of_rank)
        requests[rank] += len(of_rank)
    return [
        RankCost(rank=rank, bytes_wanted=wanted[rank], bytes_read=read[rank], num_requests=requests[rank])
        for rank in range(num_workers)
    ]


def _shares(chunks: tuple[StoredChunk, ...], num_workers: int, saved: int) -> Iterator[tuple[StoredChunk, int, Box]]:
    """Which box of which stored chunk each worker needs of one tensor."""
    shape, path = chunks[0].shape, chunks[0].path
    owner = path[1] if len(path) > 1 and layout.is_rank_key(path[1]) else None
    for chunk in chunks:
        if chunk.box.num_elements == 0:
            continue
        rank_of = int(owner.removeprefix("rank_")) if isinstance(owner, str) else num_workers
        if saved == num_workers and rank_of < num_workers:
            # A value of one worker goes back to that worker; that of a worker there never was is a name like any other.
            yield chunk, rank_of, chunk.box
        elif owner is not None or not shape:
            yield from ((chunk, rank, chunk.box) for rank in range(num_workers))
        else:
            rows = -(-shape[0] // num_workers)
            first, stop = chunk.box.offsets[0], chunk.box.offsets[0] + chunk.box.sizes[0]
            for rank in range(first // rows, -(-stop // rows)):
                size = min(rows, shape[0] - rank * rows)
                shard = Box((rank * rows, *[0] * (len(shape) - 1)), (size, *shape[1:]))
                box = intersection(shard, chunk.box)
                if box is not None:
                    yield chunk, rank, box
