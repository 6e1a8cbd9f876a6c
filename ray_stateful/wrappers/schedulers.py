"""Learning rate schedulers as part of an optimizer's state: anything with `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.optim.lr_scheduler import LRScheduler

from ray_stateful.wrappers.optimizer_keys import some
from ray_stateful.wrappers.scheduler_groups import regrouped

# The hyperparameters that the checkpoint has for each group of an optimizer, None for a group without parameters; None
# if the optimizer is not known.
Groups: TypeAlias = Sequence[Mapping[str, Any] | None] | None

# Where SequentialLR and ChainedScheduler keep the schedulers that they are made of.
_INNER = "_schedulers"


def collect(schedulers: Sequence[Any]) -> dict[str, Any]:
    """The state of a single scheduler as it is, or of several under their numbers; tensors are copies."""
    if len(schedulers) == 1:
        return dict(_copied(schedulers[0].state_dict()))
    return {str(index): _copied(scheduler.state_dict()) for index, scheduler in enumerate(schedulers)}


def load(schedulers: Sequence[Any], state: Mapping[str, Any], groups: Sequence[Groups]) -> list[str]:
    """Load what `state` has for each scheduler, after a `check`; what it lacks stays as built. Returns notes.

    Args:
        groups: Those of each scheduler's optimizer; see `regrouped`. None where it is not known.
    """
    notes = differences(schedulers, state)
    for scheduler, given, of in zip(schedulers, _each(schedulers, state), groups, strict=True):
        if given:
            ours = scheduler.state_dict()
            scheduler.load_state_dict(_completed(ours, given if of is None else _regrouped(ours, given, of)))
    return notes


def differences(schedulers: Sequence[Any], state: Mapping[str, Any]) -> list[str]:
    """What will not be as it was saved, but is no reason to refuse `state`, one line each."""
    notes: list[str] = []
    for scheduler, given in zip(schedulers, _each(schedulers, state), strict=True):
        if not given:
            notes.append(f"{type(scheduler).__name__} is not in the checkpoint: starts as built")
        elif isinstance(scheduler, LRScheduler):
            lacking, extra = _on_one_side(scheduler.state_dict(), given)
            notes += _only_here(lacking) if lacking else []
            notes += [f"of the scheduler, {some(extra)} is in the checkpoint, and not in a fresh one"] if extra else []
    return notes


def check(schedulers: Sequence[Any], state: Mapping[str, Any], groups: Sequence[Groups]) -> list[str]:
    """What keeps `state` from being loaded: more schedulers than here, a different kind, or ambiguous groups."""
    num_saved = len(state) if _is_numbered(schedulers, state) else 1
    if schedulers and state and num_saved > len(schedulers):
        return [
            f"schedulers in the checkpoint: {num_saved}, and here: {len(schedulers)}; give OptimizerState those that "
            "were saved, or none, and the schedule starts as built"
        ]
    problems: list[str] = []
    for scheduler, given, of in zip(schedulers, _each(schedulers, state), groups, strict=True):
        name, ours = type(scheduler).__name__, scheduler.state_dict()
        if isinstance(scheduler, LRScheduler) and given:
            problems += _other_kind(name, ours, given)
        if of is not None and given and not problems:
            try:
                _regrouped(ours, given, of)
            except ValueError as error:
                problems.append(f"{name} {error}")
    return problems


def has_tensors(value: Any) -> bool:
    """Whether there are tensors in `value`: rates in tensors can't be compared before they are read."""
    if isinstance(value, Mapping):
        return any(map(has_tensors, value.values()))
    return any(map(has_tensors, value)) if isinstance(value, (list, tuple)) else isinstance(value, torch.Tensor)


def _is_numbered(schedulers: Sequence[Any], state: Mapping[str, Any]) -> bool:
    """Whether `state` is of several schedulers, under their numbers."""
    # A scheduler that is made of others may number their states itself.
    if len(schedulers) == 1 and schedulers[0].state_dict().keys() == state.keys():
        return False
    numbers = {str(number) for number in range(len(state))}
    return state.keys() == numbers and all(isinstance(given, Mapping) for given in state.values())


