"""OptimizerState, without a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ray_stateful import checkpoint
from ray_stateful.errors import UnsupportedState
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.wrappers import optimizer_keys
from tests.ranks.wrapper_models import Tied, assert_same, leaves, train
from tests.transfer import snapshot, transfer

# Stock DCP says so whenever it saves or loads without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def over_sparse_gradients(parameters: Any) -> torch.optim.Optimizer:
    members = list(parameters)
    for parameter in members:
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.to_sparse()))
    return torch.optim.SparseAdam(members)


OPTIMIZERS = {
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Muon": lambda p: torch.optim.Muon([parameter for parameter in p if parameter.dim() == 2]),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD with dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "SparseAdam": over_sparse_gradients,
    "Adam with a tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
}


class WithUnused(Tied):
    """Has an expert that no token is sent to."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.expert = nn.Linear(8, 8)


def decayed(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: {k: leaves(v)[""] for k, v in s.items()} for parameter, s in optimizer.state.items() if s}


@pytest.mark.parametrize("way", ["dcp", "restore", "direct"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_goes_on_as_if_it_had_not_stopped(name, way, tmp_path):
    saved, fresh = WithUnused(1), WithUnused(2)
    fresh.load_state_dict(saved.state_dict())
    optimizer, scheduler = OPTIMIZERS[name](saved.parameters()), None
    if name != "Adam with a tensor lr":
        scheduler = decayed(optimizer)
    train(saved, optimizer, scheduler)
    again = OPTIMIZERS[name](fresh.parameters())
    scheduler_again = None if scheduler is None else decayed(again)
    before = {
        "model": ModelState(saved),
        "optimizer": OptimizerState(saved, optimizer, scheduler),
    }
    after = {"model": ModelState(fresh), "optimizer": OptimizerState(fresh, again, scheduler_again)}
    if way == "dcp":
        # Dampened momentum has no value that means "none yet": what never had a gradient is left out.
        planner = dcp.DefaultLoadPlanner(allow_partial_load=name == "SGD with dampening")
        dcp.save(before, checkpoint_id=tmp_path)
        dcp.load(after, checkpoint_id=tmp_path, planner=planner)
    elif way == "restore":
        assert all(transfer(snapshot(before[key]), after[key]).problems == () for key in before)
    else:
        for key in before:
            after[key].load_state_dict(before[key].state_dict())
            # Trained on in turns below: state shared with the optimizer it came from would be stepped twice.
    found, expected = state_by_name(fresh, again), state_by_name(saved, optimizer)
    if name in ("Muon", "SGD with momentum") or (name, way) == ("SGD with dampening", "dcp"):
        # Without dampening, a buffer of zeros steps as none does; with it, stock DCP can't say what it did not load.
        assert not any(value.any() for key in found.keys() - expected.keys() for value in found.pop(key).values())
    assert_same(leaves(found), leaves(expected))
    train(saved, optimizer, scheduler)
    train(fresh, again, scheduler_again)
    assert_same(dict(fresh.state_dict()), dict(saved.state_dict()))


def test_keys_are_dcps_flat_ones_by_parameter_name():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    ours = OptimizerState(model, optimizer).state_dict()
    theirs = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    assert set(ours) == {"optim"}
    assert_same(leaves(ours["optim"]), leaves(dict(theirs)))


def test_the_nested_layout_loads_too_and_numbered_parameters_are_refused():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters(), lr=0.5), torch.optim.AdamW(fresh.parameters())
    train(saved, optimizer)
    OptimizerState(fresh, again).load_state_dict({"optim": get_optimizer_state_dict(saved, optimizer)})
    assert_same(leaves(state_by_name(fresh, again)), leaves(state_by_name(saved, optimizer)))
    assert again.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="by number"):
        OptimizerState(fresh, again).load_state_dict({"optim": optimizer.state_dict()})


def test_asking_for_state_changes_nothing_and_runs_no_hook():
    model = WithUnused(1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    ran = []
    optimizer.register_step_post_hook(lambda *args: ran.append(args))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    gradient = model.scale.grad
    OptimizerState(model, optimizer).state_dict()
    assert ran == []
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert model.scale.grad is gradient
    assert_same(dict(model.state_dict()), before)


def test_live_gradients_neither_cost_the_moments_nor_get_lost():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.AdamW(fresh.parameters())
    train(saved, optimizer)
    fresh(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in fresh.named_parameters()}
    assert transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again)).notes == ()
    assert_same(leaves(state_by_name(fresh, again)), leaves(state_by_name(saved, optimizer)))
    assert all(parameter.grad is gradients[name] for name, parameter in fresh.named_parameters())


