"""Which rows were trained: a set of integers, kept as the ranges between its gaps.

Pure: neither torch nor ray. Rows read in the order of their ids make few ranges, however many rows there are; ids that
are hashes make one range of 16 bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def as_ids(values: NDArray[Any]) -> Ints:
    """Row ids as 64-bit integers; unsigned ones wrap around, which keeps different ones different.

    Raises:
        ValueError: they are not integers, or not one-dimensional.
    """
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise ValueError(f"the row ids are {values.dtype} of shape {values.shape}, not one integer for each row")
    return values.astype(np.int64, copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """Ranges of row ids: range i holds `first[i]` to `last[i]`, both included. Sorted; there is a gap between any two.

    Both ends are included because a range may end at the largest 64-bit integer.
    """

    first: Ints
    last: Ints

    @classmethod
    def empty(cls) -> RowSet:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def of(cls, ids: Ints) -> RowSet:
        """The set of `ids`. Raises ValueError if an id occurs twice."""
        ordered = np.sort(ids)
        return _joined(ordered, ordered)

    @classmethod
    def disjoint_union(cls, sets: Sequence[RowSet]) -> RowSet:
        """The union of `sets`. Raises ValueError if an id is in two of them."""
        first = np.concatenate([each.first for each in sets])
        last = np.concatenate([each.last for each in sets])
        order = np.argsort(first)
        return _joined(first[order], last[order])

    def __len__(self) -> int:
        return int((self.last - self.first + 1).sum())

    def contains(self, ids: Ints) -> NDArray[np.bool_]:
        """For each id, whether it is in the set."""
        if not len(self.first):
            return np.zeros(len(ids), np.bool_)
        # The last range that begins at or before the id; -1, which indexes the very last one, where there is none.
        at = np.searchsorted(self.first, ids, side="right") - 1
        return (at >= 0) & (ids <= self.last[at])


def _joined(first: Ints, last: Ints) -> RowSet:
    """The set of sorted ranges; those without a gap between them are joined."""
    if not len(first):
        return RowSet.empty()
    again = first[1:] <= last[:-1]
    if again.any():
        raise ValueError(
            f"row id {first[1:][again][0]} was trained twice in one epoch: the ids of the dataset are not unique"
        )
    # `first - 1` can't underflow, as a smaller id precedes it; `last + 1` could overflow.
    gap = first[1:] - 1 != last[:-1]
    return RowSet(first[np.append(True, gap)], last[np.append(gap, True)])
