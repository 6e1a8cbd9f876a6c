"""A change of the number of workers: what several ranks want pieces of is read once, and passed on, bit for bit."""

from functools import cache
from itertools import count, pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from ray_stateful import RandomState, checkpoint, joint_reads, restore_cost
from ray_stateful.errors import NoIntactCheckpoint, RankFailed
from ray_stateful.ranks import Ranks
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import dealing, opening, passing
from ray_stateful.storage.local import LocalStorage
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage, Flip, run_ranks
from tests.ranks.placed import Placed, counted

# Sizes that divide by no number of ranks, a dtype that numpy lacks, a rank without rows, an empty one, and rows so wide
# that their halves are read one by one.
SHAPES = {f"layers.{n}.weight": (61 + n, 40) for n in range(40)}
SHAPES |= {f"layers.{n}.bias": (61 + n,) for n in range(40)}
SHAPES |= {"row": (1, 8), "none": (0, 3), "three": (12, 5, 7), "wide": (9, 12_000)}


VALUES = counted(SHAPES, {name for name in SHAPES if name.endswith("bias")}) | {"step": torch.tensor(7.0)}


def placed(placements, *, filled=False, mesh_shape=None):
    return Placed(VALUES, mesh_shape or (dist.get_world_size(),), placements, filled)


