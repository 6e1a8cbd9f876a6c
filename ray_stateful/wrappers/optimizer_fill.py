"""Copies values into the state of one parameter, which may be nested, and whose tensors stay the same objects."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ray_stateful.wrappers.optimizer_keys import nested


def referred(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """`state` with a weak reference in the place of each tensor, and `None` in that of anything else."""
    found: dict[Any, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found[name] = referred(value)
        else:
            found[name] = weakref.ref(value) if isinstance(value, torch.Tensor) else None
    return found


def merged(live: Mapping[Any, Any], values: Mapping[str, Any], path: str = "") -> dict[Any, Any]:
    """`live` with `values` copied into its tensors; entries that only `values` has are added."""
    found: dict[Any, Any] = {}
    seen: set[str] = set()
    for name, ours in live.items():
        where = f"{path}.{name}" if path else str(name)
        if isinstance(ours, Mapping):
            found[name] = merged(ours, {k: v for k, v in values.items() if k.startswith(f"{where}.")}, where)
            seen |= {key for key in values if key.startswith(f"{where}.")}
        else:
            found[name] = into(ours, values[where]) if where in values else ours
            seen.add(where)
    if not path:
        found.update(nested({key: value for key, value in values.items() if key not in seen}))
    return found


def into(ours: Any, theirs: Any) -> Any:
    """`theirs`, copied into `ours` if that is a tensor, as others may hold references to it."""
    if not isinstance(ours, torch.Tensor):
        # Formats without tuples return them as lists.
        return tuple(theirs) if isinstance(ours, tuple) and isinstance(theirs, list) else theirs
    if ours is theirs:
        return ours
    if not isinstance(theirs, torch.Tensor):
        return ours.fill_(theirs)
    if isinstance(ours, DTensor) and not isinstance(theirs, DTensor):
        whole = theirs.to(ours.device)
        theirs = distribute_tensor(whole, ours.device_mesh, ours.placements, src_data_rank=None)
    return ours.copy_(theirs)
