"""Who writes what, of plans alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ray_stateful.storage.assignment import SMALL_BYTES, deal, leave, left_out, without
from ray_stateful.storage.planner import BalancedSavePlanner

names = st.sets(st.text(max_size=3), max_size=12)


def plan_of(keys):
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in sorted(keys)]
    return SavePlan(items, planner_data={key: (key,) for key in keys})


def keys_of(plan):
    return [item.index.fqn for item in plan.items]


@given(names, st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=12), st.lists(names, min_size=1))
def test_what_all_ranks_have_stays_with_one_of_them_and_what_one_has_stays_with_it(tensors, values, own):
    tensors -= values.keys()
    shared = tensors | values.keys()
    own = [keys - shared for keys in own]
    writers = deal(tensors, values, len(own))
    plans = [leave(plan_of(keys | shared), writers, rank) for rank, keys in enumerate(own)]

    assert sorted(key for plan in plans for key in keys_of(plan) if key in shared) == sorted(shared)
    assert [{key for key in keys_of(plan) if key not in shared} for plan in plans] == own
    # Where an entry's path is not known, no reader finds it.
    assert all(plan.planner_data.keys() == set(keys_of(plan)) for plan in plans)


def test_values_are_spread_over_the_ranks_by_their_length_and_small_tensors_lie_together():
    values = {f"v{number}": "x" * (10_000 if number % 4 == 0 else 1) for number in range(400)}
    writers = deal([f"t{number}" for number in range(900)], values, 4)

    lengths = [sum(len(text) for key, text in values.items() if writers[key] == rank) for rank in range(4)]
    assert max(lengths) - min(lengths) <= 10_000
    # One rank reads them for all on a restore, with a request for each file that has some.
    assert {writers[f"t{number}"] for number in range(900)} == {3}
    assert set(deal([f"t{number}" for number in range(9000)], {}, 4).values()) == {0, 1, 2, 3}


def test_what_is_not_planned_here_is_not_dealt_out():
    with pytest.raises(AssertionError):
        leave(plan_of({"a"}), deal([], {"a": "", "b": ""}, 1), 0)


def test_only_small_plain_tensors_are_dealt_out():
    planner = BalancedSavePlanner()
    limit = SMALL_BYTES // 4
    planner.set_up_planner(
        {"part": {"small": torch.zeros(limit), "large": torch.zeros(limit + 1), "rank_0": {"own": torch.zeros(1)}}}
    )
    assert planner.shared_tensors().keys() == {"part.small"}


@given(names, st.data())
def test_a_final_plan_is_made_again_of_what_it_leaves_out(keys, data):
    plan = plan_of(keys)
    final = SavePlan([item for item in plan.items if data.draw(st.booleans())])
    positions = left_out(plan, final)
    assert [id(item) for item in without(plan, positions).items] == [id(item) for item in final.items]
    assert len(positions) == len(plan.items) - len(final.items)


def test_a_final_plan_has_the_very_items_of_a_ranks_own_and_no_other_is_taken_for_one():
    planners = [BalancedSavePlanner(), BalancedSavePlanner()]
    for planner in planners:
        planner.set_up_planner({"part": {"t": torch.zeros(3), "u": torch.zeros(2000), "n": 1}})
    plans = [planner.create_local_plan() for planner in planners]
    finals, _ = planners[0].create_global_plan(plans)

    left = [left_out(*pair) for pair in zip(plans, finals, strict=True)]
    assert sum(map(len, left)) == 3
    with pytest.raises(AssertionError):
        left_out(plans[0], finals[1])
