"""The optimizer of a `FullyShardedDataParallel` model, whose parameters are flat: torch's own conversions name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ray_stateful.wrappers.optimizer_keys import (
    PARAM_GROUPS,
    PARAMS,
    STATE,
    ByName,
    check_hyperparameters,
    check_state,
    flatten,
    leaves,
    nested,
    of_group,
)
from ray_stateful.wrappers.optimizer_start import gradients_set_aside, initial_state, is_stand_in
from ray_stateful.wrappers.sharded_tensors import as_dtensor, into_sharded


class Fsdp1Optimizer:
    """Like `BoundOptimizer`, with the same keys. `state_dict`, `look` and `load` are collective."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._groups: list[list[str]] = []
        self._names: dict[str, frozenset[str]] = {}
        # Held from `look` to `load` only: torch hands out clones, and two moments take a lot of a device's memory.
        self._live: dict[str, Any] = {}

    def members(self) -> list[list[str]]:
        """The keys of the parameters of each group, as of the last `state_dict` or `look`."""
        return self._groups

    @property
    def expected(self) -> dict[str, frozenset[str]]:
        """The names in the state of each parameter, as of the last `state_dict`."""
        return self._names

    @property
    def trained(self) -> frozenset[str]:
        """Keys of the parameters that have state."""
        return frozenset(key for key, names in self._names.items() if names)

    def state_dict(self) -> dict[str, Any]:
        """The flat entries, sharded."""
        return {key: as_dtensor(value) for key, value in self._flat().items()}

    def _flat(self) -> dict[str, Any]:
        """The flat entries as torch returns them."""
        with gradients_set_aside(self.optimizer):
            lacking = _begin(self.optimizer)
            try:
                state: dict[str, Any] = dict(get_optimizer_state_dict(self.model, self.optimizer))
            finally:
                for parameter in lacking:
                    self.optimizer.state.pop(parameter, None)
        self._groups = [list(group[PARAMS]) for group in state[PARAM_GROUPS]]
        self._names = {key: frozenset() for group in self._groups for key in group}
        self._names |= {key: frozenset(name for name, _ in leaves(values)) for key, values in state[STATE].items()}
        return flatten(state)

    @property
    def owned(self) -> frozenset[str]:
        """Keys of all parameters, as of the last `state_dict` or `look`."""
        return frozenset(self._names)

    def look(self) -> None:
        """Fetch the current state, which `load` fills."""
        self._live = self._flat()

    def check(self, state: ByName, hyper: ByName) -> None:
        """Refuse what does not fit, after a `look` and before anything is touched.

        Raises:
            ValueError: hyperparameters differ within a group, shapes differ, or part of a parameter's state is missing.
        """
        live, self._live = self._live, {}
        self.check_groups(hyper)
        for key in sorted(state.keys() & self._names.keys()):
            ours = {name: live.get(f"{STATE}.{key}.{name}") for name in self._names[key]}
            check_state(key, state[key], ours, ours)
        self._live = live

    def check_groups(self, hyper: ByName) -> None:
        """Refuse hyperparameters that differ within a group, with a `ValueError` on this rank alone."""
        for group in self._groups:
            check_hyperparameters(group, hyper)

    def load(self, state: ByName, hyper: ByName) -> list[str]:
        """Load what is given for this optimizer's parameters, after a `look`; returns the keys that got state."""
        groups = []
        for keys, live in zip(self._groups, self.optimizer.param_groups, strict=True):
            values = {name: value for name, value in live.items() if name != PARAMS}
            for name, value in of_group(keys, hyper).items():
                values[name] = tuple(value) if isinstance(values.get(name), tuple) else value
            groups.append({**values, PARAMS: keys})
        states = {
            key: nested({n: into_sharded(self._live.get(f"{STATE}.{key}.{n}"), value) for n, value in values.items()})
            for key, values in state.items()
            if key in self._names
        }
        with gradients_set_aside(self.optimizer):
            _begin(self.optimizer)
            given: dict[str, Any] = {STATE: states, PARAM_GROUPS: groups}
            options = StateDictOptions(strict=False)
            set_optimizer_state_dict(self.model, self.optimizer, given, options=options)
        self._live = {}
        # A parameter that was saved before its first step goes on without state, as it would have. Its stored state is
        # of no use: all but the count is as after a step (NAdam's `mu_product` is not 1).
        for parameter, stored in list(self.optimizer.state.items()):
            if is_stand_in(self.optimizer, stored):
                del self.optimizer.state[parameter]
        return list(states)


def _begin(optimizer: Optimizer) -> list[torch.Tensor]:
    """Give an optimizer that has no state its initial state; returns the parameters that got it.

    torch would step the optimizer to get it, which runs hooks and counts as its first step.
    """
    if optimizer.state:
        return []
    lacking = [p for group in optimizer.param_groups for p in group[PARAMS] if p.requires_grad]
    optimizer.state.update(zip(lacking, initial_state(optimizer, lacking), strict=True))
    return lacking