def _each(schedulers: Sequence[Any], state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The saved state of each scheduler, by its number; empty for new ones, which come last."""
    is_numbered = bool(state) and _is_numbered(schedulers, state)
    saved = [state[str(number)] for number in range(len(state))] if is_numbered else [state]
    return [saved[number] if number < len(saved) else {} for number in range(len(schedulers))]


def _on_one_side(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The names only in `ours` and only in `theirs`, without private ones and `verbose`, which torch has dropped."""
    here, there = ({name for name in side if not name.startswith("_") and name != "verbose"} for side in (ours, theirs))
    return here - there, there - here


def _other_kind(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    lacking, extra = _on_one_side(ours, theirs)
    if lacking and extra:
        return [
            f"the scheduler in the checkpoint is of a different kind from the {name} here: it has {some(extra)} but "
            f"not {some(lacking)}; build the one that was saved, or leave it out of OptimizerState"
        ]
    inner, saved = ours.get(_INNER, ()), theirs.get(_INNER, ())
    if len(inner) != len(saved):
        return [
            f"{name} has {len(inner)} schedulers in it, and the one in the checkpoint has {len(saved)}: build the one "
            "that was saved, or leave it out of OptimizerState"
        ]
    return [
        problem
        for number, pair in enumerate(zip(inner, saved, strict=True))
        for problem in _other_kind(f"{name}[{number}]", *pair)
    ]


def _regrouped(ours: Mapping[str, Any], theirs: Mapping[str, Any], groups: Sequence[Mapping[str, Any] | None]) -> Any:
    """As `regrouped`, but also for the schedulers inside."""
    found = regrouped(ours, theirs, groups)
    if _INNER in ours and _INNER in found:
        pairs = zip(ours[_INNER], found[_INNER], strict=True)
        found[_INNER] = [_regrouped(mine, saved, groups) for mine, saved in pairs]
    return found


def judge(schedulers: Sequence[Any], missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Notes about the keys that only the schedulers here have, or only the checkpoint."""
    absent, extra = set(missing), set(unexpected)
    if not schedulers:
        return ["the checkpoint has a scheduler, and there is none here: not loaded"] if extra else []
    notes: list[str] = []
    if absent:
        own = {str(name) for name in collect(schedulers)}
        if {key.partition(".")[0] for key in absent} >= own and not extra:
            notes.append("no scheduler in the checkpoint: starts as built, at the learning rate of the checkpoint")
        else:
            notes += _only_here(absent)
    if extra:
        notes.append(f"of the scheduler, {some(extra)} is in the checkpoint only: not loaded")
    return notes


def _only_here(names: Iterable[str]) -> list[str]:
    return [f"of the scheduler, {some(names)} is not in the checkpoint: kept as built"]


def describe(schedulers: Sequence[Any]) -> list[str]:
    """`scheduler LambdaLR at step 1200`, for each."""
    return [
        f"scheduler {type(scheduler).__name__}"
        + (f" at step {step}" if isinstance(step := getattr(scheduler, "last_epoch", None), int) else "")
        for scheduler in schedulers
    ]


def _copied(value: Any) -> Any:
    """`value` with a copy of every tensor in it.

    A learning rate may be a tensor, which `SequentialLR` shares with its first scheduler: filled in place, both
    entries would get the value that is read last.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _completed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs`, plus what only `ours` has: a scheduler may rely on entries that an older version did not write."""
    # Each entry is taken whole: a mix of the milestones here and those of the checkpoint would be neither schedule.
    return {**ours, **_typed(ours, theirs)}


def _typed(ours: Any, theirs: Any) -> Any:
    """`theirs` with the types of `ours` that DCP does not keep: tuples, `Counter`s, and ints as the keys of a dict."""
    if isinstance(ours, tuple) and isinstance(theirs, list):
        return tuple(theirs)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [_typed(*pair) for pair in zip(ours, theirs, strict=True)]
    if type(ours) not in (dict, Counter) or not isinstance(theirs, Mapping):
        return theirs
    numbers = {str(key): key for key in ours if type(key) is int}
    # Ints first: a plain `dcp.load` leaves the value here under 2, and adds that of the checkpoint under "2".
    found = {
        numbers.get(key, key): _typed(ours.get(numbers.get(key, key)), value)
        for key, value in sorted(theirs.items(), key=lambda item: isinstance(item[0], str))
    }
    return Counter(found) if type(ours) is Counter else found
