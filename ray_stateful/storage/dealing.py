"""Which rank reads which bytes, where several want small pieces of the same chunks. Pure; no torch.

The item files are laid end to end, in the order of the ranks that wrote them, and each rank reads a run of that, with
as much as the others of what is restored. So nobody has to be told who wants what; and as shards lie in the order of
ranks, then as now, most of a run is what its reader wants itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from ray_stateful.format import layout
from ray_stateful.format.chunks import Box, run_of
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.manifest import Manifest
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage.ranges import Piece, ReadLimits, joined, pieces_of

# Fewer bytes than this for each request that it saves are sooner read along with much else, and sent, than asked for.
_WORTH_A_REQUEST = 256 << 10

# A run of bytes that has a request of its own in any case.
_LARGE_BYTES = 1 << 20

# What one request asks for at most, so that several of a large window are made at the same time.
_FETCH_BYTES = 4 << 20

# What a rank is sent at a time by all the readers it has; and what one of them sends at the least, to all ranks.
_WINDOW_BYTES = 64 << 20
_LEAST_WINDOW_BYTES = 2 << 20


def weigh(wanted: Iterable[tuple[StoredChunk, Box]]) -> tuple[int, int]:
    """How many requests passing on may save, and how many bytes are wanted: of boxes of chunks, offsets within each.

    Of a box that is but a part of its chunk, each run of bytes is one: somebody else may want what is between them.
    """
    num_runs = num_bytes = 0
    for chunk, box in wanted:
        if box.num_elements < chunk.box.num_elements:
            num_runs += box.num_elements // max(1, run_of(box, chunk.box.sizes))
        num_bytes += box.num_elements * ITEM_BYTES[chunk.dtype or ""]
    return num_runs, num_bytes


def pays(manifest: Manifest | None, weights: Sequence[Sequence[int]]) -> bool:
    """Whether to pass on, from what `weigh` says of every rank.

    Not of a foreign checkpoint, which has no manifest: its files are not known to all ranks.
    """
    num_runs, num_bytes = map(sum, zip(*weights, strict=True))
    return manifest is not None and len(weights) > 1 and num_runs > 0 and num_bytes <= num_runs * _WORTH_A_REQUEST


def is_small(chunk: StoredChunk, box: Box) -> bool:
    """Whether `box` of `chunk`, offsets within it, is passed on rather than asked for by whoever wants it."""
    return run_of(box, chunk.box.sizes) * ITEM_BYTES[chunk.dtype or ""] < _LARGE_BYTES


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """What a rank wants of a reader: whole blocks of a chunk, from position `begin` to before `stop`.

    `part` is the number of the state's part that wants it, in the order of their names.
    """

    begin: int
    stop: int
    part: int

    def __len__(self) -> int:
        return self.stop - self.begin


@dataclass(frozen=True, slots=True)
class Deal:
    """The item files end to end. A position counts bytes from the beginning of the first.

    `starts` has the position of each file's first byte, and `runs` where the run of each rank but the first begins.
    """

    files: tuple[str, ...]
    starts: tuple[int, ...]
    start_of: Mapping[str, int]
    runs: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Mapping[str, int], restored: Iterable[StoredChunk], world_size: int) -> Deal:
        """Deal files of `sizes` bytes out to `world_size` ranks; what is no item file is left out.

        Args:
            restored: Chunks that somebody wants; within a file, all that is between the first and the last of them is
                taken to be wanted.
        """
        files = tuple(sorted(filter(layout.is_item_file, sizes), key=layout.writer_of))
        starts = tuple(accumulate((sizes[file] for file in files[:-1]), initial=0)) if files else ()
        extents: dict[str, tuple[int, int]] = {}
        for chunk in restored:
            first, stop = extents.get(chunk.file, (chunk.data_offset, 0))
            extents[chunk.file] = min(first, chunk.data_offset), max(stop, chunk.data_offset + chunk.num_bytes)
        wanted = [
            (start + extents[file][0], start + extents[file][1])
            for file, start in zip(files, starts, strict=True)
            if file in extents
        ]
        return cls(files, starts, dict(zip(files, starts, strict=True)), tuple(_equal_runs(wanted, world_size)))

    def reader_of(self, span: Span) -> int:
        """The rank in whose run `span` begins."""
        return bisect_right(self.runs, span.begin)

    def place(self, span: Span) -> tuple[str, int, int]:
        """The file of a span, and its first and past-the-last byte there."""
        # Of files that begin at one position all but the last are empty.
        number = bisect_right(self.starts, span.begin) - 1
        first = span.begin - self.starts[number]
        return self.files[number], first, first + len(span)

    def cut(self, chunk: StoredChunk, box: Box, target: int, part: int, limits: ReadLimits) -> list[tuple[Span, Piece]]:
        """The pieces of `box` of `chunk`, each with the span that it lies in."""
        start = self.start_of[chunk.file]
        # Cut small, as what lies together is joined by its reader.
        limits = replace(limits, max_fetch_bytes=min(limits.max_fetch_bytes, _LARGE_BYTES))
        pieces = [(piece.file_span, piece) for piece in pieces_of(chunk, box, target, limits)]
        return [(Span(start + first, start + stop, part), piece) for (first, stop), piece in pieces]

    def requests(self, spans: Iterable[Span], limits: ReadLimits) -> dict[int, list[tuple[str, int, int, list[Span]]]]:
        """What sorted `spans` are read in, as of `joined`: each part by itself, so that it is known what it took."""
        limits = replace(limits, max_fetch_bytes=min(limits.max_fetch_bytes, _FETCH_BYTES))
        of_part: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            of_part[span.part].append(span)
        return {part: joined(group, self.place, limits) for part, group in of_part.items()}


def window_bytes(num_readers: int, limits: ReadLimits) -> int:
    """What a reader sends at a time, where a rank has `num_readers` at most; no more than it reads at a time anyway."""
    most = max(_LEAST_WINDOW_BYTES, _WINDOW_BYTES // max(1, num_readers))
    return min(most, limits.max_fetch_bytes * limits.num_threads)


def window(spans: Sequence[Span], begin: int, max_bytes: int, limits: ReadLimits) -> int:
    """How far a reader gets with `max_bytes`: the position before which what begins is read now.

    Args:
        spans: All that is wanted, sorted, each as often as it is; they may overlap.
        begin: Where the window before this one ended.
        max_bytes: Of spans, and of what is read along between them.

    Returns:
        `begin` if nothing is left. In a window is at least what begins at one place, whatever its size.
    """
    total, last = 0, begin
    covered: dict[int, int] = {}
    rest = (spans[number] for number in range(bisect_left(spans, begin, key=_begin), len(spans)))
    # What begins at one place is not told apart by where it begins.
    for first, group in groupby(rest, key=_begin):
        here = list(group)
        # Each part is read by itself, and reads what is another's along as well.
        gaps = [first - covered.get(part, first) for part in {span.part for span in here}]
        num_bytes = sum(map(len, here)) + sum(gap for gap in gaps if 0 < gap <= limits.max_gap_bytes)
        if total and total + num_bytes > max_bytes:
            return first
        total, last = total + num_bytes, first
        covered |= {span.part: max(span.stop, covered.get(span.part, 0)) for span in here}
    return last + 1 if total else begin


def between(spans: Sequence[Span], begin: int, end: int) -> Sequence[Span]:
    """Those of sorted `spans` that begin at `begin` or after it, and before `end`."""
    return spans[bisect_left(spans, begin, key=_begin) : bisect_left(spans, end, key=_begin)]


def _begin(span: Span) -> int:
    return span.begin


def _equal_runs(wanted: Sequence[tuple[int, int]], num_runs: int) -> Iterator[int]:
    """Where runs begin, but for the first, that have equally many of the `wanted` positions, which are sorted."""
    before = list(accumulate((stop - first for first, stop in wanted), initial=0))
    for number in range(1, num_runs):
        share = before[-1] * number // num_runs
        extent = bisect_right(before, share) - 1
        yield wanted[extent][0] + share - before[extent] if extent < len(wanted) else 0