def test_a_parameter_without_a_gradient_has_no_state_before_and_after(tmp_path):
    saved, fresh = WithUnused(1), WithUnused(2)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.AdamW(fresh.parameters())
    train(saved, optimizer)
    dcp.save({"o": OptimizerState(saved, optimizer)}, checkpoint_id=tmp_path)
    dcp.load({"o": OptimizerState(fresh, again)}, checkpoint_id=tmp_path)
    assert fresh.expert.weight not in again.state
    assert again.state[fresh.scale]["step"] == 3


def test_an_optimizer_without_state_is_nothing_to_warn_of():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    state = OptimizerState(fresh, torch.optim.SGD(fresh.parameters()))
    transfer(snapshot(OptimizerState(saved, torch.optim.SGD(saved.parameters()))), state)
    assert state.notes == ()


def test_a_layer_frozen_before_starts_fresh_with_a_note():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    saved.blocks[0].requires_grad_(False)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.AdamW(fresh.parameters())
    train(saved, optimizer)
    judged = transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again))
    assert judged.problems == ()
    assert any("blocks.0.down.bias" in note and "starts fresh" in note for note in judged.notes)
    assert fresh.blocks[0].up.weight not in again.state
    assert again.state[fresh.blocks[1].up.weight]["step"] == 3


def test_a_layer_frozen_now_is_a_note():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer = torch.optim.AdamW(saved.parameters())
    train(saved, optimizer)
    fresh.blocks[0].requires_grad_(False)
    again = torch.optim.AdamW(fresh.parameters())
    judged = transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again))
    assert judged.problems == ()
    assert any("frozen here: not loaded" in note for note in judged.notes)


def test_a_layer_not_optimized_now_is_a_note():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.AdamW(fresh.blocks.parameters())
    train(saved, optimizer)
    judged = transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again))
    assert judged.problems == ()
    assert any("not optimized here" in note for note in judged.notes)


def test_part_of_a_parameters_state_is_a_problem():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.AdamW(fresh.parameters())
    train(saved, optimizer)
    flat = snapshot(OptimizerState(saved, optimizer))
    del flat["optim.state.scale.exp_avg"]
    judged = transfer(flat, OptimizerState(fresh, again))
    assert judged.problems == ("state.scale.exp_avg is not in the checkpoint, but other state of its parameter is",)


@pytest.mark.parametrize(
    ("moment", "found"),
    [
        (torch.tensor([7.0]), r"'state\.bias\.exp_avg' has shape \(1,\), and \(4,\) here"),
        (torch.ones(9), r"'state\.bias\.exp_avg' has shape \(9,\), and \(4,\) here"),
        (None, r"state\.bias lacks \['exp_avg'\]"),
    ],
)
def test_state_that_a_fresh_optimizer_can_not_have_is_refused_before_any_is_loaded(moment, found):
    (saved, optimizer), (fresh, again) = (
        (model, torch.optim.AdamW(model.parameters(), lr=lr))
        for model, lr in ((nn.Linear(4, 4), 0.1), (nn.Linear(4, 4), 0.2))
    )
    saved(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = OptimizerState(saved, optimizer).state_dict()
    state["optim"].pop("state.bias.exp_avg")
    state["optim"] |= {} if moment is None else {"state.bias.exp_avg": moment}
    with pytest.raises(ValueError, match=found):
        OptimizerState(fresh, again).load_state_dict(state)
    assert not again.state
    assert again.param_groups[0]["lr"] == 0.2


def test_the_state_of_another_kind_of_optimizer_is_a_problem():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.SGD(fresh.parameters())
    train(saved, optimizer)
    judged = transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again))
    assert "state.scale.exp_avg is in the checkpoint, but the optimizer here keeps no such state" in judged.problems


