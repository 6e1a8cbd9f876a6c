"""Which rank reads which bytes, where several ranks want small pieces of the same chunks. Pure; no torch.

The item files are laid end to end, in the order of the ranks that wrote them. Each rank reads one run of these bytes;
the runs have equally many of the bytes that are restored. So every rank knows who reads what without being told; and as
shards are in rank order both when saved and when restored, most of a run is what its reader wants itself.
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

# Up to this many wanted bytes per request saved, reading them in a larger request and sending them on is faster than
# requesting them separately.
_WORTH_A_REQUEST = 256 << 10

# A run of at least this many bytes has a request of its own in any case.
_LARGE_BYTES = 1 << 20

# The most that one request asks for, so that a large window is read in several requests at the same time.
_FETCH_BYTES = 4 << 20

# The most that all its readers together send a rank at a time; and the least size of one reader's window, which goes to
# all ranks.
_WINDOW_BYTES = 64 << 20
_LEAST_WINDOW_BYTES = 2 << 20


def weigh(wanted: Iterable[tuple[StoredChunk, Box]]) -> tuple[int, int]:
    """How many requests passing on may save, and how many bytes are wanted.

    If a box is only a part of its chunk, each of its runs of bytes counts as a request: a different rank may want what
    lies between them.

    Args:
        wanted: Chunks, each with the box wanted of it; offsets within the chunk.
    """
    num_runs = num_bytes = 0
    for chunk, box in wanted:
        if box.num_elements < chunk.box.num_elements:
            num_runs += box.num_elements // max(1, run_of(box, chunk.box.sizes))
        num_bytes += box.num_elements * ITEM_BYTES[chunk.dtype or ""]
    return num_runs, num_bytes


def pays(manifest: Manifest | None, weights: Sequence[Sequence[int]]) -> bool:
    """Whether to pass on, given what `weigh` returned on every rank.

    Never for a foreign checkpoint, which has no manifest: its files are not known to all ranks.
    """
    num_runs, num_bytes = map(sum, zip(*weights, strict=True))
    return manifest is not None and len(weights) > 1 and num_runs > 0 and num_bytes <= num_runs * _WORTH_A_REQUEST


def is_small(chunk: StoredChunk, box: Box) -> bool:
    """Whether `box` of `chunk` (offsets within it) is passed on, rather than read by each rank that wants it."""
    return run_of(box, chunk.box.sizes) * ITEM_BYTES[chunk.dtype or ""] < _LARGE_BYTES


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """What a rank wants from a reader: whole blocks of a chunk, from position `begin` up to, not including, `stop`.

    `part` is the number of the part of the state that wants them, in the order of the parts' names.
    """

    begin: int
    stop: int
    part: int

    def __len__(self) -> int:
        return self.stop - self.begin


@dataclass(frozen=True, slots=True)
class Deal:
    """The item files laid end to end. A position counts bytes from the beginning of the first file.

    `starts` has the position of each file's first byte, `start_of` the same by name, and `runs` the position where the
    run of each rank but the first begins.
    """

    files: tuple[str, ...]
    starts: tuple[int, ...]
    start_of: Mapping[str, int]
    runs: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Mapping[str, int], restored: Iterable[StoredChunk], world_size: int) -> Deal:
        """Deal files of `sizes` bytes out to `world_size` ranks; ignores all but item files.

        Args:
            restored: Chunks that some rank wants; within a file, everything between the first and the last of them
                counts as wanted.
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
        # If several files begin at the same position, all but the last are empty.
        number = bisect_right(self.starts, span.begin) - 1
        first = span.begin - self.starts[number]
        return self.files[number], first, first + len(span)

    def cut(self, chunk: StoredChunk, box: Box, target: int, part: int, limits: ReadLimits) -> list[tuple[Span, Piece]]:
        """The pieces of `box` of `chunk` (offsets within it), each with the span that it lies in."""
        start = self.start_of[chunk.file]
        # Cut small: the reader joins pieces that lie together.
        limits = replace(limits, max_fetch_bytes=min(limits.max_fetch_bytes, _LARGE_BYTES))
        pieces = [(piece.file_span, piece) for piece in pieces_of(chunk, box, target, limits)]
        return [(Span(start + first, start + stop, part), piece) for (first, stop), piece in pieces]

    def requests(self, spans: Iterable[Span], limits: ReadLimits) -> dict[int, list[tuple[str, int, int, list[Span]]]]:
        """The requests that read sorted `spans`, by part, as `joined` gives them.

        Each part has requests of its own, so that what it read can be reported.
        """
        limits = replace(limits, max_fetch_bytes=min(limits.max_fetch_bytes, _FETCH_BYTES))
        of_part: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            of_part[span.part].append(span)
        return {part: joined(group, self.place, limits) for part, group in of_part.items()}


def window_bytes(num_readers: int, limits: ReadLimits) -> int:
    """What a reader sends at a time, if no rank has more than `num_readers`; at most what it reads at a time anyway."""
    most = max(_LEAST_WINDOW_BYTES, _WINDOW_BYTES // max(1, num_readers))
    return min(most, limits.max_fetch_bytes * limits.num_threads)


def window(spans: Sequence[Span], begin: int, max_bytes: int, limits: ReadLimits) -> int:
    """The end of a reader's next window: the spans that begin before this position are read now.

    Args:
        spans: All wanted spans, sorted, each once for every rank that wants it; they may overlap.
        begin: Where the previous window ended.
        max_bytes: The most bytes of a window: its spans, and the gaps between them that are read along.

    Returns:
        The position; `begin` if nothing is left. A window has at least all spans that begin at its first position,
        whatever their size.
    """
    total, last = 0, begin
    covered: dict[int, int] = {}
    rest = (spans[number] for number in range(bisect_left(spans, begin, key=_begin), len(spans)))
    # The window's end is a position: it can't separate spans that begin at the same one.
    for first, group in groupby(rest, key=_begin):
        here = list(group)
        # Each part has requests of its own, which also read gaps that are a different part's bytes.
        gaps = [first - covered.get(part, first) for part in {span.part for span in here}]
        num_bytes = sum(map(len, here)) + sum(gap for gap in gaps if 0 < gap <= limits.max_gap_bytes)
        if total and total + num_bytes > max_bytes:
            return first
        total, last = total + num_bytes, first
        covered |= {span.part: max(span.stop, covered.get(span.part, 0)) for span in here}
    return last + 1 if total else begin


def between(spans: Sequence[Span], begin: int, end: int) -> Sequence[Span]:
    """The spans of sorted `spans` that begin at or after `begin`, and before `end`."""
    return spans[bisect_left(spans, begin, key=_begin) : bisect_left(spans, end, key=_begin)]


def _begin(span: Span) -> int:
    return span.begin


def _equal_runs(wanted: Sequence[tuple[int, int]], num_runs: int) -> Iterator[int]:
    """Where each run but the first begins, if each is to have equally many positions of the sorted `wanted` ranges."""
    before = list(accumulate((stop - first for first, stop in wanted), initial=0))
    for number in range(1, num_runs):
        share = before[-1] * number // num_runs
        extent = bisect_right(before, share) - 1
        yield wanted[extent][0] + share - before[extent] if extent < len(wanted) else 0
