"""Boxes of integers: what part of a tensor a chunk is, and where its bytes lie. Pure; no torch.

A box is `(offsets, sizes)`, one entry per tensor dim; `((), ())` is a scalar. Bytes are those of a contiguous,
row-major tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice, pairwise, product

Ints = tuple[int, ...]

_MAX_CUT_DIMS = 8
# Corners of all boxes of a tensor, counting cut dims only: each takes some 200 bytes while they are added up.
_MAX_CORNERS = 1 << 20
_MAX_PROBLEMS = 10
_MAX_COMPARED = 200


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Part of a tensor. `offsets` and `sizes` count elements, one entry per tensor dim."""

    offsets: Ints
    sizes: Ints

    def __reduce__(self) -> tuple[type[Box], tuple[Ints, Ints]]:
        # What dataclasses do by default looks up every field of every box, and ranks send one box with each row.
        return Box, (self.offsets, self.sizes)

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    def relative_to(self, other: Box) -> Box:
        """This box with its offsets counted from those of `other`."""
        return Box(tuple(a - b for a, b in zip(self.offsets, other.offsets, strict=True)), self.sizes)


def intersection(first: Box, second: Box) -> Box | None:
    """The box that two boxes of one tensor share; `None` if they share no element."""
    offsets, sizes = [], []
    for a, m, b, n in zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True):
        start, stop = max(a, b), min(a + m, b + n)
        if stop <= start:
            return None
        offsets.append(start)
        sizes.append(stop - start)
    return Box(tuple(offsets), tuple(sizes))