def test_one_group_may_become_two_in_another_order():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer = torch.optim.AdamW(saved.parameters(), lr=0.3, betas=(0.5, 0.6))
    train(saved, optimizer)
    parameters = list(fresh.parameters())[::-1]
    again = torch.optim.AdamW([{"params": parameters[:4]}, {"params": parameters[4:], "lr": 9.0}])
    assert transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again)).problems == ()
    assert_same(leaves(state_by_name(fresh, again)), leaves(state_by_name(saved, optimizer)))
    assert [group["lr"] for group in again.param_groups] == [0.3, 0.3]
    assert [group["betas"] for group in again.param_groups] == [(0.5, 0.6)] * 2


def test_a_new_parameter_that_comes_first_does_not_cost_its_group_the_saved_hyperparameters():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer = torch.optim.AdamW(saved.blocks.parameters(), lr=0.3, betas=(0.5, 0.6), weight_decay=0.2)
    train(saved, optimizer)
    again = torch.optim.AdamW([fresh.scale, *fresh.blocks.parameters()])
    judged = transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again))
    assert {name: again.param_groups[0][name] for name in ("lr", "betas", "weight_decay")} == {
        "lr": 0.3,
        "betas": (0.5, 0.6),
        "weight_decay": 0.2,
    }
    assert "lr of scale is not in the checkpoint: as the group has it" in judged.notes


@pytest.mark.parametrize("how", ["groups", "optimizers"])
def test_loading_looks_at_each_key_a_few_times_however_many_groups_and_optimizers_there_are(how, monkeypatch):
    looks: list[str] = []
    dots = optimizer_keys._dots
    monkeypatch.setattr(optimizer_keys, "_dots", lambda text: looks.append(text) or dots(text))
    model = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(40))
    if how == "groups":
        optimizer: Any = torch.optim.AdamW([{"params": [parameter]} for parameter in model])
    else:
        optimizer = [torch.optim.AdamW([parameter]) for parameter in model]
    part = OptimizerState(model, optimizer)
    saved = part.state_dict()
    part.check_saved(saved)
    part.load_state_dict(saved)
    assert len(looks) <= 4 * len(saved["optim"])


def test_two_groups_that_differ_can_not_become_one():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    first, *rest = saved.parameters()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": rest, "lr": 0.5}])
    train(saved, optimizer)
    again = torch.optim.AdamW(fresh.parameters())
    with pytest.raises(ValueError, match=r"scale\.lr' is 0\.001 and .*weight\.lr' is 0\.5"):
        transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again))
    assert not again.state


def test_several_optimizers_and_schedulers_are_all_saved(tmp_path):
    def build(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer], list[Any]]:
        model = Tied(seed=seed, tied=False)
        optimizers = [
            torch.optim.AdamW(model.blocks.parameters()),
            torch.optim.SGD([model.embed_tokens.weight, model.scale, model.lm_head.weight], lr=0.1, momentum=0.9),
        ]
        return model, optimizers, [decayed(optimizer) for optimizer in optimizers]

    saved, optimizers, schedulers = build(1)
    for _ in range(2):
        saved(torch.arange(4)[None]).sum().backward()
        [optimizer.step() for optimizer in optimizers]
        schedulers[1].step()
    fresh, again, schedulers_again = build(2)
    state = OptimizerState(fresh, again, schedulers_again)
    dcp.save({"o": OptimizerState(saved, optimizers, schedulers)}, checkpoint_id=tmp_path)
    dcp.load({"o": state}, checkpoint_id=tmp_path)
    for one, other in zip(optimizers, again, strict=True):
        assert_same(leaves(state_by_name(fresh, other)), leaves(state_by_name(saved, one)))
    assert [scheduler.last_epoch for scheduler in schedulers_again] == [0, 2]
    assert (
        state.describe() == "AdamW, 1 group; SGD, 1 group; scheduler LambdaLR at step 0; scheduler LambdaLR at step 2"
    )


def test_one_optimizer_over_parts_with_equal_names_keeps_them_apart(tmp_path):
    saved, fresh = ([nn.Linear(2, 2), nn.Linear(2, 2)] for _ in range(2))
    optimizers = [torch.optim.AdamW([p for part in parts for p in part.parameters()]) for parts in (saved, fresh)]
    saved[1](saved[0](torch.ones(1, 2))).sum().backward()
    optimizers[0].step()
    dcp.save({"o": OptimizerState(saved, optimizers[0])}, checkpoint_id=tmp_path)
    dcp.load({"o": OptimizerState(fresh, optimizers[1])}, checkpoint_id=tmp_path)
    for one, other in zip(saved, fresh, strict=True):
        assert torch.equal(optimizers[1].state[other.weight]["exp_avg"], optimizers[0].state[one.weight]["exp_avg"])


