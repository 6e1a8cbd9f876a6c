"""The values of one optimizer's state: reading them by parameter name, and putting them back exactly.

State is copied into the optimizer's own tensors, never through `Optimizer.load_state_dict`, which casts everything
to the parameter's dtype: float32 moments of a bfloat16 parameter, or 8-bit moments, would come back changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ray_stateful.errors import UnsupportedState
from ray_stateful.wrappers.optimizer_fill import into, merged, referred
from ray_stateful.wrappers.optimizer_keys import (
    PARAM_GROUPS,
    PARAM_NAMES,
    PARAMS,
    STATE,
    ByName,
    check_hyperparameters,
    check_state,
    leaves,
    of_group,
)
from ray_stateful.wrappers.optimizer_start import (
    STARTS_WITH_STATE,
    initial_state,
    is_stand_in,
    is_stepped,
    is_torchs,
    local_of,
)

_PLAIN = (int, float, bool, str, type(None))


@dataclass(slots=True)
class BoundOptimizer:
    """An optimizer whose parameters have names: `keys`, which are unique, in the order of the groups."""

    optimizer: Optimizer
    keys: dict[torch.Tensor, str] = field(default_factory=dict)
    # What the last state_dict() handed out for parameters without state, so that `load` takes over the filled tensors
    # and does not copy them. Weak references: the zeros that a save made for an unused expert are not kept. Nested as
    # the optimizer has it: flat names do not tell the key 0 from "0".
    _offered: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def groups(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, torch.Tensor]]]]:
        """Every group with its parameters and their keys."""
        for group in self.optimizer.param_groups:
            yield group, [(self.keys[parameter], parameter) for parameter in group[PARAMS]]

    def members(self) -> list[list[str]]:
        """The keys of the parameters of each group."""
        return [[key for key, _ in members] for _, members in self.groups()]

    @property
    def expected(self) -> dict[str, frozenset[str]]:
        """The names in the state of each parameter: its own, or those that `state_dict` last offered for filling."""
        return {
            key: frozenset(
                name for name, _ in leaves(self._offered.get(key) or self.optimizer.state.get(parameter, {}))
            )
            for key, parameter in self.parameters()
        }

    @property
    def trained(self) -> frozenset[str]:
        """Keys of the parameters that can have state."""
        return frozenset(key for key, parameter in self.parameters() if parameter.requires_grad)

    @property
    def owned(self) -> frozenset[str]:
        """Keys of all parameters."""
        return frozenset(key for key, _ in self.parameters())

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every key and parameter."""
        for _, members in self.groups():
            yield from members

    def state_dict(self) -> dict[str, Any]:
        """The flat entries; tensors alias the optimizer's own, or are new ones to fill where it has none yet.

        Raises:
            UnsupportedState: a value can't be saved here and loaded on other ranks; names its key.
        """
        flat: dict[str, Any] = {}
        offered = self._templates()
        for group, members in self.groups():
            for key, parameter in members:
                state = offered.get(key, self.optimizer.state.get(parameter, {}))
                for name, value in leaves(state):
                    flat[f"{STATE}.{key}.{name}"] = self._checked(f"{STATE}.{key}.{name}", name, value, parameter)
                for name, value in group.items():
                    if name not in (PARAMS, PARAM_NAMES):
                        # One copy per parameter: two groups that become one would fill a shared tensor, which would
                        # hide a conflict between them.
                        own = value.clone() if isinstance(value, torch.Tensor) else value
                        flat[f"{PARAM_GROUPS}.{key}.{name}"] = own
        self._offered = {key: referred(state) for key, state in offered.items()}
        return flat

    def _templates(self) -> dict[str, dict[str, Any]]:
        """State for the trainable parameters that have none: they never had a gradient, or no step was made yet."""
        started = any(self.optimizer.state.get(parameter) for _, parameter in self.parameters())
        lacking: list[tuple[str, torch.Tensor]] = []
        for group, members in self.groups():
            # With dampening, the first momentum is the gradient itself, so a buffer of zeros is not the same as none,
            # and no step count tells the two apart. So such state is made only to be loaded into, before the first
            # step. A checkpoint saved then has it as well; a load recognises it by its negative zeros.
            if started and group.get("dampening"):
                continue
            lacking += [pair for pair in members if pair[1].requires_grad and not self.optimizer.state.get(pair[1])]
        if not lacking:
            return {}
        made = initial_state(self.optimizer, [parameter for _, parameter in lacking])
        dampened = {parameter for group, members in self.groups() if group.get("dampening") for _, parameter in members}
        for (_, parameter), state in zip(lacking, made, strict=True):
            for value in state.values() if parameter in dampened else ():
                local_of(value).fill_(-0.0)
        return {key: state for (key, _), state in zip(lacking, made, strict=True)}

    def _checked(self, key: str, name: str, value: Any, parameter: torch.Tensor) -> Any:
        """`value`, if any rank may load it; otherwise raises `UnsupportedState`."""
        if isinstance(value, DTensor):
            if any(placement.is_partial() for placement in value.placements):
                raise UnsupportedState(key, "a sum that is still spread over the ranks (Partial)", _NOT_SHAPED)
            return value
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter):
                raise UnsupportedState(key, f"a tensor of type {type(value).__qualname__}", _NOT_SHAPED)
        elif not isinstance(value, _PLAIN) and not (
            isinstance(value, tuple) and all(isinstance(item, _PLAIN) for item in value)
        ):
            raise UnsupportedState(key, f"a {type(value).__qualname__}", _NOT_SHAPED)
        if isinstance(parameter, DTensor) and not self._same_on_all_ranks(name, value):
            raise UnsupportedState(key, "a value of this rank's own beside a sharded parameter", _NOT_SHAPED)
        return value

    def _same_on_all_ranks(self, name: str, value: Any) -> bool:
        """Whether an unsharded entry of a sharded parameter's state can be stored once for all ranks.

        DCP stores an unsharded entry once, by name: one rank's factors would silently become every rank's. Counts
        are the same on all ranks, and so are the scalars of torch's own optimizers, which follow from counts.
        """
        if isinstance(value, torch.Tensor):
            return value.numel() == 1 and (name == "step" or is_torchs(self.optimizer))
        return not isinstance(value, float) or name == "step" or is_torchs(self.optimizer)

    def check_groups(self, hyper: ByName) -> None:
        """Refuse hyperparameters that differ within a group, with a `ValueError`."""
        for members in self.members():
            check_hyperparameters(members, hyper)

    def check(self, state: ByName, hyper: ByName) -> None:
        """Refuse what does not fit, before anything is touched. Parameters of other optimizers are ignored.

        Like `load`, collective for sharded parameters with dampened momentum.

        Raises:
            ValueError: hyperparameters differ within a group, shapes differ, or part of a parameter's state is missing.
            UnsupportedState: the optimizer can't make the state that is to be filled.
        """
        self.check_groups(hyper)
        starting = self._initial(state)
        for key, parameter in self.parameters():
            if key in state:
                ours = dict(leaves(starting.get(key) or self.optimizer.state.get(parameter, {})))
                check_state(key, state[key], ours, dict(leaves(self._offered.get(key, ours))))

    def _initial(self, given: ByName) -> dict[str, dict[str, Any]]:
        """The state to be filled of the parameters that have none, and were offered none that is filled already."""
        dampened = self._dampened()
        lacking = [
            (key, parameter)
            for key, parameter in self.parameters()
            if (values := given.get(key))
            and not self.optimizer.state.get(parameter)
            and not self._is_offer(key, values)
            and is_stepped(values)
            and not self._is_stand_in(values, key in dampened)
        ]
        if not lacking:
            return {}
        made = initial_state(self.optimizer, [parameter for _, parameter in lacking])
        return {key: state for (key, _), state in zip(lacking, made, strict=True)}

    def load(self, state: ByName, hyper: ByName) -> list[str]:
        """Load what is given for this optimizer's parameters, after a `check`; one without state starts fresh.

        Returns:
            The keys of the parameters that got their state.
        """
        with torch.no_grad():
            loaded = self._load_state(state)
        for group, members in self.groups():
            for name, value in of_group([key for key, _ in members], hyper).items():
                group[name] = into(group.get(name), value)
            if is_torchs(self.optimizer):
                self._place_counts(group, [parameter for _, parameter in members])
        self._offered = {}
        return loaded

    def _place_counts(self, group: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> None:
        """Put step counts on the device that the group's options require; these may come from the checkpoint.

        The rule is that of `torch.optim.Optimizer.load_state_dict`: on the parameter's device if the group is `fused`
        or `capturable`, as their steps accept nothing else.
        """
        for parameter in parameters:
            state = self.optimizer.state.get(parameter, {})
            if not isinstance(state.get("step"), torch.Tensor):
                continue
            if group.get("capturable") or group.get("fused"):
                state["step"] = state["step"].to(dtype=torch.float32, device=parameter.device)
            elif "capturable" in group or "fused" in group:
                state["step"] = state["step"].cpu()

    def _load_state(self, given: ByName) -> list[str]:
        loaded: list[str] = []
        dampened, starting = self._dampened(), self._initial(given)
        for key, parameter in self.parameters():
            values: Mapping[str, Any] = given.get(key, {})
            if self._is_stand_in(values, key in dampened):
                # Saved without ever having had a gradient. It goes on as it would have: without state, even if there
                # is some here. Entries other than the count are as after one step: NAdam's mu_product is not 1.
                values = {}
            live = self.optimizer.state.get(parameter)
            if not values:
                if not isinstance(self.optimizer, STARTS_WITH_STATE):
                    self.optimizer.state.pop(parameter, None)
            elif live or is_stepped(values):
                # Copied into what is here; but what was offered is filled already, and is taken over.
                begun = starting[key] if key in starting else self._offered.get(key, {})
                self.optimizer.state[parameter] = merged(live or begun, values)
                loaded.append(key)
        return loaded

    def _dampened(self) -> set[str]:
        """Keys of the parameters whose momentum begins with the first gradient itself."""
        return {key for group, members in self.groups() if group.get("dampening") for key, _ in members}

    def _is_stand_in(self, values: Mapping[str, Any], is_dampened: bool) -> bool:
        """Whether a parameter's state was made by `_templates`, and saved unchanged."""
        if is_dampened and is_torchs(self.optimizer) and all(map(_is_negative_zero, values.values())):
            return True
        return is_stand_in(self.optimizer, values)

    def _is_offer(self, key: str, values: Mapping[str, Any]) -> bool:
        offer = dict(leaves(self._offered.get(key, {})))
        return set(offer) == set(values) and all(ref is None or ref() is values[name] for name, ref in offer.items())


_NOT_SHAPED = (
    "only state that is sharded like its parameter, replicated, or a count can be loaded by other ranks; keep such "
    "state in a DTensor, or use another optimizer"
)


def bind(optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> dict[torch.Tensor, str]:
    """The name of each parameter of `optimizer`.

    Raises:
        ValueError: it has a parameter that `names` does not know.
    """
    keys: dict[torch.Tensor, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group[PARAMS]):
            if parameter not in names:
                raise ValueError(
                    f"parameter {position} of group {index} of {type(optimizer).__name__}, of shape "
                    f"{tuple(parameter.shape)}, is not in the model: build the optimizer after the model was wrapped, "
                    "and pass every part of the model"
                )
            keys[parameter] = names[parameter]
    return keys


def _is_negative_zero(value: Any) -> bool:
    """Whether every element is -0.0. Collective over a DTensor's mesh: an empty shard can't tell by itself."""
    local = local_of(value)
    if not isinstance(local, torch.Tensor):
        return False
    answer = ((local == 0) & local.signbit()).all()
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is not None:
        mesh = value.device_mesh
        everyones = DTensor.from_local(answer.int().view(1).to(mesh.device_type), mesh, [Shard(0)] * mesh.ndim)
        answer = everyones.full_tensor().all()
    return bool(answer)