def strides_of(sizes: Sequence[int]) -> Ints:
    """Row-major strides, in elements."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def span_of(box: Box, sizes: Sequence[int]) -> tuple[int, int]:
    """First and past-the-last element of `box` in the row-major order of a chunk of `sizes`; `(0, 0)` if empty."""
    if box.num_elements == 0:
        return 0, 0
    strides = strides_of(sizes)
    first = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    last = sum((o + n - 1) * s for o, n, s in zip(box.offsets, box.sizes, strides, strict=True))
    return first, last + 1


def run_of(box: Box, sizes: Sequence[int]) -> int:
    """Number of elements of `box`, in a chunk of `sizes`, that follow each other without a gap."""
    run = 1
    for size, whole in zip(reversed(box.sizes), reversed(sizes), strict=True):
        run *= size
        if size != whole:
            break
    return run


def split(box: Box, sizes: Sequence[int], max_span: int, max_gap: int) -> Iterator[Box]:
    """Cut `box` of a chunk of `sizes` into boxes that are each worth reading as one span of elements.

    Args:
        max_span: Most elements in a span; even a single row is cut if it has more.
        max_gap: Most elements between two runs of a box that are read along with them rather than skipped.
    """
    if box.num_elements == 0:
        return
    pending = [box]
    while pending:
        part = pending.pop()
        first, stop = span_of(part, sizes)
        wide = next((dim for dim, size in enumerate(part.sizes) if size > 1), None)
        if wide is None or (stop - first <= max_span and _largest_gap(part, sizes) <= max_gap):
            yield part
            continue
        half = part.sizes[wide] // 2
        pending.append(_cut(part, wide, half, part.sizes[wide]))
        pending.append(_cut(part, wide, 0, half))


def coverage_problems(shape: Sequence[int], boxes: Sequence[Box]) -> list[str]:
    """Why `boxes` are not an exact tiling of a tensor of `shape`; empty if they are.

    The check takes time in proportion to the number of boxes, whatever they are: the checkpoint may be a stranger's.
    """
    if _are_rows(tuple(shape), boxes):
        return []
    outside = (f"{_text(box)} is outside of shape {tuple(shape)}" for box in boxes if not _inside(shape, box))
    problems = list(islice(outside, _MAX_PROBLEMS))
    if problems:
        return problems
    solid = [box for box in boxes if box.num_elements > 0]
    cut = [dim for dim, size in enumerate(shape) if any(box.sizes[dim] != size for box in solid)]
    if len(cut) > _MAX_CUT_DIMS:
        return [f"shape {tuple(shape)} is cut along {len(cut)} dims; no mesh has more than {_MAX_CUT_DIMS}"]
    if len(solid) << len(cut) > _MAX_CORNERS:
        return [
            f"shape {tuple(shape)} is cut along {len(cut)} dims into {len(solid):,} chunks, more than any mesh does"
        ]
    covered, volume = sum(box.num_elements for box in solid), math.prod(shape)
    if covered == volume and _is_tiling(shape, solid, cut):
        return []
    overlaps = islice(_overlaps(solid, cut), _MAX_PROBLEMS)
    problems = list(dict.fromkeys(f"{_text(a)} and {_text(b)} overlap" for a, b in overlaps))
    return problems or [f"chunks hold {covered:,} of {volume:,} elements of shape {tuple(shape)}"]


def _are_rows(shape: Ints, boxes: Sequence[Box]) -> bool:
    """Whether boxes are runs of whole rows of a tensor, end to end: what FSDP makes, and quick to check."""
    if not shape:
        return len(boxes) == 1 and boxes[0] == Box((), ())
    stop, inner, zeros = 0, shape[1:], (0,) * (len(shape) - 1)
    for box in sorted(boxes):
        if box.sizes[1:] != inner or box.offsets[1:] != zeros or box.offsets[0] != stop or box.sizes[0] < 1:
            return False
        stop += box.sizes[0]
    return stop == shape[0]


def _is_tiling(shape: Sequence[int], boxes: Sequence[Box], cut: Sequence[int]) -> bool:
    """Whether boxes within `shape` hold each of its elements exactly once; `cut` are the dims that any of them cuts.

    Each box is a signed sum of quadrants, which reach from its corners to infinity, and quadrants at different corners
    are linearly independent. So the boxes tile the tensor if, and only if, their signed corners add up to the tensor's.
    """
    corners: Counter[Ints] = Counter()
    whole = [Box((0,) * len(shape), tuple(shape))] if math.prod(shape) else []
    for sign, group in ((1, boxes), (-1, whole)):
        for box in group:
            for upper in product((0, 1), repeat=len(cut)):
                corner = tuple(box.offsets[d] + u * box.sizes[d] for d, u in zip(cut, upper, strict=True))
                corners[corner] += -sign if sum(upper) % 2 else sign
    return not any(corners.values())


def _overlaps(boxes: Sequence[Box], cut: Sequence[int]) -> Iterator[tuple[Box, Box]]:
    """Pairs that overlap, for the error message: of neighbours, and of as many boxes as are compared quickly."""
    ordered = sorted(boxes, key=lambda box: ([box.offsets[dim] for dim in cut], box.sizes))
    # Neighbours first: where shards overlap, it is mostly neighbours that do.
    pairs = chain(pairwise(ordered), combinations(ordered[:_MAX_COMPARED], 2))
    yield from (pair for pair in pairs if intersection(*pair) is not None)


def _inside(shape: Sequence[int], box: Box) -> bool:
    if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
        return False
    return all(o >= 0 and n >= 0 and o + n <= size for o, n, size in zip(box.offsets, box.sizes, shape, strict=True))


def _largest_gap(box: Box, sizes: Sequence[int]) -> int:
    """Most elements between the end of one contiguous run of `box` and the start of the next."""
    strides = strides_of(sizes)
    gap, run = 0, 1
    for size, stride in zip(reversed(box.sizes), reversed(strides), strict=True):
        if size > 1:
            gap = max(gap, stride - run)
            run = (size - 1) * stride + run
    return gap


def _cut(box: Box, dim: int, start: int, stop: int) -> Box:
    offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
    return Box(offsets, (*box.sizes[:dim], stop - start, *box.sizes[dim + 1 :]))


def _text(box: Box) -> str:
    return f"chunk at {box.offsets} of sizes {box.sizes}"