def test_one_parameter_in_two_optimizers_is_refused():
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(model.parameters()) for _ in range(2)]
    with pytest.raises(ValueError, match=r"two optimizers hold the parameter of 'param_groups\.bias"):
        OptimizerState(model, optimizers).state_dict()


def test_a_parameter_of_another_model_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(2, 3).parameters())
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 of SGD, of shape \(3, 2\), is not in the model"):
        OptimizerState(nn.Linear(2, 3), optimizer).state_dict()


def warmed_up(optimizer: torch.optim.Optimizer) -> Any:
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])


def test_learning_rates_in_one_tensor_of_a_fresh_scheduler_come_back_each_as_it_was(tmp_path):
    objects = []
    for seed in (1, 2):
        model = Tied(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), foreach=False)
        objects.append((model, optimizer, warmed_up(optimizer)))
    saved, fresh = objects
    for _ in range(4):
        train(*saved)
    checkpoint.save({"o": OptimizerState(*saved)}, step=4, run=str(tmp_path))
    checkpoint.restore({"o": OptimizerState(*fresh)}, run=str(tmp_path))
    assert_same(leaves(fresh[2].state_dict()), leaves(saved[2].state_dict()))


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
        torch.optim.NAdam,
        torch.optim.Rprop,
        torch.optim.ASGD,
    ],
)
def test_what_was_saved_before_the_first_step_takes_it_as_if_never_saved(make, stepped, tmp_path):
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = make(saved.parameters()), make(fresh.parameters())
    if stepped:
        train(fresh, again)
    state, after = (
        {"m": ModelState(model), "o": OptimizerState(model, one)} for model, one in ((saved, optimizer), (fresh, again))
    )
    checkpoint.save(state, step=0, run=str(tmp_path))
    checkpoint.restore(after, run=str(tmp_path))
    for model, one in ((saved, optimizer), (fresh, again)):
        train(model, one)
    assert_same(
        leaves({n: p.state_dict() for n, p in after.items()}), leaves({n: p.state_dict() for n, p in state.items()})
    )


class Homemade:
    """A scheduler of no known base class."""

    def __init__(self) -> None:
        self.num_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


def test_anything_with_a_state_dict_is_a_scheduler():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    saved, fresh = Homemade(), Homemade()
    saved.num_steps = 7
    assert (
        transfer(snapshot(OptimizerState(model, optimizer, saved)), OptimizerState(model, optimizer, fresh)).notes == ()
    )
    assert fresh.num_steps == 7


def test_a_scheduler_missing_from_the_checkpoint_is_reported_and_not_fatal():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters(), lr=0.25), torch.optim.AdamW(fresh.parameters())
    train(saved, optimizer)
    part = OptimizerState(fresh, again, decayed(again))
    judged = transfer(snapshot(OptimizerState(saved, optimizer)), part)
    assert judged.problems == ()
    assert any("no scheduler in the checkpoint" in note for note in judged.notes)
    assert any("initial_lr" in note for note in judged.notes)
    assert "LambdaLR is not in the checkpoint" in part.describe()
    assert again.param_groups[0]["lr"] == 0.25


def test_a_scheduler_only_in_the_checkpoint_is_reported_and_not_fatal():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.AdamW(fresh.parameters())
    judged = transfer(snapshot(OptimizerState(saved, optimizer, decayed(optimizer))), OptimizerState(fresh, again))
    assert judged.problems == ()
    assert any("there is none here" in note for note in judged.notes)


def test_the_schedule_and_the_learning_rate_do_not_restart(tmp_path):
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [2])

    saved, optimizer, scheduler = build()
    train(saved, optimizer, scheduler, num_steps=4)
    fresh, again, scheduler_again = build()
    dcp.save({"o": OptimizerState(saved, optimizer, scheduler)}, checkpoint_id=tmp_path)
    dcp.load({"o": OptimizerState(fresh, again, scheduler_again)}, checkpoint_id=tmp_path)
    train(saved, optimizer, scheduler, num_steps=3)
    train(fresh, again, scheduler_again, num_steps=3)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert scheduler_again.state_dict().keys() == scheduler.state_dict().keys()


