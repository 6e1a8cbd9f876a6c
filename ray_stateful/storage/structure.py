"""Flattens state dicts, keeping what DCP's flattening loses: types of dict keys, containers without tensors. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ray_stateful.errors import UnsupportedState
from ray_stateful.format.rows import IntKey, KeyPath

# Looked up by exact type first, as `isinstance` with Mapping or Tensor calls into Python.
_SCALARS = frozenset({bool, float, int, str, type(None)})
PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_LEAVES = _SCALARS | PLAIN_TENSORS | {DTensor}


class ByKey(dict[Any, Any]):
    """A dict that is not stored whole, as one value, though it may have no tensor; not empty, or nothing is stored.

    For entries that not all ranks have: they could not agree on one value of the whole. Stored under keys of their own,
    entries are also compared one by one.
    """


def flatten(state_dict: Mapping[str, Any]) -> tuple[dict[str, KeyPath], dict[str, Any], dict[str, Any]]:
    """Flatten a state dict as DCP does, but keep the outermost containers without a tensor whole.

    Returns:
        Three dicts by flat key: the typed path of every entry, with ints among the dict keys as `IntKey`; the leaves;
        and the containers that were kept whole, the trees.

    Raises:
        UnsupportedState: a dict above a tensor has a key that is neither a string nor an int; or two entries have the
            same flat key.
    """
    # In one pass, with as little work for each entry as possible: training waits meanwhile.
    paths: dict[str, KeyPath] = {}
    leaves: dict[str, Any] = {}
    trees: dict[str, Any] = {}
    for number, (path, value) in enumerate(_walk(state_dict, ()), start=1):
        key = ".".join(map(str, path))
        (leaves if _children(value) is None else trees)[key] = value
        paths[key] = path
        if len(paths) != number:
            raise two_of(key)
    return paths, leaves, trees


def two_of(key: str) -> UnsupportedState:
    """The error for two entries that have the same flat key."""
    return UnsupportedState(key, "one of two entries with this flat key", "rename one: keys are joined by dots")


def put(nested: Any, path: KeyPath, value: Any) -> Any:
    """Put `value` at `path` in `nested`, making missing dicts and lists on the way; returns the root."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if type(step) is int:
        nested = [] if nested is None else nested
        nested.extend([None] * (step + 1 - len(nested)))
        nested[step] = put(nested[step], rest, value)
        return nested
    key = int(step) if isinstance(step, IntKey) else step
    nested = {} if nested is None else nested
    nested[key] = put(nested.get(key), rest, value)
    return nested


def remove(nested: Any, path: KeyPath) -> None:
    """Remove the dict entry at `path` from `nested`, and each dict on the way that has nothing else in it.

    An empty dict left behind would say that the state had this dict, and that it was empty.
    """
    step, rest = path[0], path[1:]
    if rest:
        remove(nested[step], rest)
    if not rest or (isinstance(nested, Mapping) and not nested[step]):
        del nested[step]


def copy_containers(value: Any) -> Any:
    """A copy of the dicts and lists of `value`, with the same leaves."""
    if isinstance(value, Mapping):
        copied = {key: copy_containers(child) for key, child in value.items()}
        return ByKey(copied) if isinstance(value, ByKey) else copied
    if isinstance(value, list):
        return [copy_containers(child) for child in value]
    return value


def is_tensor(value: Any) -> bool:
    """Whether a leaf of a state dict is stored as a tensor: a plain one, a DTensor, or what FSDP1 saves."""
    return type(value) not in _SCALARS and isinstance(value, torch.Tensor | ShardedTensor)


