"""Who writes what, of plans alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ray_stateful.storage.planner import deal, left_out, without

names = st.sets(st.text(max_size=3), max_size=12)


def plan_of(keys):
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in sorted(keys)]
    return SavePlan(items, planner_data={key: (key,) for key in keys})


def keys_of(plan):
    return [item.index.fqn for item in plan.items]


@given(names, st.lists(names, min_size=1, max_size=5))
def test_what_all_ranks_have_stays_with_one_of_them_and_what_one_has_stays_with_it(shared, own):
    own = [keys - shared for keys in own]
    plans = [deal(plan_of(keys | shared), shared, rank, len(own)) for rank, keys in enumerate(own)]

    assert sorted(key for plan in plans for key in keys_of(plan) if key in shared) == sorted(shared)
    assert [{key for key in keys_of(plan) if key not in shared} for plan in plans] == own
    numbers = [sum(key in shared for key in keys_of(plan)) for plan in plans]
    assert max(numbers) - min(numbers) <= 1
    # Where an entry's path is not known, no reader finds it.
    assert all(plan.planner_data.keys() == set(keys_of(plan)) for plan in plans)


def test_what_is_not_planned_here_is_not_dealt_out():
    with pytest.raises(AssertionError):
        deal(plan_of({"a"}), {"a", "b"}, 0, 1)


@given(names, st.data())
def test_a_final_plan_is_made_again_of_what_it_leaves_out(keys, data):
    plan = plan_of(keys)
    final = SavePlan([item for item in plan.items if data.draw(st.booleans())])
    positions = left_out(plan, final)
    assert [id(item) for item in without(plan, positions).items] == [id(item) for item in final.items]
    assert len(positions) == len(plan.items) - len(final.items)