class Invented(torch.optim.Optimizer):
    """Keeps whatever `make` gives as the state of each parameter."""

    def __init__(self, parameters: Any, make: Any) -> None:
        self.make = make
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter].update(self.make(parameter))


def test_8_bit_state_comes_back_in_8_bits_and_float32_moments_of_bfloat16_stay_float32(tmp_path):
    def make(seed: int) -> Any:
        def state(parameter: torch.Tensor) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(seed)
            return {
                "step": seed,
                "codes": torch.randint(0, 255, parameter.shape, generator=generator).to(torch.uint8),
                "absmax": torch.rand(3, generator=generator),
                "scale": torch.rand((), generator=generator, dtype=torch.float64),
                "inner": {"mean": torch.rand(parameter.shape, generator=generator)},
            }

        return state

    saved, fresh = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).bfloat16()
    optimizer, again = Invented(saved.parameters(), make(1)), Invented(fresh.parameters(), make(2))
    saved(torch.ones(1, 4).bfloat16()).sum().backward()
    optimizer.step()
    dcp.save({"o": OptimizerState(saved, optimizer)}, checkpoint_id=tmp_path)
    dcp.load({"o": OptimizerState(fresh, again)}, checkpoint_id=tmp_path)
    assert_same(leaves(again.state[fresh.weight]), leaves(optimizer.state[saved.weight]))


