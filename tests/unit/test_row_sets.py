"""Sets of row ids: compact where rows are in order, exact everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_stateful.states.row_sets import RowSet, as_ids

SMALL, LARGE = np.iinfo(np.int64).min, np.iinfo(np.int64).max
# Close together, so that ranges touch; and the ends of what an integer can be.
IDS = st.lists(st.integers(-20, 20) | st.sampled_from([SMALL, SMALL + 1, LARGE - 1, LARGE]), unique=True)


def rows(ids):
    return RowSet.of(np.array(ids, np.int64))


@given(IDS, st.integers(1, 5))
def test_a_union_of_sets_holds_their_ids_and_no_other(ids, parts):
    union = RowSet.disjoint_union([rows(ids[part::parts]) for part in range(parts)])

    asked = np.array([*range(-22, 23), SMALL, SMALL + 1, SMALL + 2, LARGE - 2, LARGE - 1, LARGE], np.int64)
    assert union.contains(asked).tolist() == [each in ids for each in asked.tolist()]
    # Between two ranges there is a gap, or they would be one.
    ends, beginnings = union.last[:-1].tolist(), union.first[1:].tolist()
    assert all(after - 1 > before for before, after in zip(ends, beginnings, strict=True))


def test_rows_in_order_take_no_more_room_however_many_they_are():
    halves = [rows(range(0, 1000, 2)), rows(range(1, 1000, 2))]

    assert len(halves[0]) == len(halves[0].first) == 500
    union = RowSet.disjoint_union(halves)
    assert (union.first.tolist(), union.last.tolist(), len(union)) == ([0], [999], 1000)


@pytest.mark.parametrize("sets", [[[3, 3]], [[1, 2, 3], [3]], [[0, 1, 2], [1]]])
def test_an_id_that_occurs_twice_is_named(sets):
    with pytest.raises(ValueError, match=r"row id [13] was trained twice"):
        RowSet.disjoint_union([rows(ids) for ids in sets])


def test_hashes_of_64_bits_stay_different():
    hashes = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)

    trained = RowSet.of(as_ids(hashes))
    assert (trained.first.tolist(), trained.last.tolist()) == ([SMALL, -1, LARGE], [SMALL, 0, LARGE])
    assert trained.contains(as_ids(hashes)).all()


@pytest.mark.parametrize("values", [np.array(["a"]), np.array([1.5]), np.array([[1, 2]])])
def test_what_is_no_integer_a_row_is_refused(values):
    with pytest.raises(ValueError, match="not one integer for each row"):
        as_ids(values)
