"""Learning rate schedulers as part of an optimizer's state: anything with `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ray_stateful.wrappers.optimizer_keys import some


def collect(schedulers: Sequence[Any]) -> dict[str, Any]:
    """The state of one scheduler as it is, of several under their numbers; tensors are copies."""
    if len(schedulers) == 1:
        return dict(_copied(schedulers[0].state_dict()))
    return {str(index): _copied(scheduler.state_dict()) for index, scheduler in enumerate(schedulers)}


def load(schedulers: Sequence[Any], state: Mapping[str, Any]) -> list[str]:
    """Load what `state` has of each scheduler; what it lacks stays as built, and is noted."""
    notes: list[str] = []
    for index, scheduler in enumerate(schedulers):
        given = state if len(schedulers) == 1 else state.get(str(index), {})
        if not given:
            notes.append(f"{type(scheduler).__name__} is not in the checkpoint: starts as built")
            continue
        scheduler.load_state_dict(_completed(scheduler.state_dict(), given))
    return notes


def judge(schedulers: Sequence[Any], missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Notes about the scheduler keys that are on one side only."""
    absent, extra = set(missing), set(unexpected)
    if not schedulers:
        return ["the checkpoint has a scheduler, and there is none here: not loaded"] if extra else []
    notes: list[str] = []
    if absent:
        own = {str(name) for name in collect(schedulers)}
        if {key.partition(".")[0] for key in absent} >= own and not extra:
            notes.append("no scheduler in the checkpoint: starts as built, at the learning rate of the checkpoint")
        else:
            notes.append(f"of the scheduler, {some(absent)} is not in the checkpoint: kept as built")
    if extra:
        notes.append(f"of the scheduler, {some(extra)} is in the checkpoint only: not loaded")
    return notes


def describe(schedulers: Sequence[Any]) -> list[str]:
    """`scheduler LambdaLR at step 1200`, for each."""
    return [
        f"scheduler {type(scheduler).__name__}"
        + (f" at step {step}" if isinstance(step := getattr(scheduler, "last_epoch", None), int) else "")
        for scheduler in schedulers
    ]


def _copied(value: Any) -> Any:
    """`value` with a copy of every tensor in it.

    A learning rate may be a tensor. `SequentialLR` begins with the one of its first scheduler: filled in place, the
    last of two entries would be both.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _completed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs`, with what only `ours` has: a scheduler may rely on entries that an older version did not write."""
    # One entry is taken whole: milestones of here among those of the checkpoint would be neither's schedule.
    completed = {**ours, **theirs}
    for name in ours.keys() & theirs.keys():
        if isinstance(ours[name], tuple) and isinstance(theirs[name], list):
            completed[name] = tuple(theirs[name])
    return completed