class ByDim(torch.optim.Optimizer):
    """Has a mean for each dim of a parameter, under its number: the way of those that precondition dim by dim."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["means"] = {dim: torch.zeros(size) for dim, size in enumerate(parameter.shape)}
                for dim, size in enumerate(parameter.shape):
                    state["means"][dim] += parameter.grad.movedim(dim, 0).reshape(size, -1).mean(1)
                    parameter -= group["lr"] * state["means"][dim].mean()


@pytest.mark.parametrize("way", ["restore", "direct"])
def test_an_optimizer_with_numbers_among_the_keys_of_its_state_goes_on_as_if_it_had_not_stopped(way, tmp_path):
    (saved, optimizer), (fresh, again) = ((model, ByDim(model.parameters())) for model in (Tied(seed=1), Tied(seed=2)))
    train(saved, optimizer)
    before = {"m": ModelState(saved), "o": OptimizerState(saved, optimizer)}
    after = {"m": ModelState(fresh), "o": OptimizerState(fresh, again)}
    if way == "restore":
        checkpoint.save(before, step=3, run=str(tmp_path))
        checkpoint.restore(after, run=str(tmp_path))
    else:
        for name, part in after.items():
            part.load_state_dict(before[name].state_dict())
    for model, one in ((saved, optimizer), (fresh, again)):
        train(model, one)
    assert_same(dict(fresh.state_dict()), dict(saved.state_dict()))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([torch.ones(2)], "a list"),
        (object(), "a object"),
        (torch.ones(2).as_subclass(nn.Buffer), "a tensor of type Buffer"),
    ],
)
def test_state_without_a_meaning_elsewhere_is_refused_by_name(value, found):
    model = nn.Linear(2, 2)
    optimizer = Invented(model.parameters(), lambda parameter: {})
    optimizer.state[model.weight]["history"] = value
    with pytest.raises(UnsupportedState, match=rf"^state\.weight\.history: .*{found}"):
        OptimizerState(model, optimizer).state_dict()


def over_all_at_once(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Tied(seed=seed)
    return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)


def train_over_all_at_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(10).reshape(2, 5)).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def test_an_optimizer_over_all_parameters_at_once_is_refused_by_name_and_goes_on_as_a_part_of_its_own(tmp_path):
    (saved, optimizer), (fresh, again) = over_all_at_once(1), over_all_at_once(2)
    train_over_all_at_once(saved, optimizer)
    with pytest.raises(UnsupportedState, match=r"LBFGS: .* without a closure .* make the optimizer itself a part"):
        OptimizerState(saved, optimizer).state_dict()
    checkpoint.save({"model": ModelState(saved), "optimizer": optimizer}, step=2, run=str(tmp_path))
    checkpoint.restore({"model": ModelState(fresh), "optimizer": again}, run=str(tmp_path))
    for model, one in ((saved, optimizer), (fresh, again)):
        train_over_all_at_once(model, one)
    assert_same(dict(fresh.state_dict()), dict(saved.state_dict()))


class NeedsAClosure(torch.optim.SGD):
    def step(self, closure: Any) -> None:
        super().step(closure)


def test_an_optimizer_that_can_not_be_asked_for_its_beginning_is_refused_when_saved_not_when_restored():
    model = nn.Linear(2, 2)
    optimizer = NeedsAClosure(model.parameters(), momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(None)
    assert len(optimizer.state) == 2
    with pytest.raises(UnsupportedState, match=r"NeedsAClosure: .* without a closure"):
        OptimizerState(model, optimizer).state_dict()


class Around(torch.optim.Optimizer):
    """Steps the optimizer inside it, of which it has the state and the groups, or only the groups, or neither."""

    def __init__(self, inner: torch.optim.Optimizer, shared: tuple[str, ...]) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 0.1})
        self.inner = inner
        for name in shared:
            setattr(self, name, getattr(inner, name))

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


@pytest.mark.parametrize(
    ("shared", "what_to_do"),
    [
        (("param_groups",), "give OptimizerState its `inner`; make any other state of the outer"),
        ((), "use a plain optimizer"),
    ],
)
def test_an_optimizer_that_keeps_its_state_in_another_one_is_refused_by_name_at_once(shared, what_to_do):
    model = nn.Linear(2, 2)
    outer = Around(Around(torch.optim.AdamW(model.parameters()), shared), ("state", "param_groups"))
    with pytest.raises(UnsupportedState, match=rf"^Around: .* inside it \(`inner`, AdamW\) .*: {what_to_do}"):
        OptimizerState(model, outer)


@pytest.mark.parametrize("container", [list, dict])
def test_several_optimizers_in_one_are_refused_by_name_at_once(container):
    model = nn.Linear(2, 2)
    outer = torch.optim.SGD(model.parameters())
    outer.each = container((name, torch.optim.AdamW([p])) for name, p in model.named_parameters())
    if container is list:
        outer.each = [optimizer for _, optimizer in outer.each]
    with pytest.raises(UnsupportedState, match=r"^SGD: .*: give OptimizerState its `each`"):
        OptimizerState(model, outer)


def test_an_optimizer_around_another_one_with_the_same_state_goes_on_as_if_it_had_not_stopped(tmp_path):
    (saved, optimizer), (fresh, again) = (
        (model, Around(torch.optim.NAdam(model.parameters()), ("state", "param_groups")))
        for model in (WithUnused(1), WithUnused(2))
    )
    ran: list[Any] = []
    optimizer.inner.register_step_post_hook(lambda *args: ran.append(args))
    checkpoint.save({"m": ModelState(saved), "o": OptimizerState(saved, optimizer)}, step=0, run=f"{tmp_path}/0")
    assert ran == []
    train(saved, optimizer)
    checkpoint.save({"m": ModelState(saved), "o": OptimizerState(saved, optimizer)}, step=3, run=str(tmp_path))
    checkpoint.restore({"m": ModelState(fresh), "o": OptimizerState(fresh, again)}, run=str(tmp_path))
    for model, one in ((saved, optimizer), (fresh, again)):
        train(model, one)
    assert_same(dict(fresh.state_dict()), dict(saved.state_dict()))


def test_offloaded_state_loads_into_the_optimizers_own_tensors():
    saved, fresh = Tied(seed=1), Tied(seed=2)
    optimizer, again = torch.optim.AdamW(saved.parameters()), torch.optim.AdamW(fresh.parameters())
    train(saved, optimizer)
    OptimizerState(fresh, again, cpu_offload=True).load_state_dict(
        OptimizerState(saved, optimizer, cpu_offload=True).state_dict()
    )
    assert_same(leaves(state_by_name(fresh, again)), leaves(state_by_name(saved, optimizer)))


def test_a_momentum_that_is_zero_after_a_step_is_not_taken_for_none():
    (saved, optimizer), (fresh, again) = (
        (model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5))
        for model in (nn.Linear(2, 2, bias=False) for _ in range(2))
    )
    saved.weight.grad = torch.zeros(2, 2)
    optimizer.step()

    OptimizerState(fresh, again).load_state_dict(OptimizerState(saved, optimizer).state_dict())

    # Without it the next gradient would come in whole, and not by half.
    assert torch.equal(again.state[fresh.weight]["momentum_buffer"], torch.zeros(2, 2))
