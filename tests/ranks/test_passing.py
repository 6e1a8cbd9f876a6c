"""A change of the number of workers: what several ranks want pieces of is read once, and passed on, bit for bit."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ray_stateful import RandomState, checkpoint, restore_cost
from ray_stateful.errors import NoIntactCheckpoint, RankFailed
from ray_stateful.ranks import Ranks
from ray_stateful.runs import DirectoryRun
from ray_stateful.states.part import Reconciled, StrictPart
from ray_stateful.storage import dealing, opening, passing
from ray_stateful.storage.local import LocalStorage
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage, Flip, run_ranks

# Sizes that divide by no number of ranks, a dtype that numpy lacks, a rank without rows, an empty one.
SHAPES = {f"layers.{n}.weight": (61 + n, 40) for n in range(40)}
SHAPES |= {f"layers.{n}.bias": (61 + n,) for n in range(40)} | {"row": (1, 8), "none": (0, 3), "three": (12, 5, 7)}


def whole(name):
    values = torch.arange(float(torch.Size(SHAPES[name]).numel())).reshape(SHAPES[name]) + len(name)
    return values.bfloat16() if name.endswith("bias") else values


class Placed(StrictPart):
    """The tensors of SHAPES, placed over a mesh of all ranks."""

    def __init__(self, placements, filled=False, mesh_shape=None):
        mesh = init_device_mesh("cpu", mesh_shape or (dist.get_world_size(),))
        self.tensors = {"step": torch.tensor(7.0 if filled else 0.0)}
        for name in SHAPES:
            value = whole(name) if filled else torch.zeros_like(whole(name))
            here = placements if value.dim() > 1 else [Replicate() if p == Shard(1) else p for p in placements]
            self.tensors[name] = distribute_tensor(value, mesh, here)

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, state_dict):
        pass

    def reconcile(self, missing, unexpected):
        return Reconciled(problems=tuple(sorted(missing | unexpected)))

    def is_right(self):
        found = {name: tensor.full_tensor() for name, tensor in self.tensors.items() if name != "step"}
        return self.tensors["step"] == 7.0 and all(torch.equal(found[name], whole(name)) for name in SHAPES)


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
    state = {"first": Placed(placements, True), "second": Placed(placements, True), "random": RandomState()}
    checkpoint.save(state, step=1, run=run, timeout_s=30)


def restore(run, placements, mesh_shape, small_windows):
    if small_windows:
        dealing._WINDOW_BYTES, dealing._LEAST_WINDOW_BYTES, dealing._FETCH_BYTES = 60_000, 1_000, 10_000
    state = {name: Placed(placements, mesh_shape=mesh_shape) for name in ("first", "second")}
    counting, sent = Counting(), []

    def send(answers, num_bytes, ranks):
        sent.append(sum(num_bytes))
        return send_(answers, num_bytes, ranks)

    send_ = passing._send
    with patch.object(passing, "_send", send):
        path = resolve(run)[1]
        report = checkpoint.restore(
            {**state, "random": RandomState()}, run=DirectoryRun(counting, path, run), timeout_s=30
        )
    # Once more, from right to right: what is passed on must not depend on what was there.
    right = all(part.is_right() for part in state.values())
    return right, counting.asked, report.statistics, sent


def check(outcomes):
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


BYTES = 2 * sum(whole(name).nbytes for name in SHAPES)

WORLDS = [
    (4, [Shard(0)], 3, [Shard(0)], None),
    (4, [Shard(0)], 2, [Shard(0)], None),
    (1, [Shard(0)], 4, [Shard(0)], None),
    (3, [Shard(0)], 4, [Shard(1)], None),
    (2, [Shard(1)], 3, [Shard(0)], None),
    (3, [Shard(0)], 4, [Replicate(), Shard(0)], (2, 2)),
]


@pytest.mark.parametrize(("saved", "before", "now", "after", "mesh_shape"), WORLDS)
def test_another_number_of_workers_reads_every_byte_once_in_few_requests(
    tmp_path, saved, before, now, after, mesh_shape
):
    run = str(tmp_path)
    check(run_ranks(saved, save, run, before))

    outcomes = check(run_ranks(now, restore, run, after, mesh_shape, False))

    assert all(right for right, *_ in outcomes)
    asked = [one for _, of_rank, *_ in outcomes for one in of_rank]
    statistics = outcomes[0][2]
    assert sum(stop - start for _, start, stop in asked) == statistics.bytes_read
    assert len(asked) == statistics.num_requests
    # Of each file, for each of three parts: 2 files a rank. Without passing on there would be hundreds.
    assert len(asked) <= 3 * 2 * saved + 2 * now
    # No byte of a file twice, but for the blocks where one reader's run ends, and a gap between two parts.
    for file in {path for path, *_ in asked}:
        spans = sorted((start, stop) for path, start, stop in asked if path == file)
        twice = sum(max(0, min(one[1], other[1]) - other[0]) for one, other in pairwise(spans))
        assert twice <= 1024 * 3 * now + ReadLimits().max_gap_bytes
    assert statistics.bytes_wanted >= BYTES


@pytest.mark.parametrize(("saved", "before", "now", "after", "mesh_shape"), WORLDS[:1] + WORLDS[3:4])
def test_what_is_larger_than_a_window_is_passed_on_window_by_window(tmp_path, saved, before, now, after, mesh_shape):
    run = str(tmp_path)
    check(run_ranks(saved, save, run, before))

    outcomes = check(run_ranks(now, restore, run, after, mesh_shape, True))

    assert all(right for right, *_ in outcomes)
    for *_, sent in outcomes:
        # As many on every rank, or one would wait; and no more at a time than there is memory for.
        assert len(sent) == len(outcomes[0][-1]) > 3
        assert max(sent) <= 60_000


def restore_damaged(run, faults_of_case):
    placements, found = [Shard(0)], []
    for faults in faults_of_case:
        storage = FaultyStorage(LocalStorage(), faults)
        part = Placed(placements)
        try:
            checkpoint.restore({"first": part}, run=DirectoryRun(storage, resolve(run)[1], run), timeout_s=30)
            found.append("restored" if part.is_right() else "wrong")
        except (NoIntactCheckpoint, RankFailed) as error:
            found.append((type(error), str(error)))
    return found


def test_damage_and_failure_at_one_reader_are_told_to_every_rank(tmp_path):
    run = str(tmp_path)
    check(run_ranks(4, save, run, [Shard(0)]))
    cases = [
        # What rank 1 reads of the first layer, it reads for rank 0 or 2 as well.
        [Flip("read", path="__", rank=1, num_times=None, byte=3000)],
        [Fail("read", path="__", rank=2, num_times=None, error=PermissionError("denied"))],
        [],
    ]
    outcomes = check(run_ranks(3, restore_damaged, run, cases))

    for damaged, failed, whole_again in outcomes:
        assert damaged[0] is NoIntactCheckpoint
        assert "is not what was written" in damaged[1]
        assert failed[0] is RankFailed
        assert "rank 2" in failed[1]
        assert whole_again == "restored"
    assert len({str(outcome) for outcome in outcomes}) == 1


def count_meetings(run):
    state = {"first": Placed([Shard(0)])}
    with patch.object(Ranks, "within_deadline", autospec=True, side_effect=Ranks.within_deadline) as meetings:
        checkpoint.restore(state, run=run, timeout_s=30)
    return [call.args[1] for call in meetings.call_args_list]


def test_passing_on_takes_four_meetings_and_one_more_for_each_window(tmp_path):
    run = str(tmp_path)
    check(run_ranks(2, save, run, [Shard(0)]))
    as_many, others = run_ranks(2, count_meetings, run)[0], run_ranks(3, count_meetings, run)[0]

    at = as_many.index("read")
    # Once to say how much, once to say what; a window; and to hear that it was the last, and whole.
    assert others == [*as_many[:at], "ask for pieces", "ask for pieces", "read", "send what was read", *as_many[at:]]


def test_the_plan_counts_the_very_requests_that_a_restore_on_another_number_of_workers_makes(tmp_path):
    run = str(tmp_path)
    check(run_ranks(4, save, run, [Shard(0)]))
    storage, path = resolve(f"{run}/{next(iter(DirectoryRun(*resolve(run), run).candidates()))}")

    costs = restore_cost.costs(opening.parse(opening.fetch(storage, path)), 3, ReadLimits())

    outcomes = check(run_ranks(3, restore, run, [Shard(0)], None, False))
    for cost, (_, asked, _, _) in zip(costs, outcomes, strict=True):
        assert (cost.bytes_read, cost.num_requests) == (sum(stop - start for _, start, stop in asked), len(asked))
