"""Parts without a tensor, saved and restored by several ranks through `save` and `restore`."""

import random

import pytest
import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader

from ray_stateful import checkpoint
from ray_stateful.errors import ResizeRefused, StateMismatch
from ray_stateful.states.batches import GlobalBatchSampler
from ray_stateful.states.loader import LoaderState, Merge, Restart
from ray_stateful.states.progress import Progress
from ray_stateful.states.random import RandomState
from ray_stateful.testing import run_ranks


def loader():
    return StatefulDataLoader(list(range(100)), batch_size=4)


def furthest(saved, world):
    return max(saved.values(), key=lambda state: state["_num_yielded"])


def save(run):
    rank = dist.get_rank()
    torch.manual_seed(rank)
    ours, progress, batches = loader(), Progress(), GlobalBatchSampler(100, global_batch_size=8, micro_batch_size=2)
    given = iter(ours)
    for _ in range(3 + rank):
        next(given)
    for step in range(3):
        progress.on_step(step=step + 1)
        batches.on_step(step=step + 1)
    random_state = RandomState({"mixup": random.Random(rank)}, seed=5)
    state = {"loader": LoaderState(ours), "progress": progress, "batches": batches, "random": random_state}
    checkpoint.save(state, step=3, run=run)
    return next(given).tolist(), torch.rand(3)


def restore(run):
    """With each rule in turn: how the report calls it and where the loader stands, or the error."""
    results, rank = {}, dist.get_rank()
    for name, rule in [("default", None), ("restart", Restart()), ("merge", Merge(furthest))]:
        ours, progress = loader(), Progress()
        streams = RandomState({"mixup": random.Random()}, seed=5)
        state = {"loader": LoaderState(ours, on_resize=rule), "progress": progress, "random": streams}
        try:
            report = str(checkpoint.restore(state, run=run))
        except ResizeRefused as error:
            results[name] = (str(error), progress.step)
        else:
            results[name] = (report, progress.step, torch.rand(3), next(iter(ours)).tolist())
    other = GlobalBatchSampler(100, global_batch_size=16, micro_batch_size=2)
    with pytest.raises(StateMismatch, match="global_batch_size was 8 and is 16"):
        checkpoint.restore({"batches": other}, run=run)
    with pytest.raises(StateMismatch, match="generator mixup is in the checkpoint"):
        checkpoint.restore({"random": RandomState()}, run=run)
    # Rank 0's is the one that was saved: it has to know from the others.
    grouped = RandomState({"mixup": random.Random()}, data_parallel_rank=rank // 2)
    try:
        results["grouped"] = checkpoint.restore({"random": grouped}, run=run).parts[0].outcome
    except StateMismatch as error:
        results["grouped"] = error.problems
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = str(tmp_path_factory.mktemp("run"))
    return run, run_ranks(3, save, run)


def test_at_equal_size_every_rank_gets_its_own_loader_and_streams_back_unless_the_mesh_is_another_one(saved):
    run, expected = saved
    for outcome, (batch, drawn) in zip(run_ranks(3, restore, run), expected, strict=True):
        (problem,) = outcome.pop("grouped")
        assert problem.startswith("random: data_parallel_rank is another one than was saved")
        for _, step, redrawn, rebatch in outcome.values():
            assert step == 3
            assert torch.equal(redrawn, drawn)
            assert rebatch == batch
    assert [batch[0] for batch, _ in expected] == [12, 16, 20]


def test_on_another_number_of_workers_the_rule_decides_and_the_report_says_which(saved):
    run, _ = saved
    outcomes = run_ranks(2, restore, run)

    for outcome in outcomes:
        assert outcome["grouped"] == "re-seeded"
        refused, step = outcome["default"]
        assert "part 'loader' was saved by 3 workers and cannot be restored on 2" in refused
        assert step == 0
        assert "restarted: 3 positions saved, 2 workers" in outcome["restart"][0]
        assert outcome["restart"][3] == [0, 1, 2, 3]
        assert "merged by furthest" in outcome["merge"][0]
        assert outcome["merge"][3] == [20, 21, 22, 23]
        assert "derived from (seed 5, step 3, rank)" in outcome["merge"][0]
    assert not torch.equal(outcomes[0]["merge"][2], outcomes[1]["merge"][2])


class Changed(Progress):
    """Not as it was saved, on one rank."""

    def changed_from(self, saved):
        return ("another stream",) if dist.get_rank() == 1 else ()


def what_the_report_calls_it(run):
    checkpoint.save({"part": Progress()}, step=1, run=run)
    (part,) = checkpoint.restore({"part": Changed()}, run=run).parts
    return part.outcome, "another stream" in part.details, "on other ranks" in part.details


def test_what_is_not_as_it_was_saved_on_one_rank_is_not_called_exact_on_the_others(tmp_path):
    assert run_ranks(2, what_the_report_calls_it, str(tmp_path)) == [("changed", False, True), ("changed", True, False)]
