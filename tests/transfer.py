"""What `restore` does with a strict part, in memory: for tests of a part that need no storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ray_stateful.states.part import Reconciled, StrictPart


def snapshot(part: Any) -> dict[str, Any]:
    """The part's state dict as a checkpoint has it: flat, and of no memory that lives on."""
    return {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in flatten(part.state_dict()).items()}


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        where = f"{path}.{name}" if path else name
        flat |= flatten(value, where) if isinstance(value, Mapping) else {where: value}
    return flat


def transfer(saved: Mapping[str, Any], part: StrictPart) -> Reconciled:
    """Fill the part's tensors in place, replace its other leaves, drop what is missing, and load."""
    state = part.state_dict()
    keys = set(flatten(state))
    judged = part.reconcile(frozenset(keys - saved.keys()), frozenset(saved.keys() - keys))
    if not judged.problems:
        part.load_state_dict(_filled(state, {**saved, **{k: saved[s] for k, s in judged.instead.items()}}, ""))
    return judged


def _filled(tree: Mapping[str, Any], saved: Mapping[str, Any], path: str) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for name, value in tree.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            filled[name] = _filled(value, saved, where)
        elif where in saved:
            if isinstance(value, torch.Tensor):
                with torch.no_grad():
                    filled[name] = value.copy_(saved[where])
                filled[name] = value
            else:
                filled[name] = saved[where]
    return filled
