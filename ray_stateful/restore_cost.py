"""What a restore on a different number of workers would read, worker by worker, before there are any. No torch.

Each tensor is assumed to be sharded along dim 0 over all workers, as FSDP does (`torch.chunk`: ceil(n / workers) rows
each, the last ones fewer or none). Values that are not tensors are in the index, which one worker reads for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from ray_stateful.format import layout
from ray_stateful.format.chunks import Box, intersection
from ray_stateful.format.rows import StoredChunk
from ray_stateful.format.stock_item import HEAD_BYTES
from ray_stateful.storage import dealing
from ray_stateful.storage.dealing import Deal, Span
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.ranges import Piece, ReadLimits, fetches_of, pieces_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCost:
    """The bytes one worker needs; and the bytes it reads from storage, in how many requests, for itself and others."""

    rank: int
    bytes_wanted: int
    bytes_read: int
    num_requests: int


def costs(opened: OpenCheckpoint, num_workers: int, limits: ReadLimits | None = None) -> list[RankCost]:
    """The cost for each of `num_workers`."""
    if num_workers < 1:
        raise ValueError(f"workers is {num_workers}; at least one is needed")
    limits = limits or ReadLimits()
    wants: list[list[_Want]] = [[] for _ in range(num_workers)]
    saved = opened.manifest.world_size if opened.manifest else num_workers
    for chunks in opened.chunks.values():
        if chunks[0].dtype is not None:
            for chunk, rank, box in _shares(chunks, num_workers, saved):
                wants[rank].append(_Want(chunk, box.relative_to(chunk.box)))
    needed = [dealing.weigh((want.chunk, want.box) for want in of_rank)[1] for of_rank in wants]
    read, requests = [0] * num_workers, [0] * num_workers
    for rank, num_bytes, num_requests in _asked(opened, wants, limits):
        read[rank] += num_bytes
        requests[rank] += num_requests
    return [
        RankCost(rank=rank, bytes_wanted=needed[rank], bytes_read=read[rank], num_requests=requests[rank])
        for rank in range(num_workers)
    ]


@dataclass(frozen=True, slots=True)
class _Want:
    """A box of a stored chunk that a worker needs; offsets within the chunk."""

    chunk: StoredChunk
    box: Box

    @property
    def part(self) -> str:
        return str(self.chunk.path[0])


def _asked(
    opened: OpenCheckpoint, wants: Sequence[Sequence[_Want]], limits: ReadLimits
) -> Iterator[tuple[int, int, int]]:
    """Rank, bytes and requests of what is read, in several entries per rank."""
    # Decided as in `joint_reads.py`: what belongs to a single rank does not count.
    weights = [
        dealing.weigh((want.chunk, want.box) for want in of_rank if _owner(want.chunk) is None) for of_rank in wants
    ]
    passes = dealing.pays(opened.manifest, weights)
    asked: list[list[Span]] = []
    restored = (row for rows in opened.chunks.values() for row in rows if row.dtype)
    deal = Deal.of(opened.manifest.sizes if opened.manifest else {}, restored, len(wants))
    parts = sorted({want.part for of_rank in wants for want in of_rank})
    for rank, of_rank in enumerate(wants):
        pieces: dict[str, list[Piece]] = defaultdict(list)
        spans: set[Span] = set()
        for number, want in enumerate(of_rank):
            chunk, box = want.chunk, want.box
            if chunk.data_offset < 0:
                # Of a foreign item the head is read first: it says where the tensor begins. An upper bound, as heads
                # that lie close together are read in one request.
                yield rank, min(HEAD_BYTES, chunk.item_length) + dealing.weigh([(chunk, box)])[1], 2
            elif passes and dealing.is_small(chunk, box):
                spans |= {span for span, _ in deal.cut(chunk, box, number, parts.index(want.part), limits)}
            else:
                pieces[want.part] += pieces_of(chunk, box, number, limits)
        for of_part in pieces.values():
            fetches = fetches_of(of_part, limits)
            yield rank, sum(fetch.stop - fetch.start for fetch in fetches), len(fetches)
        asked.append(sorted(spans))
    yield from _passed_on(deal, asked, limits)


def _passed_on(deal: Deal, asked: Sequence[Sequence[Span]], limits: ReadLimits) -> Iterator[tuple[int, int, int]]:
    """The same for what one rank reads on behalf of others: window by window, as in `storage/passing.py`."""
    num_readers = max(len({deal.reader_of(span) for span in of_rank}) for of_rank in asked)
    max_bytes = dealing.window_bytes(num_readers, limits)
    everything: dict[int, list[Span]] = defaultdict(list)
    for span in sorted(chain.from_iterable(asked)):
        everything[deal.reader_of(span)].append(span)
    for reader, spans in everything.items():
        begin = 0
        while (end := dealing.window(spans, begin, max_bytes, limits)) != begin:
            for groups in deal.requests(sorted(set(dealing.between(spans, begin, end))), limits).values():
                yield reader, sum(stop - first for _, first, stop, _ in groups), len(groups)
            begin = end


def _owner(chunk: StoredChunk) -> str | None:
    """The step of a chunk's path that names the one worker it belongs to; `None` if there is none."""
    step = chunk.path[1] if len(chunk.path) > 1 else None
    return step if isinstance(step, str) and layout.is_rank_key(step) else None


def _shares(chunks: tuple[StoredChunk, ...], num_workers: int, saved: int) -> Iterator[tuple[StoredChunk, int, Box]]:
    """Which box of which stored chunk of one tensor each worker needs."""
    shape, owner = chunks[0].shape, _owner(chunks[0])
    for chunk in chunks:
        if chunk.box.num_elements == 0:
            continue
        rank_of = num_workers if owner is None else int(owner.removeprefix("rank_"))
        if saved == num_workers and rank_of < num_workers:
            # A value of one worker goes back to that worker; a worker that never was is a name like any other.
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
