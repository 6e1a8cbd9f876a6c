"""The fault matrix: phase by rank. Every rank raises, nothing is committed, and the next save succeeds."""

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from ray_stateful import Checkpointer, checkpoint
from ray_stateful.errors import (
    CheckpointError,
    NoIntactCheckpoint,
    RankFailed,
    ReportFailed,
    SaveFailed,
    StateMismatch,
    UnevenSteps,
    UnsupportedState,
)
from ray_stateful.runs import DirectoryRun
from ray_stateful.states.part import Reconciled, StrictPart
from ray_stateful.states.random import RandomState
from ray_stateful.storage.base import Storage
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage, Flip, Truncate, run_ranks
from tests.part import Part

WORLD = 3


class Shards(StrictPart):
    """A tensor sharded over all ranks, and one value."""

    def __init__(self, fill, rows=3000, dtype=torch.float32):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.tensor = distribute_tensor(torch.full((rows, 4), float(fill), dtype=dtype), mesh, [Shard(0)])
        self.value = fill

    def state_dict(self):
        return {"tensor": self.tensor, "value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]

    def reconcile(self, missing, unexpected):
        return Reconciled(problems=tuple(f"{key}: on one side only" for key in sorted(missing | unexpected)))

    def holds(self, fill):
        return self.value == fill and bool((self.tensor.to_local() == fill).all())


class BadPart(Shards):
    """Cannot say what its state is, on one rank."""

    def __init__(self, bad_rank):
        super().__init__(0)
        self.bad_rank = bad_rank

    def state_dict(self):
        if dist.get_rank() == self.bad_rank:
            raise RuntimeError("this rank has lost its state")
        return super().state_dict()


@dataclass
class FailingRun:
    """A directory, and somebody to report to who does not answer one rank."""

    storage: Storage
    path: str
    uri: str
    bad_rank: int
    phase: str
    reports: list = field(default_factory=list)

    def prepare_report(self, metrics):
        if self.phase == "prepare report" and dist.get_rank() == self.bad_rank:
            raise ValueError("metric 'loss' is an object")
        return metrics

    def report(self, prepared, name):
        if self.phase == "report" and dist.get_rank() == self.bad_rank:
            raise RuntimeError("the controller is gone")
        self.reports.append(name)

    def candidates(self):
        return DirectoryRun(self.storage, self.path, self.uri).candidates()

    def never_reported(self, name):
        return False

    def tracked(self):
        return None


FAULTS = {
    "write": Fail("sink.write", error=OSError(28, "No space left on device")),
    "publish": Fail("publish", error=OSError(5, "Input/output error")),
    "commit": Fail("write", path="index", error=PermissionError(13, "denied")),
    "manifest": Fail("write", path="manifest.json", error=PermissionError(13, "denied")),
}


def save_with_fault(root, phase, bad_rank):
    storage = resolve(root)[0].inner
    faults = [FAULTS[phase]] if phase in FAULTS and dist.get_rank() == bad_rank else []
    run = FailingRun(FaultyStorage(storage, faults), root, root, bad_rank, phase)
    part = BadPart(bad_rank) if phase == "plan" else Shards(1)
    try:
        checkpoint.save({"part": part}, step=1, run=run, timeout_s=20)
        first = None
    except (SaveFailed, ReportFailed) as error:
        first = error
    committed, left = list(DirectoryRun(storage, root, root).candidates()), storage.directories(root)
    run.phase, run.storage = "", storage
    second = checkpoint.save({"part": Shards(2)}, step=2, run=run, timeout_s=20)
    fresh = Shards(0)
    checkpoint.restore({"part": fresh}, run=run, timeout_s=20)
    return first, committed, second.name, run.reports, fresh.holds(2), left


# The commit is made on rank 0 alone: there is no other rank whose commit could fail.
MATRIX = [(phase, rank) for phase in ("plan", "prepare report", "write", "publish", "report") for rank in range(WORLD)]
MATRIX += [("commit", 0), ("manifest", 0)]


def save_with_every_fault(root):
    return [save_with_fault(f"{root}/{phase.replace(' ', '_')}_{rank}", phase, rank) for phase, rank in MATRIX]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    found = run_ranks(WORLD, save_with_every_fault, str(tmp_path_factory.mktemp("faults")), timeout_s=150)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return {case: [found[rank][n] for rank in range(WORLD)] for n, case in enumerate(MATRIX)}


@pytest.mark.parametrize(("phase", "bad_rank"), MATRIX)
def test_failed_save_raises_on_every_rank_commits_nothing_and_the_next_one_succeeds(outcomes, phase, bad_rank):
    errors = [error for error, *_ in outcomes[phase, bad_rank]]

    expected = ReportFailed if phase == "report" else SaveFailed
    assert [expected] * WORLD == [type(error) for error in errors]
    assert all(list(error.causes) == [bad_rank] for error in errors)
    for _, committed, second, reports, restored, _ in outcomes[phase, bad_rank]:
        # Whole and committed is what a failed report leaves behind; every other failure leaves nothing.
        assert len(committed) == (1 if phase == "report" else 0)
        assert reports[-1] == second
        assert restored


def test_a_failed_save_leaves_no_files_unless_it_may_have_been_committed(outcomes):
    # As rank 0 finds it, which deletes: files that stay where a disk was full would keep it full.
    left = {case: len(of_ranks[0][-1]) for case, of_ranks in outcomes.items()}
    assert left == {(phase, rank): int(phase in ("manifest", "report")) for phase, rank in outcomes}


def test_no_rank_reports_a_checkpoint_that_failed(outcomes):
    for (phase, bad_rank), of_ranks in outcomes.items():
        reported = {rank: len(reports) for rank, (_, _, _, reports, *_) in enumerate(of_ranks)}
        others = 2 if phase == "report" else 1
        assert reported == {rank: 1 if rank == bad_rank else others for rank in range(WORLD)}, phase


def damaged_reads(root):
    """Rank 1 alone meets damage in the newest checkpoint, of three kinds; all ranks must take the older one."""
    storage = resolve(root)[0].inner
    run = DirectoryRun(storage, root, root)
    for step in (1, 2):
        checkpoint.save({"part": Shards(step)}, step=step, run=run, timeout_s=20)
    newest = next(iter(run.candidates()))
    results = []
    for fault in (
        Flip("read", path=f"{newest}/__", rank=1, byte=100),
        Truncate("read", path=f"{newest}/__", rank=1, keep_bytes=10),
        Fail("read", path=f"{newest}/__", rank=1, error=FileNotFoundError(2, "gone")),
    ):
        fresh = Shards(0)
        faulty = DirectoryRun(FaultyStorage(storage, [fault]), root, root)
        report = checkpoint.restore({"part": fresh}, run=faulty, timeout_s=20)
        results.append((report.step, fresh.holds(1), list(report.rejected), next(iter(report.rejected.values()))))
    denied = FaultyStorage(storage, [Fail("read", path="__", rank=1, num_times=None, error=PermissionError(13, "no"))])
    flipped = FaultyStorage(storage, [Flip("read", path="__", rank=1, num_times=None)])
    for faulty in (denied, flipped):
        try:
            results.append(checkpoint.restore({"part": Shards(0)}, run=DirectoryRun(faulty, root, root), timeout_s=20))
        except (RankFailed, NoIntactCheckpoint) as error:
            results.append(error)
    for wrong in (Shards(0, rows=2999), Shards(0, dtype=torch.float64)):
        try:
            results.append(checkpoint.restore({"part": wrong, "more": Shards(0)}, run=run, timeout_s=20))
        except StateMismatch as error:
            results.append((error, wrong.holds(0)))
    return results


def test_damage_that_one_rank_meets_makes_all_ranks_take_the_older_checkpoint_and_say_so(tmp_path):
    outcomes = run_ranks(WORLD, damaged_reads, str(tmp_path))

    for outcome in outcomes:
        for step, holds, rejected, why in outcome[:3]:
            assert (step, holds) == (1, True)
            assert rejected[0].startswith("checkpoint_s0000000002")
            assert "rank 1" in why
        denied, nothing_left, misshapen, mistyped = outcome[3:]
        # Being locked out is not damage: going back to an older checkpoint would cost steps for nothing.
        assert isinstance(denied, RankFailed)
        assert isinstance(nothing_left, NoIntactCheckpoint)
        assert len(nothing_left.rejected) == 2
        for (error, untouched), named in ((misshapen, "2999"), (mistyped, "float64")):
            assert isinstance(error, StateMismatch)
            assert named in str(error)
            assert "no such part" in str(error)
            assert untouched


def with_streams(fill):
    """The tensors are filled in place; the streams are one for each rank, so that each size has keys of its own."""
    return {"part": Shards(fill), "random": RandomState()}


def save_with_streams(root, step):
    checkpoint.save(with_streams(step), step=step, run=root, timeout_s=20)


def restore_past_damage(root):
    storage = resolve(root)[0].inner
    newest = next(iter(DirectoryRun(storage, root, root).candidates()))
    flipped = FaultyStorage(storage, [Flip("read", path=f"{newest}/__", num_times=None, byte=100)])
    fresh = with_streams(0)
    report = checkpoint.restore(fresh, run=DirectoryRun(flipped, root, root), timeout_s=20)
    return report.step, len(report.rejected), fresh["part"].holds(1)


@pytest.mark.parametrize(("older", "newer"), [(1, 2), (2, 1)])
def test_an_intact_checkpoint_of_a_different_number_of_ranks_is_taken_after_a_damaged_one(tmp_path, older, newer):
    for step, size in ((1, older), (2, newer)):
        assert run_ranks(size, save_with_streams, str(tmp_path), step) == [None] * size

    assert run_ranks(2, restore_past_damage, str(tmp_path)) == [(1, 1, True)] * 2


def interleaved(root):
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(8.0)
    as_fsdp_and_tp = [_StridedShard(0, split_factor=2), Shard(0)]
    saved = Part({"w": distribute_tensor(whole, mesh, as_fsdp_and_tp)})
    checkpoint.save({"part": saved}, step=1, run=root, timeout_s=20)
    found = []
    for placements in (
        as_fsdp_and_tp,
        [Shard(0), _StridedShard(0, split_factor=2)],
        [_StridedShard(0, split_factor=2)] * 2,
    ):
        fresh = Part({"w": distribute_tensor(torch.zeros(8), mesh, placements)})
        try:
            checkpoint.restore({"part": fresh}, run=root, timeout_s=20)
            expected = distribute_tensor(whole, mesh, placements).to_local()
            found.append(torch.equal(fresh.value["w"].to_local(), expected))
        except RankFailed as error:
            found.append(("part.w" in str(error), "not contiguous" in str(error)))
        try:
            checkpoint.save({"part": fresh}, step=2, run=root, timeout_s=20)
        except SaveFailed as error:
            found.append(("part.w" in str(error), "not contiguous" in str(error)))
    return found


def test_a_tensor_whose_shards_are_not_contiguous_is_refused_by_key_instead_of_being_read_from_a_wrong_place(tmp_path):
    assert run_ranks(4, interleaved, str(tmp_path)) == [[True, *[(True, True)] * 4]] * 4


def one_value_each(root):
    """What is refused of saves in which the ranks differ: in the first one, and once the structure is known."""
    rank, part, refused = dist.get_rank(), Part(), []
    saver = Checkpointer({"part": part}, run=root, timeout_s=20)
    same = {"seen": 0, "of": {"n": 1}, "t": torch.zeros(1)}
    other = OrderedDict(n=1) if rank else {"n": 1}
    for value in ({**same, "seen": rank}, same, {**same, "seen": rank}, {**same, "of": other}):
        part.value, saver.step_count = value, saver.step_count + 1
        try:
            saver.save()
        except SaveFailed as error:
            refused.append((saver.step_count, re.findall(r"part\.\w+", str(error))[0]))
    return refused


def test_a_value_that_differs_between_ranks_is_refused_by_name_instead_of_keeping_one_copy(tmp_path):
    # The last two dicts have the same entries, and differ in their kind.
    assert run_ranks(2, one_value_each, str(tmp_path)) == [[(1, "part.seen"), (3, "part.seen"), (4, "part.of")]] * 2
    (committed,) = tmp_path.iterdir()
    assert committed.name.startswith("checkpoint_s0000000002_")


UNLIKE = {
    "a shape": lambda rank: {"seen": torch.zeros(3 + rank)},
    "a number of dims": lambda rank: {"seen": torch.zeros([2] * (1 + rank))},
    "a dtype": lambda rank: {"seen": torch.zeros(2, dtype=[torch.float64, torch.float16][rank])},
    "a large tensor's dtype": lambda rank: {"seen": torch.zeros(9000, dtype=[torch.float64, torch.float16][rank])},
    "a shard's shape": lambda rank: {
        "seen": DTensor.from_local(
            torch.zeros(2 + 2 * rank, 2),
            init_device_mesh("cpu", (2,)),
            [Shard(0)],
            shape=(4 + 4 * rank, 2),
            stride=(2, 1),
        )
    },
    "a tensor and none": lambda rank: {"seen": torch.zeros(2) if rank else 5, "t": torch.zeros(1)},
    "a list's length": lambda rank: {"seen": [torch.zeros(9000)] * (1 + rank)},
    "a list's length, in small": lambda rank: {"seen": [torch.zeros(1), *[None] * rank]},
}


def save_unlike(root):
    errors = {}
    for name, value_on in UNLIKE.items():
        try:
            checkpoint.save({"part": Part(value_on(dist.get_rank()))}, step=1, run=root, timeout_s=20)
        except CheckpointError as error:
            errors[name] = error
    return errors


def test_one_key_for_different_things_on_two_ranks_is_refused_by_name_and_nothing_is_written(tmp_path):
    for errors in run_ranks(2, save_unlike, str(tmp_path)):
        assert errors.keys() == UNLIKE.keys()
        for name, error in errors.items():
            assert type(error) is SaveFailed
            assert "UnsupportedState: part.seen: " in str(error), name
            assert "on rank 0 and" in str(error), name
    assert list(Path(tmp_path).iterdir()) == []


def save_alike(root):
    """What some ranks have and others have not, or less of: under names of their own."""
    rank = dist.get_rank()
    value = {
        "all": [torch.zeros(1), 3, torch.zeros(9000)],
        "some": {"t": torch.ones(2)} if rank else {},
        "own": {f"r{rank}": torch.ones(1)},
    }
    checkpoint.save({"part": Part(value)}, step=1, run=root, timeout_s=20)
    fresh = Part()
    checkpoint.restore({"part": fresh}, run=root, timeout_s=20)
    return len(fresh.value["all"]), len(fresh.value["some"]), sorted(fresh.value["own"])


def test_what_only_some_ranks_have_is_no_difference(tmp_path):
    assert run_ranks(2, save_alike, str(tmp_path)) == [(3, 1, ["r0", "r1"])] * 2


def save_different_steps(root):
    checkpoint.save({"part": Shards(1)}, step=7 + dist.get_rank(), run=root, timeout_s=20)


def test_a_save_of_different_steps_is_an_error_with_both_numbers_on_every_rank(tmp_path):
    outcomes = run_ranks(2, save_different_steps, str(tmp_path))

    assert [UnevenSteps] * 2 == [type(outcome) for outcome in outcomes]
    assert all("rank 0 at step 7, rank 1 at step 8" in str(outcome) for outcome in outcomes)
    assert list(Path(tmp_path).iterdir()) == []


def one_rank_has_no_state(root):
    results = []
    whole = Shards(1)
    part = whole if dist.get_rank() == 0 else 3
    for act in (
        lambda: checkpoint.save({"part": part}, step=1, run=root, timeout_s=20),
        lambda: checkpoint.restore({"part": part}, run=root, timeout_s=20),
        lambda: checkpoint.save({"part": whole}, step=-dist.get_rank(), run=root, timeout_s=20),
    ):
        try:
            act()
        except (CheckpointError, ValueError) as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def test_what_one_rank_alone_refuses_is_an_error_on_every_rank_and_nobody_waits(tmp_path):
    fine, bad = run_ranks(2, one_rank_has_no_state, str(tmp_path))

    assert [text.partition(":")[0] for text in bad] == ["UnsupportedState", "UnsupportedState", "ValueError"]
    assert "an object of type int, which has no state_dict()" in bad[0]
    assert [text.partition(" can't")[0] for text in fine] == ["UnsupportedState: the state: what ranks [1] gave"] * 3
    assert list(Path(tmp_path).iterdir()) == []


class Meeting(Shards):
    """Meets the other ranks when it is asked for its state, and when it is given it back."""

    def state_dict(self):
        dist.barrier()
        return super().state_dict()

    def load_state_dict(self, state_dict):
        dist.barrier()
        super().load_state_dict(state_dict)


class BadLoader(Shards):
    def load_state_dict(self, state_dict):
        if dist.get_rank() == 1:
            raise RuntimeError("this rank can't take it")


def one_part_fails_and_the_next_one_meets(root):
    results = []
    for state, act in (
        ({"a": BadPart(1), "b": Meeting(1)}, lambda state: checkpoint.save(state, step=1, run=root, timeout_s=20)),
        ({"a": Shards(1), "b": Meeting(1)}, lambda state: checkpoint.save(state, step=2, run=root, timeout_s=20)),
        ({"a": BadLoader(0), "b": Meeting(0)}, lambda state: checkpoint.restore(state, run=root, timeout_s=20)),
        ({"a": BadPart(1), "b": Meeting(0)}, lambda state: checkpoint.restore(state, run=root, timeout_s=20)),
        (
            {f"of_rank_{dist.get_rank()}": Shards(1)},
            lambda state: checkpoint.save(state, step=3, run=root, timeout_s=20),
        ),
    ):
        try:
            act(state)
            results.append(None)
        except CheckpointError as error:
            results.append(type(error))
    return results


def test_a_rank_whose_part_fails_still_meets_the_others_in_the_next_part(tmp_path):
    outcomes = run_ranks(2, one_part_fails_and_the_next_one_meets, str(tmp_path), timeout_s=60)

    assert outcomes == [[SaveFailed, None, RankFailed, RankFailed, UnsupportedState]] * 2


def save_elsewhere(root):
    checkpoint.save({"part": Shards(1)}, step=1, run=f"{root}/{dist.get_rank() % 2}", timeout_s=20)


def test_ranks_that_save_to_different_places_are_told_so_and_commit_nothing(tmp_path):
    outcomes = run_ranks(WORLD, save_elsewhere, str(tmp_path))

    assert [SaveFailed] * WORLD == [type(outcome) for outcome in outcomes]
    assert all("rank 1: its run is elsewhere than rank 0's" in str(outcome) for outcome in outcomes)
    assert list(tmp_path.rglob("manifest.json")) == []


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_through_two_mounts(root):
    run = f"{root}/{'directory' if dist.get_rank() == 0 else 'mounted'}"
    checkpoint.save({"part": Shards(1)}, step=1, run=run, timeout_s=20)
    fresh = Shards(0)
    checkpoint.restore({"part": fresh}, run=run, timeout_s=20)
    return fresh.holds(1)


def test_ranks_may_have_one_directory_at_different_paths(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "mounted").symlink_to(tmp_path / "directory")

    assert run_ranks(2, save_through_two_mounts, str(tmp_path)) == [True, True]


def save_a_bare_optimizer(path):
    model = torch.nn.Linear(4, 4)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save({"optimizer": optimizer}, step=1, run=path, timeout_s=20)


def test_a_bare_optimizer_of_sharded_parameters_is_refused_when_it_is_saved_not_when_it_is_missed(tmp_path):
    outcomes = run_ranks(2, save_a_bare_optimizer, str(tmp_path))

    assert [SaveFailed] * 2 == [type(outcome) for outcome in outcomes]
    assert all("wrap it: OptimizerState(model, optimizer)" in str(outcome) for outcome in outcomes)


def restore_a_bare_optimizer(path):
    """What an earlier version saved of a bare optimizer, into one that has made a step."""
    saved, fresh = container_of_a_sharded_model(), container_of_a_sharded_model()
    for number, one in enumerate((saved, fresh), start=1):
        for parameter in one.model.parameters():
            parameter.grad = torch.full_like(parameter, number)
        one.inner.step()
    checkpoint.save({"optimizer": Part(saved.inner.state_dict())}, step=1, run=path, timeout_s=20)
    checkpoint.restore({"optimizer": fresh.inner}, run=path, timeout_s=20)
    pairs = zip(saved.inner.state.values(), fresh.inner.state.values(), strict=True)
    return [torch.equal(one["exp_avg"].to_local(), other["exp_avg"].to_local()) for one, other in pairs]


def test_what_was_saved_of_a_bare_optimizer_of_sharded_parameters_can_still_be_restored(tmp_path):
    assert run_ranks(2, restore_a_bare_optimizer, str(tmp_path)) == [[True, True]] * 2


class Container(torch.optim.Optimizer):
    """As torchtitan has it: optimizers inside, and a state dict of its own, by name and sharded."""

    def __init__(self, model):
        self.model, self.inner = model, torch.optim.AdamW(model.parameters(), lr=0.1)
        super().__init__(list(model.parameters()), {})

    def state_dict(self):
        return get_optimizer_state_dict(self.model, self.inner, options=_FLAT)

    def load_state_dict(self, state):
        set_optimizer_state_dict(self.model, self.inner, state, options=_FLAT)


def container_of_a_sharded_model():
    model = torch.nn.Linear(4, 4)
    fully_shard(model)
    return Container(model)


def restore_a_container(path):
    saved, fresh = container_of_a_sharded_model(), container_of_a_sharded_model()
    for parameter in saved.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    saved.inner.step()
    checkpoint.save({"optimizer": saved}, step=1, run=path, timeout_s=20)
    checkpoint.restore({"optimizer": fresh}, run=path, timeout_s=20)
    pairs = zip(saved.inner.state.values(), fresh.inner.state.values(), strict=True)
    return [torch.equal(one["exp_avg"].to_local(), other["exp_avg"].to_local()) for one, other in pairs]


def test_an_optimizer_that_has_a_sharded_state_dict_of_its_own_is_saved_and_restored(tmp_path):
    assert run_ranks(2, restore_a_container, str(tmp_path)) == [[True, True]] * 2


class OddKey:
    """Has an entry whose name is no text, on one rank."""

    def __init__(self, bad_rank):
        self.bad_rank = bad_rank

    def state_dict(self):
        return {"key\ud800" if dist.get_rank() == self.bad_rank else "key": torch.ones(2)}

    def load_state_dict(self, state_dict):
        """Not restored."""


def save_an_odd_key(path):
    checkpoint.save({"odd": OddKey(1)}, step=1, run=path, timeout_s=30)


def test_a_name_that_is_no_text_on_one_rank_fails_the_save_on_every_rank(tmp_path):
    outcomes = run_ranks(2, save_an_odd_key, str(tmp_path))

    assert [SaveFailed] * 2 == [type(outcome) for outcome in outcomes]
    assert all("rank 1: UnsupportedState" in str(outcome) for outcome in outcomes)


def save_on_a_disk_of_its_own(root):
    own = f"{root}/{dist.get_rank()}"
    Path(own).mkdir()
    disk = PyarrowStorage(pyarrow.fs.SubTreeFileSystem(own, pyarrow.fs.LocalFileSystem()))
    try:
        checkpoint.save({"part": Shards(1)}, step=1, run=DirectoryRun(disk, "run", "run"), timeout_s=20)
    except SaveFailed as error:
        return error.phase, str(error), sorted(path.name for path in Path(own).rglob("*") if path.is_file())


def test_files_that_each_rank_wrote_to_a_disk_of_its_own_are_no_checkpoint(tmp_path):
    (phase, text, files), other = run_ranks(2, save_on_a_disk_of_its_own, str(tmp_path))

    assert phase == other[0] == "commit"
    assert "was written, and is not there for rank 0: save to a storage that all nodes share" in text
    assert "__1_0.distcp" in text
    assert "manifest.json" not in files + other[2]
    assert "__1_0.distcp" in other[2]


class Mute(Shards):
    def describe(self):
        if dist.get_rank() == 1:
            raise TypeError("this rank's is no number")
        return "fine"


def restore_what_one_rank_can_not_describe(root):
    checkpoint.save({"a": Shards(1)}, step=1, run=root, timeout_s=20)
    try:
        checkpoint.restore({"a": Mute(0)}, run=root, timeout_s=20)
    except CheckpointError as error:
        return type(error)
    return None


def test_a_part_that_one_rank_can_not_describe_fails_the_restore_on_every_rank(tmp_path):
    assert run_ranks(2, restore_what_one_rank_can_not_describe, str(tmp_path)) == [RankFailed] * 2
