"""The initial state of an optimizer: tensors to load into, where it has none yet.

torch's own way to get it steps the optimizer itself, even for a save: hooks run, the step is counted as its first, and
nothing at all is made while any parameter has a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Adagrad, Optimizer, SparseAdam

from ray_stateful.errors import UnsupportedState
from ray_stateful.wrappers.optimizer_keys import PARAMS

# Optimizers whose constructor makes the state, and whose step relies on it: no parameter may be without.
STARTS_WITH_STATE = (Adagrad,)

# `lr` moves parameters; `weight_decay` adds a gradient of its own, which would be in the first momentum.
_SET_TO_ZERO = ("lr", "weight_decay")

_OUTER_STATE = "make any other state of the outer optimizer a part of its own"


def state_holder(optimizer: Optimizer) -> Optimizer:
    """`optimizer`, or the one inside it that has the same state and groups, and whose step is the plain one.

    Raises:
        UnsupportedState: an optimizer inside it keeps state of its own. Only `optimizer.state` would be saved, which is
            often empty; and to find the initial state, the one inside would really be stepped.
    """
    for name, value in vars(optimizer).items():
        is_several = isinstance(value, (list, tuple, dict))
        for inner in value.values() if isinstance(value, dict) else value if is_several else (value,):
            if not isinstance(inner, Optimizer) or inner is optimizer:
                continue
            same_groups = inner.param_groups is optimizer.param_groups
            if inner.state is optimizer.state and same_groups:
                return state_holder(inner)
            if inner.state is not optimizer.state:
                found = f"state that is kept by an optimizer inside it (`{name}`, {type(inner).__name__})"
                # An outer optimizer with groups of its own (ZeroRedundancyOptimizer) overwrites those of the inner one.
                if same_groups or is_several:
                    what_to_do = f"give OptimizerState its `{name}`; {_OUTER_STATE}"
                else:
                    what_to_do = "use a plain optimizer; to spread its state over the ranks, fully_shard the model"
                raise UnsupportedState(type(optimizer).__name__, found, what_to_do)
    return optimizer


@contextmanager
def gradients_set_aside(optimizer: Optimizer) -> Iterator[None]:
    """Take every gradient off its parameter for the body, and put it back.

    torch skips the initialisation of an optimizer's state while any parameter has a gradient: the moments of a
    checkpoint would be dropped silently.
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
    """The state that `optimizer` would make for `parameters`, which have none; `optimizer` does not keep it.

    It is made by a step with zero gradients and a learning rate of 0; then `step` is set to 0, for not stepped. The
    parameters are copied before that step and restored after it: it may divide by 0, and 0 times the result is not 0
    (float16, `eps=0`, and `capturable=True`, where the step size is among the divisors).

    Raises:
        UnsupportedState: the optimizer can't take such a step.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    step = _bare_step(optimizer)
    # SparseAdam takes sparse gradients only; this one has no elements.
    layout = torch.sparse_coo if isinstance(optimizer, SparseAdam) else torch.strided
    with gradients_set_aside(optimizer), torch.no_grad():
        kept = [local_of(parameter).clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter, layout=layout)
        for group in optimizer.param_groups:
            for name in group.keys() & _SET_TO_ZERO:
                group[name] = torch.zeros_like(group[name]) if isinstance(group[name], torch.Tensor) else 0.0
        try:
            step(optimizer)
        except (TypeError, RuntimeError) as error:
            # Such as an operation that sharded tensors lack (Adafactor).
            found = f"state of an optimizer that can't step here ({str(error).splitlines()[0]})"
            raise UnsupportedState(type(optimizer).__name__, found, _NOT_PER_PARAMETER) from error
        finally:
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.grad = None
                local_of(parameter).copy_(values)
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                # Cleared first, as some optimizers add a count of steps to the group in their first step.
                group.clear()
                group.update(options)
    made = [dict(optimizer.state.pop(parameter, {})) for parameter in parameters]
    for state in made:
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0
    return made


def check_step(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose initial state can't be made: what it saved could not be loaded.

    Raises:
        UnsupportedState: its step has an argument that must be given.
    """
    _, *arguments = inspect.signature(_bare_step(optimizer)).parameters.values()
    needed = [a.name for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if needed:
        found = f"state of an optimizer that can't step without a {needed[0]}"
        raise UnsupportedState(type(optimizer).__name__, found, _NOT_PER_PARAMETER)


def _bare_step(optimizer: Optimizer) -> Callable[[Optimizer], Any]:
    """The bare `step`: its hooks belong to the user's training, and a scheduler counts calls of the bound method."""
    step: Callable[[Optimizer], Any] = inspect.unwrap(type(optimizer).step)
    return step


def is_stand_in(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is one that `initial_state` made, as far as its `step` tells."""
    return is_torchs(optimizer) and not isinstance(optimizer, STARTS_WITH_STATE) and not is_stepped(state)


def is_stepped(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state has seen a step, as far as its `step` tells."""
    return "step" not in state or float(state["step"]) != 0


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether `optimizer` is one of torch's own, and so follows their rules."""
    return type(optimizer).__module__.partition(".")[0] == "torch"


def local_of(value: Any) -> Any:
    """This rank's shard of a DTensor; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


_NOT_PER_PARAMETER = (
    "use one whose state belongs to single parameters, sharded like them; or, where the model is whole on every rank "
    "(plain or DDP), make the optimizer itself a part of the state, without OptimizerState"
)
