"""What an optimizer is asked to begin with, without a process group: nothing of it may be seen in the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import adam

from ray_stateful import checkpoint
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from tests.ranks.wrapper_models import assert_same, leaves

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

DIVIDES_BY_ZERO = {
    "float16": (torch.float16, torch.optim.AdamW, {}),
    "float16 and NAdam": (torch.float16, torch.optim.NAdam, {}),
    "no eps": (torch.float32, torch.optim.AdamW, {"eps": 0.0}),
    "no eps, fused": (torch.float32, torch.optim.AdamW, {"eps": 0.0, "fused": True}),
    "RMSprop": (torch.float32, torch.optim.RMSprop, {"eps": 0.0}),
    "capturable": (torch.float32, torch.optim.Adam, {"capturable": True, "foreach": False}),
}


@pytest.mark.parametrize("case", DIVIDES_BY_ZERO)
def test_asking_for_state_makes_no_nan_of_a_parameter(case, monkeypatch):
    # Not for the host, says torch; but nothing of it is a device's.
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *, supports_xla=True: ["cpu"])
    dtype, make, options = DIVIDES_BY_ZERO[case]
    model = nn.Linear(3, 2, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = OptimizerState(model, make(model.parameters(), **options)).state_dict()["optim"]
    assert_same(dict(model.state_dict()), before)
    assert all(value.isfinite().all() for value in flat.values() if isinstance(value, torch.Tensor))


class CountsInItsGroup(torch.optim.SGD):
    """Some optimizers have one count for a group, from the first step on."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        super().step(closure)


def test_asking_for_state_counts_no_step_of_a_group():
    model = nn.Linear(3, 2)
    optimizer = CountsInItsGroup(model.parameters(), lr=0.1, momentum=0.9)
    OptimizerState(model, optimizer).state_dict()
    assert "step" not in optimizer.param_groups[0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


class TwoExperts(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)


def step(expert: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    expert(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weight_decay_is_in_no_momentum_of_a_parameter_without_a_gradient(tmp_path):
    models, states = [TwoExperts(1), TwoExperts(2)], []
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        states.append({"m": ModelState(model), "o": OptimizerState(model, optimizer)})
    step(models[0].used, optimizers[0])
    checkpoint.save(states[0], step=1, run=str(tmp_path))
    checkpoint.restore(states[1], run=str(tmp_path))
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model.unused, optimizer)
    assert_same(
        *(leaves({name: part.state_dict() for name, part in state.items()}) for state in reversed(states)),
    )


def test_counts_are_where_the_options_that_came_with_the_checkpoint_want_them(monkeypatch):
    # `meta` stands for a device of its own.
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *, supports_xla=True: ["meta"])

    def made(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        model = nn.Linear(3, 2, device="meta")
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return model, optimizer, OptimizerState(model, optimizer).state_dict()["optim"]

    *_, theirs = made(capturable=True)
    model, optimizer, ours = made()
    loaded = {key: value if isinstance(value, torch.Tensor) else theirs[key] for key, value in ours.items()}
    OptimizerState(model, optimizer).load_state_dict({"optim": loaded})

    assert {state["step"].device.type for state in optimizer.state.values()} == {"meta"}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
