"""The flat keys of an optimizer's state: by parameter name, as DCP's flattened layout has them. Pure.

    state.<parameter>.<name>            one entry of one parameter's state; nested dicts add further names
    param_groups.<parameter>.<name>     a hyperparameter of the group that the parameter is in

Nothing is stored by group or by number, so parameters may be regrouped, reordered or moved to other optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

STATE = "state"
PARAM_GROUPS = "param_groups"
PARAMS = "params"
# A group's list of its parameters' names, which describes the optimizer at hand: nothing to restore.
PARAM_NAMES = "param_names"

ByName: TypeAlias = Mapping[str, Mapping[str, Any]]


def leaves(state: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a nested dict, under names joined by dots."""
    for name, value in state.items():
        where = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from leaves(value, where)
        else:
            yield where, value


def flatten(optim: Mapping[str, Any]) -> dict[str, Any]:
    """`optim` in the flat layout; converts the nested one, `{"state", "param_groups"}`.

    Raises:
        ValueError: the parameters are numbered, not named.
    """
    if not isinstance(optim.get(STATE), Mapping):
        return dict(optim)
    flat = {f"{STATE}.{key}": value for key, value in leaves(optim[STATE])}
    names = list(optim[STATE])
    for group in optim.get(PARAM_GROUPS, ()):
        names += group[PARAMS]
        for parameter in group[PARAMS]:
            for name, value in group.items():
                if name not in (PARAMS, PARAM_NAMES):
                    flat[f"{PARAM_GROUPS}.{parameter}.{name}"] = value
    numbered = [name for name in names if not isinstance(name, str)]
    if numbered:
        raise ValueError(
            f"optimizer state is stored by number ({numbered[0]!r}), which says nothing about the parameter once "
            "groups or world size change; pass what OptimizerState.state_dict() or get_optimizer_state_dict() returns"
        )
    return flat


def split(
    keys: Iterable[str], parameters: frozenset[str]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]], list[str]]:
    """Sort flat keys by the parameter they belong to.

    Returns:
        `state` and `param_groups`, each parameter to name to flat key; and the keys of none of `parameters`.
    """
    found: dict[str, dict[str, dict[str, str]]] = {STATE: {}, PARAM_GROUPS: {}}
    unknown: list[str] = []
    for key in keys:
        kind, _, rest = key.partition(".")
        # Parameter names contain dots, and so may names of nested state; but no parameter lies inside another. Searched
        # from the end, where the parameter's name mostly stops.
        owner = next((rest[:dot] for dot in _dots(rest) if rest[:dot] in parameters), None)
        if kind not in found or owner is None:
            unknown.append(key)
        else:
            found[kind].setdefault(owner, {})[rest[len(owner) + 1 :]] = key
    return found[STATE], found[PARAM_GROUPS], unknown


def by_parameter(flat: Mapping[str, Any], parameters: frozenset[str]) -> tuple[ByName, ByName]:
    """The values of `state` and `param_groups`, each parameter to name to value; leaves out unknown parameters."""
    state, hyper, _ = split(flat, parameters)
    of_state, of_hyper = (
        {key: {name: flat[where] for name, where in names.items()} for key, names in found.items()}
        for found in (state, hyper)
    )
    return of_state, of_hyper


def of_group(members: Iterable[str], hyper: ByName) -> dict[str, Any]:
    """The hyperparameters of a group: each from the first member that has it in `hyper`; members may be new."""
    found: dict[str, Any] = {}
    for key in members:
        for name, value in hyper.get(key, {}).items():
            if name not in (PARAMS, PARAM_NAMES):
                found.setdefault(name, value)
    return found


def _dots(text: str) -> Iterator[int]:
    dot = text.rfind(".")
    while dot != -1:
        yield dot
        dot = text.rfind(".", 0, dot)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = root
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return root


def check_hyperparameters(members: Sequence[str], hyper: ByName) -> None:
    """Refuse hyperparameters that differ within one group.

    Raises:
        ValueError: names two parameters and their values.
    """
    first: dict[str, str] = {}
    for key in members:
        for name, value in hyper.get(key, {}).items():
            other = first.setdefault(name, key)
            if not equal(hyper[other][name], value):
                one, two = (f"{PARAM_GROUPS}.{of}.{name}" for of in (other, key))
                raise ValueError(
                    f"{one!r} is {hyper[other][name]!r} and {two!r} is {value!r}, but both parameters are in one group "
                    "here; keep them in groups of their own"
                )


def check_state(key: str, given: Mapping[str, Any], ours: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Refuse state of parameter `key` that does not fit.

    Args:
        ours: What it will be copied into, by name.
        expected: The names that have to be there.

    Raises:
        ValueError: shapes differ, or names are missing.
    """
    for name, theirs in given.items():
        mine = ours.get(name)
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor) and mine.size() != theirs.size():
            where = f"{STATE}.{key}.{name}"
            raise ValueError(f"{where!r} has shape {tuple(theirs.size())}, and {tuple(mine.size())} here")
    absent = sorted(set(expected) - given.keys())
    if absent:
        raise ValueError(f"{STATE}.{key} lacks {absent}: part of a parameter's state is of no use")


def equal(one: Any, other: Any) -> bool:
    """Whether two hyperparameters are the same: numbers, tensors, or lists and tuples."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other)


def judge(
    missing: Iterable[str],
    unexpected: Iterable[str],
    expected: Mapping[str, frozenset[str]],
    trained: frozenset[str],
) -> tuple[list[str], list[str]]:
    """Problems and notes about the keys that only the optimizer has, or only the checkpoint.

    Args:
        expected: The names in the state of each of this rank's parameters.
        trained: The parameters that can have state.
    """
    problems: list[str] = []
    notes: list[str] = []
    owned = frozenset(expected)
    state, hyper, _ = split(missing, owned)
    without = [key for key, names in state.items() if names.keys() >= expected[key]]
    for key, names in sorted(state.items()):
        if not names.keys() >= expected[key]:
            problems += [
                f"{where} is not in the checkpoint, but other state of its parameter is" for where in names.values()
            ]
    if without:
        notes.append(
            f"no state in the checkpoint for {some(without)}: never had a gradient, or was frozen; starts fresh"
        )
    notes += [f"{name} of {some(keys)} is not in the checkpoint: as the group has it" for name, keys in _by_name(hyper)]

    state, hyper, elsewhere = split(unexpected, owned)
    for key, names in sorted(state.items()):
        if key in trained:
            problems += [
                f"{where} is in the checkpoint, but the optimizer here keeps no such state" for where in names.values()
            ]
    frozen = [key for key in state if key not in trained]
    if frozen:
        notes.append(f"the checkpoint has state for {some(frozen)}, which is frozen here: not loaded")
    notes += [f"{name} of {some(keys)} is in the checkpoint only: not loaded" for name, keys in _by_name(hyper)]
    if elsewhere:
        notes.append(
            f"the checkpoint has state of parameters that are not optimized here: {some(elsewhere)}: not loaded"
        )
    return problems, notes


def some(keys: Iterable[str]) -> str:
    """The first three of `keys` as text, and how many more there are."""
    found = sorted(keys)
    more = "" if len(found) <= 3 else f" and {len(found) - 3} more"
    return ", ".join(found[:3]) + more


def _by_name(hyper: Mapping[str, Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    names: dict[str, list[str]] = {}
    for key, found in hyper.items():
        for name in found:
            names.setdefault(name, []).append(key)
    return sorted(names.items())
