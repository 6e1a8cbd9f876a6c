"""The state an optimizer would begin with: tensors to load into, where it has none yet.

torch's own way steps the optimizer itself, whoever asks: its hooks run, its first step is counted, and nothing at all
is made while any parameter has a gradient.
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

# Its constructor makes the state, and its step relies on it: there is no such thing as a parameter without.
STARTS_WITH_STATE = (Adagrad,)

# The one moves parameters, and the other is a gradient by itself, which would be in the first momentum.
_SET_TO_ZERO = ("lr", "weight_decay")


def state_holder(optimizer: Optimizer) -> Optimizer:
    """`optimizer`, or the one inside it that it shares state and groups with: the step of that one is the plain one.

    Raises:
        UnsupportedState: an optimizer inside it keeps state. What `optimizer.state` has would be saved, often nothing;
            and to be asked what it begins with, the one inside would be stepped.
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
                # With groups of its own, as ZeroRedundancyOptimizer's, the outer one overwrites those inside.
                if same_groups or is_several:
                    what_to_do = f"give OptimizerState its `{name}`; what it keeps beside that needs a part of its own"
                else:
                    what_to_do = "use a plain optimizer; to spread its state over the ranks, fully_shard the model"
                raise UnsupportedState(type(optimizer).__name__, found, what_to_do)
    return optimizer


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

    It is made by a step over zero gradients, a learning rate of 0, and counts as not stepped: `step` is 0. The
    parameters are copied for it, and put back: 0 times what such a step divides by 0 is no 0 (float16, `eps=0`, and
    `capturable=True`, whose step size is among the divisors).

    Raises:
        UnsupportedState: the optimizer can't take such a step.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    step = _bare_step(optimizer)
    # The only gradient it takes is a sparse one; here without elements.
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
            # An operation that sharded tensors do not have (Adafactor).
            found = f"state of an optimizer that can't step here ({str(error).splitlines()[0]})"
            raise UnsupportedState(type(optimizer).__name__, found, _NOT_PER_PARAMETER) from error
        finally:
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.grad = None
                local_of(parameter).copy_(values)
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                # Some count steps in the group, beginning with the first.
                group.clear()
                group.update(options)
    made = [dict(optimizer.state.pop(parameter, {})) for parameter in parameters]
    for state in made:
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0
    return made


def check_step(optimizer: Optimizer) -> None:
    """Refuse an optimizer that can't be asked what it begins with: what was saved could not be loaded.

    Raises:
        UnsupportedState: its step has an argument that must be given.
    """
    _, *arguments = inspect.signature(_bare_step(optimizer)).parameters.values()
    needed = [a.name for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if needed:
        found = f"state of an optimizer that can't step without a {needed[0]}"
        raise UnsupportedState(type(optimizer).__name__, found, _NOT_PER_PARAMETER)


def _bare_step(optimizer: Optimizer) -> Callable[[Optimizer], Any]:
    """The bare method: hooks on `step` belong to the user's training, and a scheduler counts calls of the bound one."""
    step: Callable[[Optimizer], Any] = inspect.unwrap(type(optimizer).step)
    return step


def is_stand_in(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is one that `initial_state` made, as far as its count tells."""
    return is_torchs(optimizer) and not isinstance(optimizer, STARTS_WITH_STATE) and not is_stepped(state)


def is_stepped(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state has seen a step, as far as its count tells."""
    return "step" not in state or float(state["step"]) != 0


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether the rules of torch's own optimizers hold."""
    return type(optimizer).__module__.partition(".")[0] == "torch"


def local_of(value: Any) -> Any:
    """What of a DTensor this rank has; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


_NOT_PER_PARAMETER = (
    "use one whose state belongs to single parameters, sharded like them; or, where the model is whole on every rank "
    "(plain or DDP), make the optimizer itself a part of the state, without OptimizerState"
)
