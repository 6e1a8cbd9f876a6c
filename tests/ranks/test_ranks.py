import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from ray_stateful.errors import RankFailed, RankTimeout
from ray_stateful.ranks import Outcome, Ranks, on_host
from ray_stateful.testing import RanksHung, run_ranks
from tests.ranks.wrapper_models import group_of_a_device


def fail_on(bad_rank):
    ranks = Ranks.of_world(timeout_s=20)
    outcome = Outcome()
    with outcome.catch():
        if ranks.rank == bad_rank:
            raise OSError("disk full")
    ranks.raise_if_any_failed("write", outcome)


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_one_ranks_failure_is_raised_on_every_rank(bad_rank):
    outcomes = run_ranks(3, fail_on, bad_rank)

    assert [RankFailed] * 3 == [type(outcome) for outcome in outcomes]
    assert all(outcome.causes == {bad_rank: "OSError: disk full"} for outcome in outcomes)


def leave_one_out():
    ranks = Ranks.of_world(timeout_s=1.0)
    if ranks.rank == 0:
        time.sleep(3)  # not synchronisation: this rank is the one that does not come
        return None
    return ranks.all_gather("agree", ranks.rank)


def test_a_rank_that_never_arrives_is_a_timeout_that_names_the_phase_and_the_rank_that_waited():
    outcomes = run_ranks(2, leave_one_out)

    assert type(outcomes[1]) is RankTimeout
    assert (outcomes[1].phase, outcomes[1].rank) == ("agree", 1)


def make_a_group_alone():
    if dist.get_rank() == 1:
        time.sleep(3)  # as above
        return None
    return Ranks.of_world(timeout_s=1.0, purpose="tests")


def test_a_rank_that_never_comes_to_make_the_group_is_a_timeout_that_says_so():
    outcomes = run_ranks(2, make_a_group_alone)

    assert type(outcomes[0]) is RankTimeout
    assert outcomes[0].phase == "make a group for tests"


def pipelines():
    rank, mine = dist.get_rank(), None
    for members in ([0, 2], [1, 3]):
        group = group_of_a_device(members)
        mine = group if rank in members else mine
    # The ends of a pipeline often share a group that the others are not in: here it is one end alone.
    dist.new_group([0])
    found = on_host(mine, timeout_s=20)
    everyones = [None, None]
    dist.all_gather_object(everyones, rank, group=found)
    assert on_host(mine, timeout_s=20) is found
    assert on_host(dist.group.WORLD) is dist.group.WORLD
    return everyones


def test_the_ranks_of_a_group_of_a_device_meet_in_host_memory_whatever_other_groups_they_are_in():
    assert run_ranks(4, pipelines) == [[0, 2], [1, 3]] * 2


def die():
    if dist.get_rank() == 1:
        os._exit(7)
    return torch.ones(1).item()


def test_a_rank_that_dies_is_an_outcome_that_names_its_exit_code():
    outcomes = run_ranks(2, die)

    assert outcomes[0] == 1.0
    assert isinstance(outcomes[1], ChildProcessError)
    assert "7" in str(outcomes[1])


class TakesTwo(Exception):
    def __init__(self, where, what):
        super().__init__(f"{where}: {what}")


def raise_on_one():
    if dist.get_rank() == 1:
        raise TakesTwo("here", "no")
    return "done"


def test_an_exception_that_can_not_be_read_back_costs_no_other_outcome_and_keeps_its_words():
    first, second = run_ranks(2, raise_on_one)
    assert first == "done"
    assert "here: no" in str(second)
    # Exceptions have notes from 3.11 on.
    assert sys.version_info < (3, 11) or any("raise_on_one" in note for note in second.__notes__)


def hang_in(rank):
    if dist.get_rank() == rank:
        time.sleep(60)  # longer than the deadline of the test


def test_a_hung_rank_becomes_a_stack_trace():
    with pytest.raises(RanksHung, match="hang_in"):
        run_ranks(2, hang_in, 1, timeout_s=10)


def all_collectives():
    ranks = Ranks.of_world(timeout_s=20)
    return (
        ranks.broadcast("b", f"from {ranks.rank}"),
        ranks.gather("g", ranks.rank),
        ranks.all_gather("a", ranks.rank * 10),
        ranks.scatter("s", [f"to {r}" for r in range(ranks.world_size)]),
        ranks.all_gather_ints("i", [ranks.rank, -1]),
    )


def test_collectives_give_every_rank_its_part():
    first, second = run_ranks(2, all_collectives)

    assert first == ("from 0", [0, 1], [0, 10], "to 0", [[0, -1], [1, -1]])
    assert second == ("from 0", [], [0, 10], "to 1", [[0, -1], [1, -1]])


def groups_of_our_own():
    first, again = Ranks.of_world(timeout_s=20), Ranks.of_world(timeout_s=20)
    other = Ranks.of_world(timeout_s=20, purpose="background")
    dist.barrier()  # a rank that ended here would take the other's connections with it while it still makes them
    found = (
        dist.get_backend(first.group),
        first.group is again.group,
        first.group is other.group,
        first.group is dist.group.WORLD,
    )
    store = dist.PrefixStore("another", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=first.rank, world_size=2)
    anew = Ranks.of_world(timeout_s=20)
    return *found, anew.group is first.group, anew.all_gather("meet in it", anew.rank)


def test_the_group_is_a_cpu_group_of_our_own_made_once_for_each_purpose_and_anew_with_another_default_group():
    assert run_ranks(2, groups_of_our_own) == [("gloo", True, False, False, False, [0, 1])] * 2
