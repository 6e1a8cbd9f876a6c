"""Small pieces are read once, in a few large requests, and passed on to the ranks that want them.

When a checkpoint is restored by a different number of workers, each stored chunk is cut anew. Two ranks may each want a
part of every chunk in a file, and neither can request its parts in few requests without also reading the other's. So
one of them requests both, and sends the other its parts. Who reads what is known beforehand (`dealing`); every rank
reads for itself what is large enough for a request of its own.

1. (all) tell each reader what this rank wants from the reader's run of bytes;
2. (all) read a window of their own run, in as few requests as `ReadLimits` allows;
3. (all) agree that reading succeeded, and how far each reader got;
4. (all) send and receive; check and copy what arrived; again from 2, until nothing is left to read.
"""

from __future__ import annotations

import posixpath
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, count, pairwise

import torch
import torch.distributed as dist

from ray_stateful.ranks import Failure, Outcome, Ranks
from ray_stateful.storage.base import Storage
from ray_stateful.storage.dealing import Deal, Span, between, window, window_bytes
from ray_stateful.storage.ranges import Piece, ReadLimits
from ray_stateful.storage.reading import ReadStatistics, Request, in_threads, place_checked, read_exactly


def read(
    storage: Storage,
    path: str,
    deal: Deal,
    requests: Mapping[str, Sequence[Request]],
    limits: ReadLimits,
    ranks: Ranks,
    outcome: Outcome,
) -> tuple[dict[str, ReadStatistics], dict[int, Failure]]:
    """Fill the tensors of small requests. Collective: all ranks call it, each with `requests` of its own.

    Args:
        requests: What this rank wants, by part of the state.
        deal: How the checkpoint's files are dealt to the ranks; the same on all of them.
        outcome: The outcome of this rank's reads before this call. Errors of this call are added to it.

    Returns:
        What this rank asked of storage, by part; and which ranks failed, the same on every rank. If any failed, tensors
        may be filled in part, with bytes that were checked.
    """
    names = sorted(requests)
    took = {name: ReadStatistics(bytes_wanted=sum(r.num_bytes for r in requests[name])) for name in names}
    wanted = _Wanted(path, deal, [request.into.detach() for name in names for request in requests[name]])
    asked: list[list[Span]] = [[] for _ in range(ranks.world_size)]
    question = torch.empty((0, 3), dtype=torch.int64, device="cpu")
    with outcome.catch():
        wanted.cut([requests[name] for name in names], limits)
        for span in sorted(wanted.pieces):
            asked[deal.reader_of(span)].append(span)
        flat = [number for spans in asked for span in spans for number in (span.begin, span.stop, span.part)]
        question = torch.tensor(flat, dtype=torch.int64, device="cpu").view(-1, 3)
    failures, facts = ranks.share("ask for pieces", outcome, [sum(map(bool, asked))])
    if failures:
        return took, failures
    to_read = _tell([len(spans) for spans in asked], question, ranks)
    everything = sorted(chain.from_iterable(to_read))
    max_bytes = window_bytes(max(num_readers for (num_readers,) in facts), limits)
    # How far each reader got.
    reached = [0] * ranks.world_size
    while True:
        begin = end = reached[ranks.rank]
        to_send, num_sent = _host_bytes(0), [0] * ranks.world_size
        with outcome.catch():
            if outcome.error is None:
                end = window(everything, begin, max_bytes, limits)
                now = [between(spans, begin, end) for spans in to_read]
                fetched = _fetch(storage, path, deal, sorted(set(chain.from_iterable(now))), limits)
                took = {name: took[name] + fetched.took(part) for part, name in enumerate(names)}
                wanted.fill(now[ranks.rank], map(fetched.of, now[ranks.rank]))
                now[ranks.rank] = []
                to_send, num_sent = _packed(now, fetched)
                del fetched
        failures, ends = ranks.share("read", outcome, [end])
        before, reached = reached, [end for (end,) in ends]
        # Shared also when nothing is left to read: here a rank reports that a block of the last window was damaged.
        if failures or reached == before:
            return took, failures
        expected = [between(spans, *run) for spans, run in zip(asked, zip(before, reached, strict=True), strict=True)]
        expected[ranks.rank] = []
        num_received = [sum(map(len, spans)) for spans in expected]
        received = _host_bytes(sum(num_received))
        _all_to_all("send what was read", received, to_send, num_received, num_sent, ranks)
        with outcome.catch():
            _unpack(wanted, list(chain.from_iterable(expected)), received)
        # Freed before the next window is read into memory.
        del received


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What this rank wants: the pieces that lie in each span, and the tensors that they fill."""

    path: str
    deal: Deal
    targets: Sequence[torch.Tensor]
    pieces: dict[Span, list[Piece]] = field(default_factory=lambda: defaultdict(list))

    def cut(self, requests: Iterable[Iterable[Request]], limits: ReadLimits) -> None:
        """Add the pieces of `requests`, by part; requests and `targets` have the same order."""
        number = count()
        for part, group in enumerate(requests):
            for request in group:
                for span, piece in self.deal.cut(request.chunk, request.box, next(number), part, limits):
                    self.pieces[span].append(piece)

    def fill(self, spans: Iterable[Span], data: Iterable[memoryview]) -> None:
        """Check each span's bytes, `data`, and copy its pieces.

        Raises:
            DamagedCheckpoint: names the first block that is not what was written.
        """
        for span, of_span in zip(spans, data, strict=True):
            file, start, _ = self.deal.place(span)
            place_checked(self.pieces[span], self.targets, of_span, start, posixpath.join(self.path, file))


def _tell(numbers: list[int], question: torch.Tensor, ranks: Ranks) -> list[list[Span]]:
    """The spans that each rank wants from this one. Collective: all ranks call it.

    Args:
        numbers: How many spans this rank wants from each rank.
        question: These spans, one row each, in rank order.
    """
    num_asked = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    num_told = torch.empty_like(num_asked)
    once = [1] * ranks.world_size
    _all_to_all("ask for pieces", num_told, num_asked, once, once, ranks)
    told = torch.empty((int(num_told.sum()), 3), dtype=torch.int64, device="cpu")
    _all_to_all("ask for pieces", told, question, num_told.tolist(), numbers, ranks)
    return [[Span(*row) for row in of_rank.tolist()] for of_rank in torch.split(told, num_told.tolist())]


def _all_to_all(
    phase: str,
    received: torch.Tensor,
    sent: torch.Tensor,
    num_received: list[int],
    num_sent: list[int],
    ranks: Ranks,
) -> None:
    exchange = partial(dist.all_to_all_single, received, sent, num_received, num_sent, group=ranks.group)
    ranks.within_deadline(phase, exchange)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """The bytes of a window: for each part of the state, where each request begins, and the bytes it read."""

    begins: dict[int, list[int]]
    data: dict[int, list[memoryview]]

    def of(self, span: Span) -> memoryview:
        number = bisect_right(self.begins[span.part], span.begin) - 1
        first = span.begin - self.begins[span.part][number]
        return self.data[span.part][number][first : first + len(span)]

    def took(self, part: int) -> ReadStatistics:
        data = self.data.get(part, [])
        return ReadStatistics(bytes_read=sum(map(len, data)), num_requests=len(data))


def _fetch(storage: Storage, path: str, deal: Deal, spans: Sequence[Span], limits: ReadLimits) -> _Fetched:
    """Read sorted `spans` from storage."""
    groups = [(part, group) for part, of_part in deal.requests(spans, limits).items() for group in of_part]
    jobs = [partial(read_exactly, storage, path, file, first, stop) for _, (file, first, stop, _) in groups]
    fetched = _Fetched(defaultdict(list), defaultdict(list))
    for (part, (*_, members)), data in zip(groups, in_threads(jobs, limits), strict=True):
        fetched.begins[part].append(members[0].begin)
        fetched.data[part].append(memoryview(data))
    return fetched


def _packed(spans: Sequence[Sequence[Span]], fetched: _Fetched) -> tuple[torch.Tensor, list[int]]:
    """The bytes of `spans`, which are by rank, one after another; and how many bytes each rank gets."""
    num_bytes = [sum(map(len, of_rank)) for of_rank in spans]
    packed = _host_bytes(sum(num_bytes))
    buffer, stop = packed.numpy().data, 0
    for span in chain.from_iterable(spans):
        begin, stop = stop, stop + len(span)
        buffer[begin:stop] = fetched.of(span)
    return packed, num_bytes


def _unpack(wanted: _Wanted, spans: Sequence[Span], packed: torch.Tensor) -> None:
    buffer, stops = packed.numpy().data, accumulate(map(len, spans), initial=0)
    wanted.fill(spans, (buffer[begin:stop] for begin, stop in pairwise(stops)))


def _host_bytes(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