class Counting(LocalStorage):
    """A local disk that notes which bytes of item files were asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def read(self, path, offset=0, size=None):
        if "__" in path:
            self.asked.append((path, offset, offset + size))
        return super().read(path, offset, size)


def save(run, placements):
    state = {
        "first": placed(placements, filled=True),
        "second": placed(placements, filled=True),
        "random": RandomState(),
    }
    checkpoint.save(state, step=1, run=run, timeout_s=30)


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory):
    """The run that so many ranks saved, with their tensors so placed."""

    @cache
    def saved(num_ranks, placement):
        run = str(tmp_path_factory.mktemp("run"))
        check(run_ranks(num_ranks, save, run, [placement]))
        return run

    return saved


def restore(run, placements, mesh_shape, constants):
    vars(dealing).update(constants)
    state = {name: placed(placements, mesh_shape=mesh_shape) for name in ("first", "second")}
    counting, moved, ways = Counting(), [], []

    def all_to_all(phase, received, sent, *args):
        if phase == "send what was read":
            moved.append((len(sent), len(received)))
        exchange(phase, received, sent, *args)

    def read(storage, path, deal, together, *args):
        ways.append(sum(map(len, together.values())))
        return pass_on(storage, path, deal, together, *args)

    def read_alone(storage, path, alone, limits):
        ways.append(sum(map(len, alone.values())))
        return read_requests(storage, path, alone, limits)

    exchange, pass_on, read_requests = passing._all_to_all, passing.read, joint_reads.read_requests
    with (
        patch.object(passing, "_all_to_all", all_to_all),
        patch.object(passing, "read", read),
        patch.object(joint_reads, "read_requests", read_alone),
    ):
        here = DirectoryRun(counting, resolve(run)[1], run)
        report = checkpoint.restore({**state, "random": RandomState()}, run=here, timeout_s=30)
    return all(part.is_right() for part in state.values()), counting.asked, report.statistics, moved, ways


def check(outcomes):
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


BYTES = 2 * sum(value.nbytes for value in VALUES.values())

WORLDS = [
    (4, Shard(0), 3, [Shard(0)], None),
    (4, Shard(0), 2, [Shard(0)], None),
    (1, Shard(0), 4, [Shard(0)], None),
    (3, Shard(0), 4, [Shard(1)], None),
    (2, Shard(1), 3, [Shard(0)], None),
    (3, Shard(0), 4, [Replicate(), Shard(0)], (2, 2)),
]


@pytest.mark.parametrize(("saved", "before", "now", "after", "mesh_shape"), WORLDS)
def test_another_number_of_workers_reads_every_byte_once_in_few_requests(
    saved_by, saved, before, now, after, mesh_shape
):
    run = saved_by(saved, before)

    outcomes = check(run_ranks(now, restore, run, after, mesh_shape, {}))

    assert all(right for right, *_ in outcomes)
    asked = [one for _, of_rank, *_ in outcomes for one in of_rank]
    statistics = outcomes[0][2]
    assert sum(stop - start for _, start, stop in asked) == statistics.bytes_read
    assert len(asked) == statistics.num_requests
    # Of each file, for each of three parts: 2 files a rank. Without passing on there would be hundreds.
    assert len(asked) <= 3 * 2 * saved + 3 * now
    # No byte of a file twice, but for the blocks where one reader's run ends, and a gap between two parts.
    for file in {path for path, *_ in asked}:
        spans = sorted((start, stop) for path, start, stop in asked if path == file)
        twice = sum(max(0, min(one[1], other[1]) - other[0]) for one, other in pairwise(spans))
        assert twice <= 1024 * 3 * now + ReadLimits().max_gap_bytes
    assert statistics.bytes_wanted >= BYTES


SMALL_WINDOWS = {"_WINDOW_BYTES": 60_000, "_LEAST_WINDOW_BYTES": 1_000, "_FETCH_BYTES": 10_000}


@pytest.mark.parametrize(("saved", "before", "now", "after", "mesh_shape"), WORLDS[:1] + WORLDS[3:4])
def test_what_is_larger_than_a_window_is_passed_on_window_by_window(saved_by, saved, before, now, after, mesh_shape):
    run = saved_by(saved, before)

    outcomes = check(run_ranks(now, restore, run, after, mesh_shape, SMALL_WINDOWS))

    assert all(right for right, *_ in outcomes)
    for *_, moved, _ in outcomes:
        # As many on every rank, or one would wait; and no more at a time than there is memory for. The widest row is
        # one piece, of 24 or 48 kB, and may come from each reader at once.
        assert len(moved) == len(outcomes[0][3]) > 3
        assert max(max(sent, received) for sent, received in moved) <= 60_000 + 48_000 * now


def test_long_runs_are_read_by_each_rank_and_short_ones_passed_on_in_one_restore(saved_by):
    run = saved_by(4, Shard(0))

    for right, _, _, moved, ways in check(run_ranks(3, restore, run, [Shard(0)], None, {"_LARGE_BYTES": 3_000})):
        assert right
        assert len(moved) == 1
        # How many pieces in the one way, and in the other.
        assert len(ways) == 2
        assert min(ways) > 0


def restore_damaged(run, cases):
    """What becomes of a restore in each case: faults of the storage, and which window that rank 1 sends is damaged."""
    vars(dealing).update(SMALL_WINDOWS)
    pack, outcomes = passing._packed, []
    for faults, damaged_window in cases:
        windows = count(1)

        def packed(spans, fetched, windows=windows, damaged_window=damaged_window):
            found, num_bytes = pack(spans, fetched)
            if dist.get_rank() == 1 and len(found) and next(windows) == damaged_window:
                found[len(found) // 2] ^= 1
            return found, num_bytes

        part = placed([Shard(0)])
        here = DirectoryRun(FaultyStorage(LocalStorage(), faults), resolve(run)[1], run)
        try:
            with patch.object(passing, "_packed", packed):
                checkpoint.restore({"first": part}, run=here, timeout_s=30)
            outcomes.append(("restored", str(part.is_right())))
        except (NoIntactCheckpoint, RankFailed) as error:
            outcomes.append((type(error).__name__, str(error)))
    return outcomes


def test_whoever_is_sent_a_wrong_byte_finds_it_and_tells_every_rank_in_whichever_window(saved_by):
    outcomes = check(run_ranks(3, restore_damaged, saved_by(4, Shard(0)), [([], 1), ([], 3), ([], None)]))

    assert outcomes == [outcomes[0]] * 3
    *damaged, whole_again = outcomes[0]
    for kind, text in damaged:
        assert kind == "NoIntactCheckpoint"
        assert "is not what was written" in text
        assert "rank 0: " in text or "rank 2: " in text
        assert "rank 1: " not in text
    assert whole_again == ("restored", "True")


def test_a_reader_that_fails_or_reads_damage_is_every_ranks_error_in_whichever_window(saved_by):
    denied = [Fail("read", path="__", rank=2, nth=n, num_times=None, error=PermissionError("denied")) for n in (1, 12)]
    flipped = [Flip("read", path="__", rank=2, nth=n, num_times=None, byte=600) for n in (1, 12)]
    cases = [([fault], None) for fault in (*denied, *flipped)]

    outcomes = check(run_ranks(3, restore_damaged, saved_by(4, Shard(0)), cases))

    assert outcomes == [outcomes[0]] * 3
    assert [kind for kind, _ in outcomes[0]] == ["RankFailed"] * 2 + ["NoIntactCheckpoint"] * 2
    for number, (_, text) in enumerate(outcomes[0]):
        assert ("rank 2: " if number < 2 else "is not what was written") in text


def count_meetings(run, constants):
    vars(dealing).update(constants)
    state = {"first": placed([Shard(0)])}
    with patch.object(Ranks, "within_deadline", autospec=True, side_effect=Ranks.within_deadline) as meetings:
        checkpoint.restore(state, run=run, timeout_s=30)
    return [call.args[1] for call in meetings.call_args_list]


def test_passing_on_takes_four_meetings_and_two_for_each_window(saved_by):
    run = saved_by(2, Shard(0))
    as_many = check(run_ranks(2, count_meetings, run, {}))[0]
    at = as_many.index("read")

    for constants in ({}, SMALL_WINDOWS):
        others = check(run_ranks(3, count_meetings, run, constants))[0]
        # How many readers, how much of each, and what; the windows; and that there is no other, and all was whole.
        num_windows = others.count("send what was read") - as_many.count("send what was read")
        windows = ["read", "send what was read"] * num_windows
        assert others == [*as_many[:at], *["ask for pieces"] * 3, *windows, *as_many[at:]]
        assert num_windows == 1 or constants
    assert num_windows > 3


def test_the_plan_counts_the_very_requests_that_a_restore_on_another_number_of_workers_makes(saved_by):
    run = saved_by(4, Shard(0))
    storage, path = resolve(f"{run}/{next(iter(DirectoryRun(*resolve(run), run).candidates()))}")

    costs = restore_cost.costs(opening.parse(opening.fetch(storage, path)), 3, ReadLimits())

    outcomes = check(run_ranks(3, restore, run, [Shard(0)], None, {}))
    for cost, (_, asked, *_) in zip(costs, outcomes, strict=True):
        assert (cost.bytes_read, cost.num_requests) == (sum(stop - start for _, start, stop in asked), len(asked))
