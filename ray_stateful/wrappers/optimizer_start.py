"""The state an optimizer would begin with: tensors to load into, where it has none yet.

torch's own way steps the optimizer itself, whoever asks: its hooks run, its first step is counted, and nothing at all
is made while any parameter has a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from ray_stateful.errors import UnsupportedState
from ray_stateful.wrappers.optimizer_keys import PARAMS


@contextmanager
def gradients_set_aside(optimizer: Optimizer) -> Iterator[None]:
    """Take every gradient off its parameter for the body, and put it back.

    torch skips the initialisation of an optimizer's state while any parameter has a gradient: the moments of a
    checkpoint would be dropped without a word.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group[PARAMS]]
    stashed = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, stashed, strict=True):
            parameter.grad = gradient


def initial_state(optimizer: Optimizer, parameters: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """The state that `optimizer` would make for `parameters`, which have none; it is left without.

    It is made by a step over zero gradients with a learning rate of 0, and then counts as not stepped: `step` is 0.

    Raises:
        UnsupportedState: the optimizer can't take such a step.
    """
    groups = [{key: value for key, value in group.items() if key != PARAMS} for group in optimizer.param_groups]
    # The bare method: hooks on `step` belong to the user's training, and a scheduler counts calls of the bound one.
    step: Callable[[Optimizer], Any] = inspect.unwrap(type(optimizer).step)
    with gradients_set_aside(optimizer), torch.no_grad():
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        try:
            step(optimizer)
        except (TypeError, RuntimeError) as error:
            # A closure that is missing (LBFGS), or an operation that sharded tensors do not have (Adafactor).
            found = f"state of an optimizer that can't step here ({str(error).splitlines()[0]})"
            raise UnsupportedState(type(optimizer).__name__, found, _NOT_PER_PARAMETER) from error
        finally:
            for parameter in parameters:
                parameter.grad = None
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
    made = [dict(optimizer.state.pop(parameter, {})) for parameter in parameters]
    for state in made:
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0
    return made


_NOT_PER_PARAMETER = "use one whose state belongs to single parameters, sharded like them"
