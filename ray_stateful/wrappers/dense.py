"""The shards of a model: how entries are stored, and loading values into live parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from ray_stateful.errors import UnsupportedState
from ray_stateful.wrappers.model_keys import EXTRA_STATE, further_names, tied_head
from ray_stateful.wrappers.sharded_tensors import as_dtensor, into_sharded
from ray_stateful.wrappers.shards import whole


def is_extra(key: str) -> bool:
    """Whether `key` is of a module's `_extra_state`, which may be absent or differ in size at any load."""
    return EXTRA_STATE in key.split(".")


def joined(entries: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The entries of all parts of a model, as they are stored; and the keys under which two parts differ.

    Stages of a pipeline may each have a buffer of the same name, the frequencies of a rotary embedding for example. It
    is stored once, so that the stages may be cut differently when they are loaded.

    Raises:
        UnsupportedState: as `stored`.
    """
    found: dict[str, Any] = {}
    different: list[str] = []
    for key, value in entries:
        # Extra state may differ at any load.
        if key in found and not is_extra(key) and _differ(found[key], value):
            different.append(key)
        found[key] = value
    return {key: stored(key, value) for key, value in found.items()}, different


def _differ(one: Any, other: Any) -> bool:
    one, other = (value.to_local() if isinstance(value, DTensor) else value for value in map(as_dtensor, (one, other)))
    if not all(isinstance(value, torch.Tensor) and _is_strided(value) for value in (one, other)):
        return False
    # A parameter that two parts share is the same tensor in both; and parts may be on different devices.
    return one.data_ptr() != other.data_ptr() and not torch.equal(one, other.to(one.device))


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def stored(key: str, value: Any) -> Any:
    """`value` as it is stored: extra state in a tensor becomes bytes.

    Transformer Engine pickles into a tensor whose length changes from version to version. Stored as a tensor, it could
    only be loaded into one of equal length, and a load would fail where skipping it is harmless.

    Raises:
        UnsupportedState: its elements share memory. It could be saved, but nothing can be loaded into it.
    """
    if type(value) in (torch.Tensor, nn.Parameter) and _repeats_itself(value):
        raise UnsupportedState(
            key,
            f"a view that repeats fewer elements than its shape {tuple(value.shape)} has (expand()), which nothing can "
            "be loaded into,",
            "give it memory of its own, with .clone()",
        )
    if is_extra(key) and isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1:
        return value.detach().cpu().numpy().tobytes()
    return as_dtensor(value)


def _repeats_itself(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_shapes(own: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> None:
    """Refuse tensors whose shape differs from the model's, before any is loaded.

    Raises:
        ValueError: lists all of them.
    """
    refuse_shapes(
        (name, theirs.shape, ours.shape)
        for mine, values in zip(own, given, strict=True)
        for name, theirs in values.items()
        if isinstance(ours := as_dtensor(mine[name]), torch.Tensor)
        and isinstance(theirs, torch.Tensor)
        and not is_extra(name)
    )


def refuse_shapes(shapes: Iterable[tuple[str, torch.Size, torch.Size]]) -> None:
    """Refuse what has a different shape from the model's: names, with the shape that is given and the model's.

    Raises:
        ValueError: lists all of them.
    """
    found = [
        f"  {name}: {tuple(theirs)} given, {tuple(ours)} in the model"
        for name, theirs, ours in shapes
        if theirs != ours
    ]
    if found:
        raise ValueError("shapes of the model do not fit; nothing was loaded:\n" + "\n".join(found))


def load(part: nn.Module, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Load `given`, whose names are among those of `own`, the live entries of `part`."""
    values = {name: _like(own[name], value) for name, value in given.items()}
    tied = tied_head(part)
    if tied is not None and tied[1] in values:
        values[tied[0]] = values[tied[1]]
    if FullyShardedDataParallel.fsdp_modules(part):
        # FSDP1's hooks take every parameter out of the dict, and fail if one is missing, even one that is left out of
        # `own`.
        values = {**get_model_state_dict(part), **values}
    else:
        # torch visits each module once, and under DDP and torch.compile ignores entries under its further names.
        further = further_names(part)
        for name in list(values) if further else ():
            module, _, entry = name.rpartition(".")
            if module in further:
                values.setdefault(f"{further[module]}.{entry}", values.pop(name))
    result = set_model_state_dict(part, values, options=StateDictOptions(strict=False))
    # Not strict, as some entries may be absent; but every entry that was given must be used.
    assert not result.unexpected_keys, result.unexpected_keys


def _like(ours: Any, theirs: Any) -> Any:
    if isinstance(ours, torch.Tensor) and isinstance(theirs, bytes):
        return (
            torch.frombuffer(bytearray(theirs), dtype=torch.uint8)
            if theirs
            else torch.empty(0, dtype=torch.uint8, device="cpu")
        )
    if isinstance(ours, DTensor) and isinstance(theirs, torch.Tensor) and not isinstance(theirs, DTensor):
        on_device = theirs.to(ours.device)
        return distribute_tensor(on_device, ours.device_mesh, ours.placements, src_data_rank=None)
    return into_sharded(ours, theirs)


def from_stage(value: Any, owner: int, group: dist.ProcessGroup | None) -> Any:
    """The `value` that the group's rank `owner` has, whole, in host memory, on all ranks of `group`. Collective."""
    assert group is not None
    box: list[Any] = [None]
    if dist.get_rank(group) == owner:
        box = [whole(value.detach()).cpu()]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, owner), group=group)
    return box[0]
