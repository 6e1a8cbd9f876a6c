"""Schedulers of OptimizerState, where groups or schedulers are others than those that were saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim import lr_scheduler

from ray_stateful import checkpoint
from ray_stateful.errors import StateMismatch
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.storage.reader import CheckpointReader
from ray_stateful.storage.writer import CheckpointWriter
from ray_stateful.wrappers import schedulers
from tests.ranks.wrapper_models import assert_same, leaves

RATES = {"body": 0.01, "neck": 0.02, "head": 0.1}
ORDERS = [["body", "neck", "head"], ["head", "body", "neck"]]


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.neck, self.head, self.extra = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.body(x)))


def plateau(optimizer: torch.optim.Optimizer, order: list[str]) -> lr_scheduler.LRScheduler:
    floors = {"body": 0.004, "neck": 0.0, "head": 0.07}
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=[floors[name] for name in order])


def cyclic(optimizer: torch.optim.Optimizer, order: list[str]) -> lr_scheduler.LRScheduler:
    base = [RATES[name] for name in order]
    return lr_scheduler.CyclicLR(optimizer, base, [9 * rate for rate in base], step_size_up=4, cycle_momentum=False)


def in_turn(optimizer: torch.optim.Optimizer, order: list[str]) -> lr_scheduler.LRScheduler:
    # As many schedulers, and milestones but for one, as there are groups.
    parts: list[Any] = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
        lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [2, 5])


SCHEDULERS = {
    "LambdaLR": lambda optimizer, order: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda optimizer, order: lr_scheduler.OneCycleLR(optimizer, [RATES[n] for n in order], 20),
    "ReduceLROnPlateau": plateau,
    "CyclicLR": cyclic,
    "SequentialLR": in_turn,
}


def build(seed: int, order: list[str], make: Any) -> tuple[Model, torch.optim.Optimizer, Any]:
    model = Model(seed)
    groups = [{"params": list(getattr(model, name).parameters()), "lr": RATES[name]} for name in order]
    optimizer = torch.optim.AdamW(groups)
    return model, optimizer, make(optimizer, order)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    return {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer, scheduler)}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    loss = model(torch.ones(2, 3)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_group_keeps_its_own_schedule_when_the_groups_are_in_another_order(name, tmp_path):
    saved, fresh = (build(seed, order, SCHEDULERS[name]) for seed, order in enumerate(ORDERS))
    for _ in range(3):
        train(*saved)
    checkpoint.save(state_of(*saved), step=3, run=str(tmp_path))
    checkpoint.restore(state_of(*fresh), run=str(tmp_path))
    for _ in range(6):
        assert rates(*fresh[:2]) == rates(*saved[:2])
        for objects in (saved, fresh):
            train(*objects)
    assert_same(leaves(fresh[0].state_dict()), leaves(saved[0].state_dict()))


def test_a_group_that_is_divided_and_one_that_is_new_have_the_schedules_that_are_theirs(tmp_path):
    make = SCHEDULERS["LambdaLR"]
    saved = build(1, ["body", "head"], make)
    for _ in range(3):
        train(*saved)
    model = Model(2)
    groups = [[*model.extra.parameters()], [model.head.bias], [model.head.weight], [*model.body.parameters()]]
    optimizer = torch.optim.AdamW([{"params": group, "lr": 7.0} for group in groups])
    fresh = model, optimizer, make(optimizer, [])
    checkpoint.save(state_of(*saved), step=3, run=str(tmp_path))
    checkpoint.restore({"optimizer": OptimizerState(*fresh)}, run=str(tmp_path))
    assert fresh[2].base_lrs == [7.0, 0.1, 0.1, 0.01]
    for objects in (saved, fresh):
        train(*objects)
    found = rates(*fresh[:2])
    assert {name: found[name] for name in rates(*saved[:2])} == rates(*saved[:2])
    assert found["extra.weight"] == 7.0 * (1 / 5)


def refusal(saved: Any, fresh: Any, directory: Any) -> str:
    """What the restore is refused with; nothing may have been loaded."""
    checkpoint.save(state_of(*saved), step=3, run=str(directory))
    before = {name: value.clone() for name, value in fresh[0].state_dict().items()}
    with pytest.raises(StateMismatch) as caught:
        checkpoint.restore(state_of(*fresh), run=str(directory))
    assert_same(dict(fresh[0].state_dict()), before)
    given, part = OptimizerState(*saved).state_dict(), OptimizerState(*fresh)
    with pytest.raises(ValueError, match=r"group|scheduler"):
        part.load_state_dict(given)
    assert not fresh[1].state
    return str(caught.value)


def test_groups_that_can_not_be_told_from_each_other_are_refused_before_anything_is_loaded(tmp_path):
    def floors(optimizer: torch.optim.Optimizer, order: list[str]) -> Any:
        return lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=[number / 1000 for number, _ in enumerate(order)])

    saved = build(1, ["body", "head"], floors)
    for group in saved[1].param_groups:
        group["lr"] = 0.1
    train(*saved)
    text = refusal(saved, build(2, ["neck", "body", "head"], floors), tmp_path)
    assert "ReduceLROnPlateau stores its lists by group number, and the groups here differ" in text


def test_a_scheduler_that_was_not_saved_starts_as_built_beside_one_that_goes_on_and_the_report_says_so(tmp_path):
    def several(*gammas: float) -> Any:
        return lambda optimizer, order: [lr_scheduler.ExponentialLR(optimizer, gamma) for gamma in gammas]

    saved, fresh = build(1, ["body", "head"], several(0.9)), build(2, ["body", "head"], several(0.5, 0.7))
    for _ in range(2):
        train(*saved[:2], saved[2][0])
    checkpoint.save(state_of(*saved), step=2, run=str(tmp_path))
    report = checkpoint.restore(state_of(*fresh), run=str(tmp_path))

    assert [(one.last_epoch, one.gamma) for one in fresh[2]] == [(2, 0.9), (0, 0.7)]
    (part,) = [one for one in report.parts if one.name == "optimizer"]
    assert part.outcome == "changed"
    assert str(part).count("ExponentialLR is not in the checkpoint: starts as built") == 1


def test_a_group_that_is_new_in_the_place_of_one_that_is_gone_has_its_own_schedule(tmp_path):
    make = SCHEDULERS["LambdaLR"]
    saved = build(1, ["body", "head"], make)
    train(*saved)
    model = Model(2)
    optimizer = torch.optim.AdamW([{"params": [*model.body.parameters()]}, {"params": [*model.extra.parameters()]}])
    for group, rate in zip(optimizer.param_groups, (1.0, 7.0), strict=True):
        group["lr"] = rate
    fresh = model, optimizer, make(optimizer, ["body", "extra"])
    checkpoint.save(state_of(*saved), step=1, run=str(tmp_path))
    checkpoint.restore({"optimizer": OptimizerState(*fresh, strict=False)}, run=str(tmp_path))
    assert fresh[2].base_lrs == [RATES["body"], 7.0]


def test_a_group_without_parameters_is_no_reason_to_refuse_the_code_that_saved(tmp_path):
    def with_empty(seed: int) -> tuple[Model, torch.optim.Optimizer, Any]:
        model = Model(seed)
        optimizer = torch.optim.AdamW([{"params": list(model.body.parameters())}, {"params": []}], lr=0.1)
        return model, optimizer, lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=[0.01 * seed, 0.02 * seed])

    saved, fresh = with_empty(1), with_empty(2)
    train(*saved)
    checkpoint.save(state_of(*saved), step=1, run=str(tmp_path))
    checkpoint.restore(state_of(*fresh), run=str(tmp_path))
    assert fresh[2].state_dict() == saved[2].state_dict()


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "CosineAnnealingLR", "StepLR"])
def test_a_group_that_was_added_since_the_last_step_of_the_scheduler_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    def with_added(seed: int, num_steps: int) -> tuple[Model, torch.optim.Optimizer, Any]:
        made = build(seed, ["body", "neck"], make)
        for _ in range(num_steps):
            train(*made)
        made[1].add_param_group({"params": list(made[0].head.parameters()), "lr": 0.05})
        return made

    make = {
        "ReduceLROnPlateau": lambda optimizer, order: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        "CosineAnnealingLR": lambda optimizer, order: lr_scheduler.CosineAnnealingLR(optimizer, 9),
        "StepLR": lambda optimizer, order: lr_scheduler.StepLR(optimizer, 2, 0.5),
    }[name]
    saved, fresh = with_added(1, 2), with_added(2, 0)
    checkpoint.save(state_of(*saved), step=2, run=str(tmp_path))
    checkpoint.restore(state_of(*fresh), run=str(tmp_path))
    for _ in range(4):
        assert fresh[2].state_dict() == saved[2].state_dict()
        assert rates(*fresh[:2]) == rates(*saved[:2])
        for one in (saved, fresh):
            train(*one)


class Numbered:
    """A user's own scheduler, made of two of torch's, with a state by number."""

    def __init__(self, optimizer: torch.optim.Optimizer, kind: type, gammas: tuple[float, float]) -> None:
        self.kind = kind
        self.inner = [lr_scheduler.ExponentialLR(optimizer, gamma) for gamma in gammas]

    def step(self) -> None:
        for one in self.inner:
            one.step()

    def state_dict(self) -> dict[Any, Any]:
        return {self.kind(number): one.state_dict() for number, one in enumerate(self.inner)}

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        for number, one in enumerate(self.inner):
            one.load_state_dict(state[self.kind(number)])


@pytest.mark.parametrize("kind", [int, str])
def test_one_scheduler_with_a_state_by_number_is_not_taken_for_several(kind, tmp_path):
    saved, fresh = (
        build(seed, ["body"], lambda optimizer, order, gammas=gammas: Numbered(optimizer, kind, gammas))
        for seed, gammas in ((1, (0.9, 0.8)), (2, (0.5, 0.4)))
    )
    train(*saved)
    checkpoint.save(state_of(*saved), step=1, run=str(tmp_path))
    checkpoint.restore(state_of(*fresh), run=str(tmp_path))
    assert fresh[2].state_dict() == saved[2].state_dict()


def test_a_scheduler_with_numbers_as_keys_comes_back_also_with_tensors_below_them(tmp_path):
    def with_tensors(seed: int, gammas: tuple[float, float]) -> tuple[Model, torch.optim.Optimizer, Any]:
        model = Model(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
        return model, optimizer, Numbered(optimizer, int, gammas)

    saved, fresh = with_tensors(1, (0.9, 0.8)), with_tensors(2, (0.5, 0.4))
    train(*saved)
    checkpoint.save(state_of(*saved), step=1, run=str(tmp_path))
    checkpoint.restore(state_of(*fresh), run=str(tmp_path))
    assert_same(leaves(fresh[2].state_dict()), leaves(saved[2].state_dict()))
    assert [one.gamma for one in fresh[2].inner] == [0.9, 0.8]


BY_NUMBER = {
    "MultiStepLR": lambda optimizer, order: lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    "MultiStepLR in SequentialLR": lambda optimizer, order: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.MultiStepLR(optimizer, [1, 2])], [2]
    ),
    "one of the user's own": lambda optimizer, order: Numbered(optimizer, int, (0.9, 0.8)),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("reader", ["ours", "stock", "restore"])
@pytest.mark.parametrize("name", BY_NUMBER)
def test_numbers_among_a_schedulers_keys_come_back_from_dcp_as_numbers_and_are_saved_again(name, reader, tmp_path):
    saved, fresh = (build(seed, ["body"], BY_NUMBER[name]) for seed in (1, 2))
    train(*saved)
    dcp.save(state_of(*saved), storage_writer=CheckpointWriter(str(tmp_path / "first")), no_dist=True)
    if reader == "restore":
        checkpoint.restore(state_of(*fresh), checkpoint=str(tmp_path / "first"))
    else:
        readers = {"ours": CheckpointReader, "stock": dcp.FileSystemReader}
        dcp.load(state_of(*fresh), storage_reader=readers[reader](str(tmp_path / "first")), no_dist=True)
    for _ in range(4):
        assert fresh[2].state_dict() == saved[2].state_dict()
        for one in (saved, fresh):
            train(*one)
    checkpoint.save(state_of(*fresh), step=5, run=str(tmp_path))


KINDS = {
    "is of a different kind from the ExponentialLR here: it has T_max, eta_min but not gamma": (
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    ),
    "schedulers in the checkpoint: 2, and here: 1": (
        lambda optimizer: [lr_scheduler.ExponentialLR(optimizer, 0.9) for _ in range(2)],
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    ),
    "ChainedScheduler has 1 schedulers in it, and the one in the checkpoint has 2": (
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(optimizer, 0.9) for _ in range(2)], optimizer
        ),
        lambda optimizer: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer),
    ),
    "is of a different kind from the ChainedScheduler[0] here": (
        lambda optimizer: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(optimizer, 9)], optimizer),
        lambda optimizer: lr_scheduler.ChainedScheduler([lr_scheduler.CosineAnnealingLR(optimizer, 9)], optimizer),
    ),
}


@pytest.mark.parametrize("problem", KINDS)
def test_schedulers_that_are_others_are_refused_before_anything_is_loaded(problem, tmp_path):
    saved, fresh = (build(1, ["body"], lambda optimizer, order, make=make: make(optimizer)) for make in KINDS[problem])
    assert problem in refusal(saved, fresh, tmp_path)


def test_what_a_scheduler_of_another_kind_has_more_is_said(tmp_path):
    saved = build(1, ["body"], lambda optimizer, order: lr_scheduler.StepLR(optimizer, 9))
    fresh = build(2, ["body"], lambda optimizer, order: lr_scheduler.ExponentialLR(optimizer, 0.9))
    checkpoint.save(state_of(*saved), step=3, run=str(tmp_path))
    report = checkpoint.restore(state_of(*fresh), run=str(tmp_path))
    assert "of the scheduler, step_size is in the checkpoint, and not in a fresh one" in str(report)


def test_what_torch_no_longer_keeps_in_a_scheduler_does_not_make_it_another_one():
    model, optimizer, scheduler = build(1, ["body"], plateau)
    state = OptimizerState(model, optimizer, scheduler).state_dict()
    # As torch 2.5 wrote it.
    state["sched"] = {name: value for name, value in state["sched"].items() if name != "default_min_lr"}
    state["sched"] |= {"verbose": False, "num_bad_epochs": 4}
    part = OptimizerState(model, optimizer, scheduler)
    part.load_state_dict(state)
    assert scheduler.num_bad_epochs == 4
    assert any("default_min_lr is not in the checkpoint: kept as built" in note for note in part.notes)


def test_a_scheduler_is_given_what_an_earlier_version_of_it_did_not_save_as_it_is_here():
    given = []

    class Newer:
        def state_dict(self):
            return {"step": 0, "added": (1, 2), "marks": (3,)}

        def load_state_dict(self, state_dict):
            given.append(state_dict)

    # Formats without tuples have lists for them.
    schedulers.load([Newer()], {"step": 7, "marks": [4]}, [None])

    assert given == [{"step": 7, "added": (1, 2), "marks": (4,)}]
