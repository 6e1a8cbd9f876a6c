"""Small pieces are read once, in a few large requests, and passed on to the ranks that want them.

When a checkpoint goes to another number of workers, each stored chunk is cut anew. Two ranks want a part each of every
chunk in a file, and neither can ask for its parts in few requests without reading the other's along. So one of them
asks for both, and sends on what is the other's. Who reads what is known beforehand (`dealing`); what is large enough
for a request of its own, every rank reads for itself.

1. (all) tell each reader what this rank wants of its run of bytes;
2. (all) read a window of their run, in as few requests as `ReadLimits` allows;
3. (all) agree that it was read, and how far each reader got;
4. (all) send and receive; check and copy what came; again from 2, until all runs are read.
"""

from __future__ import annotations

import posixpath
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, count, pairwise

import torch
import torch.distributed as dist

from ray_stateful.ranks import Failure, Outcome, Ranks
from ray_stateful.storage.base import Storage
from ray_stateful.storage.dealing import Deal, Span, between, weigh, window, window_bytes
from ray_stateful.storage.ranges import Piece, ReadLimits
from ray_stateful.storage.reading import ReadStatistics, Request, place_checked, read_exactly


def read(
    storage: Storage,
    path: str,
    deal: Deal,
    requests: Mapping[str, Sequence[Request]],
    limits: ReadLimits,
    ranks: Ranks,
    outcome: Outcome,
) -> tuple[dict[str, ReadStatistics], dict[int, Failure]]:
    """Fill the tensors of small requests. Collective: of all ranks, each with its own `requests`, by part of the state.

    Args:
        deal: Of the checkpoint's files to all ranks; the same on all of them.
        outcome: What became of what this rank read before. An error of this one goes there as well.

    Returns:
        What this rank asked of storage, by part; and who failed, the same on every rank. If anybody did, tensors are
        filled in part, with bytes that were checked.
    """
    names = sorted(requests)
    statistics = {
        name: ReadStatistics(bytes_wanted=weigh((r.chunk, r.box) for r in requests[name])[1]) for name in names
    }
    targets = [request.into.detach() for name in names for request in requests[name]]
    wanted: dict[Span, list[Piece]] = {}
    asked: list[list[Span]] = [[] for _ in range(ranks.world_size)]
    with outcome.catch():
        wanted = _wanted(deal, [requests[name] for name in names], limits)
        for span in sorted(wanted):
            asked[deal.reader_of(span)].append(span)
    failures, counts = ranks.share("ask for pieces", outcome, [len(spans) for spans in asked])
    if failures:
        return statistics, failures
    to_read = _tell(asked, [of_rank[ranks.rank] for of_rank in counts], ranks)
    everything = sorted({span for spans in to_read for span in spans})
    max_bytes = window_bytes(max(sum(number > 0 for number in of_rank) for of_rank in counts))

    def fill(spans: Sequence[Span], data: Iterable[memoryview]) -> None:
        for span, of_span in zip(spans, data, strict=True):
            file, start, _ = deal.place(span)
            place_checked(wanted[span], targets, of_span, start, posixpath.join(path, file))

    # How far each reader got.
    reached = [0] * ranks.world_size
    while True:
        begin = end = reached[ranks.rank]
        answers: list[list[memoryview]] = []
        with outcome.catch():
            if outcome.error is None:
                end = window(everything, begin, max_bytes)
                fetched, found = _fetch(storage, path, deal, between(everything, begin, end), names, limits)
                statistics = {name: statistics[name] + found[name] for name in names}
                for rank, spans in enumerate(to_read):
                    data = list(map(fetched.of, between(spans, begin, end)))
                    if rank == ranks.rank:
                        fill(between(spans, begin, end), data)
                    answers.append([] if rank == ranks.rank else data)
        failures, ends = ranks.share("read", outcome, [end])
        before, reached = reached, [end for (end,) in ends]
        # Also when nothing is left to read: this is where a block that came damaged is told.
        if failures or reached == before:
            return statistics, failures
        expected = [between(spans, *run) for spans, run in zip(asked, zip(before, reached, strict=True), strict=True)]
        expected[ranks.rank] = []
        received = _send(answers, [sum(map(len, spans)) for spans in expected], ranks)
        with outcome.catch():
            every = [span for spans in expected for span in spans]
            stops = list(accumulate(map(len, every), initial=0))
            fill(every, (received[first:stop] for first, stop in pairwise(stops)))