def refuse_wrapper(key: str, tensor: Any) -> None:
    """Refuse a tensor whose elements are in other tensors, such as codes and a scale; also as the shard of a DTensor.

    It has no memory of its own: what a restore reads into it would be lost, and the part would keep its old values.

    Raises:
        UnsupportedState: `tensor` is such a tensor.
    """
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    # The result of a collective is a wrapper too, but a fine one: it waits for its elements.
    if type(tensor) in PLAIN_TENSORS or isinstance(tensor, ShardedTensor | AsyncCollectiveTensor):
        return
    if is_traceable_wrapper_subclass(tensor) or _has_no_memory(tensor):
        raise UnsupportedState(
            key,
            f"a {type(tensor).__name__}, whose elements are in other tensors,",
            "give the part a state_dict() of those, or of a plain tensor made of them",
        )


def refuse_interleaved(key: str, tensor: Any) -> None:
    """Refuse a DTensor whose local shard is not one box of the whole tensor.

    FSDP2 shards a dim that tensor parallelism has sharded before: a `_StridedShard`, whose `split_factor` is the number
    of shards that the axes to its right make. Together with those it leaves each rank one run of rows. In any other
    order, or with another factor, a rank has rows from several places, and torch's offsets are those of the first.

    Raises:
        UnsupportedState: it is one.
    """
    if not isinstance(tensor, DTensor):
        return
    for axis, placement in enumerate(tensor.placements):
        factor = getattr(placement, "split_factor", None)
        if factor is None:
            continue
        same_dim = [other for other, place in enumerate(tensor.placements) if _dim_of(place) == _dim_of(placement)]
        before = [other for other in same_dim if other < axis and not hasattr(tensor.placements[other], "split_factor")]
        if before or factor != math.prod(tensor.device_mesh.size(other) for other in same_dim if other > axis):
            raise UnsupportedState(
                key,
                f"a DTensor with placements {tensor.placements}, whose shards are not contiguous,",
                "redistribute it first, for example to Shard alone",
            )


def _dim_of(placement: Any) -> int | None:
    return getattr(placement, "dim", None)


def _has_no_memory(tensor: torch.Tensor) -> bool:
    # The memory of a tensor of `FakeTensorMode`, which plans are made with, is on the device "meta".
    return tensor.numel() > 0 and tensor.untyped_storage().device.type != "meta" and tensor.data_ptr() == 0


def is_whole(tensor: Any) -> bool:
    """Whether every rank that has a tensor has all of it: a plain tensor, or a DTensor that is replicated."""
    if isinstance(tensor, DTensor):
        return all(placement.is_replicate() for placement in tensor.placements)
    # FSDP1's are tensors by class, and shards.
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, ShardedTensor)


def meshes_of(values: Iterable[Any]) -> tuple[Mapping[str, int], ...]:
    """The device meshes of the DTensors among `values`: axis names to sizes; meshes with equal ones only once."""
    meshes = {id(value.device_mesh): value.device_mesh for value in values if isinstance(value, DTensor)}
    found: dict[tuple[tuple[str, int], ...], None] = {}
    for mesh in meshes.values():
        names = mesh.mesh_dim_names or tuple(f"axis_{axis}" for axis in range(mesh.ndim))
        found[tuple(zip(names, mesh.shape, strict=True))] = None
    return tuple(dict(mesh) for mesh in found)


def _walk(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    children = _children(value)
    if children is None or (path and not isinstance(value, ByKey) and not _has_tensor(value)):
        yield path, value
        return
    for step, child in children:
        if type(step) is int and isinstance(value, Mapping):
            step = IntKey(step)
        if type(step) not in (str, int, IntKey):
            key = ".".join(map(str, path))
            raise UnsupportedState(key, f"a dict with the key {step!r} above a tensor", "use strings or ints as keys")
        if type(child) in _LEAVES:
            yield (*path, step), child
        else:
            yield from _walk(child, (*path, step))


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    if type(value) in _LEAVES:
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    # A tuple is a leaf, as for DCP: it is stored as one value, with any tensors in it.
    if isinstance(value, list):
        return list(enumerate(value))
    return None


def _has_tensor(value: Any) -> bool:
    if type(value) in _SCALARS:
        return False
    if isinstance(value, torch.Tensor):
        return True
    children = _children(value)
    return children is not None and any(_has_tensor(child) for _, child in children)
