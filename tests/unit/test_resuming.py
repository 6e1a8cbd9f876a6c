"""`assert_resumes` passes what resumes, and names what does not."""

import numpy as np
import pytest
import torch

from ray_stateful import GlobalBatchSampler, ModelState, OptimizerState, RandomState
from ray_stateful.testing import assert_resumes
from ray_stateful.testing.resuming import first_difference


def build(leave_out=()):
    """A small model with dropout, trained on data that a sampler orders."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    batches = GlobalBatchSampler(40, global_batch_size=4, micro_batch_size=2, seed=3)
    data = torch.arange(160, dtype=torch.float32).view(40, 4) / 160
    upcoming = iter(batches)

    def step():
        losses = []
        for micro in next(upcoming):
            loss = model(data[micro.indices]).square().sum() * micro.loss_scale
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return losses

    state = {
        "batches": batches,
        "model": ModelState(model),
        "optimizer": OptimizerState(model, optimizer, scheduler),
        "random": RandomState(),
    }
    return {name: part for name, part in state.items() if name not in leave_out}, step


def test_a_complete_state_resumes(tmp_path):
    assert_resumes(build)
    assert_resumes(build, num_steps=1, num_more=2, run=str(tmp_path))


def test_a_forgotten_random_stream_shows_in_the_first_step_after_the_restore():
    with pytest.raises(AssertionError, match=r"differs in what step 4 returned:\n  0: expected .*, found"):
        assert_resumes(lambda: build(leave_out=("random",)))


class Forgetful:
    """Keeps a tensor and a counter, and gives back what `forgets` says it does not."""

    def __init__(self, forgets):
        self.weight, self.steps, self.forgets = torch.ones(3, 2), 0, forgets

    def step(self):
        self.weight[1, 0] += 1
        self.steps += 1

    def state_dict(self):
        return {"inner": {"weight": self.weight}, "steps": self.steps}

    def load_state_dict(self, state_dict):
        if self.forgets != "weight":
            self.weight = state_dict["inner"]["weight"]
        if self.forgets != "steps":
            self.steps = state_dict["steps"]


def build_forgetful(forgets):
    part = Forgetful(forgets)
    return {"part": part}, part.step


@pytest.mark.parametrize(
    ("forgets", "message"),
    [
        ("weight", r"part\.inner\.weight: 1 of 6 elements differ, first number 2: expected 4\.0, found 1\.0"),
        ("steps", r"part\.steps: expected 3, found 0"),
    ],
)
def test_what_a_part_does_not_give_back_is_named_with_both_values(forgets, message):
    with pytest.raises(AssertionError, match=r"differs right after the restore:\n  " + message):
        assert_resumes(lambda: build_forgetful(forgets))


def test_a_key_that_may_differ_is_left_out():
    assert_resumes(lambda: build_forgetful("steps"), ignore=["part.steps"])
    with pytest.raises(AssertionError, match="weight"):
        assert_resumes(lambda: build_forgetful("weight"), ignore=["part.steps"])


def test_the_same_object_twice_is_refused_as_it_would_test_nothing():
    built = build_forgetful(None)
    with pytest.raises(ValueError, match="gave the same 'part' twice"):
        assert_resumes(lambda: built)


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ({"a": [1, 2]}, {"a": [1, 2]}, None),
        (float("nan"), float("nan"), None),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), None),
        (torch.tensor(0.0), torch.tensor(-0.0), "the value: 1 of 1 elements differ"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), "expected a tensor of float32 (2,)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), None),
        ({"a": {"b": 1}}, {"a": {}}, "a.b: not restored"),
        ({"a": {}}, {"a": {"b": 1}}, "a.b: was not there before"),
        ({"a": (1, 2)}, {"a": [1, 2]}, "a: expected (1, 2), found [1, 2]"),
        ([1, 2], [1, 2, 3], "expected 2 entries, found 3"),
        (1, 1.0, "expected 1, found 1.0"),
        (np.arange(3), np.arange(3), None),
        (np.float32(1.0), np.float32(1.5), "found np.float32(1.5)"),
    ],
)
def test_values_are_equal_bit_for_bit_and_type_for_type_or_the_first_difference_is_named(expected, found, difference):
    said = first_difference(expected, found)

    assert said == difference or difference in said