def _wanted(deal: Deal, requests: Iterable[Iterable[Request]], limits: ReadLimits) -> dict[Span, list[Piece]]:
    """The spans of what is wanted, and the pieces that are cut from each; a piece's target is its request's number."""
    number = count()
    wanted: dict[Span, list[Piece]] = defaultdict(list)
    for part, group in enumerate(requests):
        for request in group:
            for span, piece in deal.cut(request.chunk, request.box, next(number), part, limits):
                wanted[span].append(piece)
    return wanted


def _tell(asked: Sequence[Sequence[Span]], num_rows: Sequence[int], ranks: Ranks) -> list[list[Span]]:
    """What each rank wants of this one. Collective.

    Args:
        asked: What this rank wants of each.
        num_rows: How many spans each of them wants.
    """
    flat = [number for spans in asked for span in spans for number in (span.begin, span.stop, span.part)]
    rows = torch.tensor(flat, dtype=torch.int64, device="cpu").view(-1, 3)
    received = torch.empty((sum(num_rows), 3), dtype=torch.int64, device="cpu")
    _all_to_all("ask for pieces", received, rows, num_rows, [len(spans) for spans in asked], ranks)
    return [[Span(*row) for row in of_rank.tolist()] for of_rank in torch.split(received, list(num_rows))]


def _send(answers: Sequence[Sequence[memoryview]], num_bytes: Sequence[int], ranks: Ranks) -> memoryview:
    """Send each rank its bytes; `num_bytes` from each of them, in the order of ranks. Collective."""
    num_sent = [sum(map(len, of_rank)) for of_rank in answers]
    sent = torch.empty(sum(num_sent), dtype=torch.uint8, device="cpu")
    buffer, stop = sent.numpy().data, 0
    for data in chain.from_iterable(answers):
        begin, stop = stop, stop + len(data)
        buffer[begin:stop] = data
    received = torch.empty(sum(num_bytes), dtype=torch.uint8, device="cpu")
    _all_to_all("send what was read", received, sent, num_bytes, num_sent, ranks)
    return received.numpy().data


def _all_to_all(
    phase: str,
    received: torch.Tensor,
    sent: torch.Tensor,
    num_received: Sequence[int],
    num_sent: Sequence[int],
    ranks: Ranks,
) -> None:
    exchange = partial(dist.all_to_all_single, received, sent, list(num_received), list(num_sent), group=ranks.group)
    ranks.within_deadline(phase, exchange)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """The bytes of a window: of each part of the state, where each request's begin, and what came of it."""

    begins: dict[int, list[int]]
    data: dict[int, list[memoryview]]

    def of(self, span: Span) -> memoryview:
        number = bisect_right(self.begins[span.part], span.begin) - 1
        first = span.begin - self.begins[span.part][number]
        return self.data[span.part][number][first : first + len(span)]


def _fetch(
    storage: Storage, path: str, deal: Deal, spans: Sequence[Span], names: Sequence[str], limits: ReadLimits
) -> tuple[_Fetched, dict[str, ReadStatistics]]:
    """Read `spans`, which are sorted; what it took, by the names of the parts."""
    groups = deal.requests(spans, limits)
    with ThreadPoolExecutor(max_workers=limits.num_threads, thread_name_prefix="checkpoint-read") as pool:
        jobs = {
            part: [pool.submit(read_exactly, storage, path, file, first, stop) for file, first, stop, _ in of_part]
            for part, of_part in groups.items()
        }
        try:
            data = {part: [memoryview(job.result()) for job in of_part] for part, of_part in jobs.items()}
        except BaseException:
            # As of what a rank reads for itself: nothing more is worth reading.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    begins = {part: [group[0].begin for *_, group in of_part] for part, of_part in groups.items()}
    found = dict.fromkeys(names, ReadStatistics())
    for part, of_part in groups.items():
        found[names[part]] = ReadStatistics(sum(stop - first for _, first, stop, _ in of_part), 0, len(of_part))
    return _Fetched(begins, data), found
