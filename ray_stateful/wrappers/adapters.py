"""The trained tensors of a model with adapters: whole, on rank 0, under the names that Hugging Face's PEFT writes.

Every rank makes the same calls in the same order here. Rank 0 decides and announces what is sent, which never
depends on what this rank's stage of a pipeline happens to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from ray_stateful.ranks import device_of
from ray_stateful.wrappers import dense, shards
from ray_stateful.wrappers.model_keys import canonical_name, named_parameters, unwrapped
from ray_stateful.wrappers.sharded_tensors import as_dtensor

OUTER_PREFIX = "base_model.model."

_MAGNITUDE = "lora_magnitude_vector"
Parts = Sequence[tuple[str, nn.Module]]


def stored_keys(parts: Parts) -> dict[str, list[str]]:
    """The key that each trained parameter is stored under, with the other spellings that are accepted in loading."""
    found: dict[str, list[str]] = {}
    for prefix, part in parts:
        for name, short in _trained(part):
            key = OUTER_PREFIX + prefix + short
            if key in found:
                raise ValueError(f"two trained parameters would be stored as {key!r}; train one adapter at a time")
            found[key] = _other_spellings(key, OUTER_PREFIX + prefix + name)
    return found


def is_adapter(name: str) -> bool:
    """Whether `name` is a parameter that adapters added to a base model."""
    return any(part.startswith("lora_") for part in name.split("."))


def _trained(part: nn.Module) -> Iterator[tuple[str, str]]:
    """Each trained parameter's canonical name, and its name without PEFT's own levels: adapter, `modules_to_save`."""
    adapters = set(getattr(unwrapped(part), "peft_config", None) or {"default"})
    names = list(_trained_names(part))
    in_use = {level for name in names for level in name.split(".") if level in adapters}
    for name in names:
        levels = [level for level in name.split(".") if level != "modules_to_save"]
        # If two adapters are trained, only the adapter's name tells their parameters apart.
        if len(in_use) == 1:
            levels = [level for level in levels if level not in adapters]
        if levels[-2:] == [_MAGNITUDE, "weight"]:
            levels.pop()
        elif levels[-1] == "lora_magnitude":
            levels[-1] = _MAGNITUDE
        yield name, ".".join(levels).removeprefix(OUTER_PREFIX)


def _trained_names(part: nn.Module) -> list[str]:
    if _is_fsdp1(part):
        # Flat parameters have no names of their own.
        buffers = {canonical_name(part, name) for name, _ in part.named_buffers()}
        return [name for name in _shards(part) if name not in buffers]
    trained = {parameter: name for name, parameter in named_parameters(part) if parameter.requires_grad}
    return list(trained.values())


def _shards(part: nn.Module) -> dict[str, Any]:
    state = get_model_state_dict(part, options=StateDictOptions(ignore_frozen_params=True))
    return {name: as_dtensor(value) for name, value in state.items()}


def _other_spellings(key: str, name: str) -> list[str]:
    bare = name.removeprefix(OUTER_PREFIX)
    spellings = [key.removeprefix(OUTER_PREFIX), name, bare, OUTER_PREFIX + bare.removeprefix(OUTER_PREFIX)]
    if key.endswith("." + _MAGNITUDE):
        stem = key.removesuffix(_MAGNITUDE)
        spellings += [f"{key}.default.weight", f"{key}.weight", f"{stem}lora_magnitude"]
    return [spelling for spelling in dict.fromkeys(spellings) if spelling != key]


def collect(parts: Parts, pp_group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The trained tensors, whole, in rank 0's host memory; `{}` on the other ranks. Collective."""
    rank = dist.get_rank() if _distributed() else 0
    # Rank 0 gets the other stages from the ranks of its own pipeline; the other pipelines hold copies.
    joins = pp_group is not None and 0 in dist.get_process_group_ranks(pp_group)
    keep = rank == 0 or joins
    whole: dict[str, Any] = {}
    keys = stored_keys(parts)
    for prefix, part in parts:
        values = _whole_values(part)
        for name, short in _trained(part):
            key = OUTER_PREFIX + prefix + short
            assert key in keys
            value = values(name)
            if keep:
                whole[key] = value
    if joins:
        into: list[Any] | None = [None] * dist.get_world_size(pp_group) if rank == 0 else None
        dist.gather_object(whole, into, dst=0, group=pp_group)
        for stage in into or []:
            whole.update({key: value for key, value in stage.items() if key not in whole})
    return whole if rank == 0 else {}


def _whole_values(part: nn.Module) -> Callable[[str], torch.Tensor]:
    """A function from name to whole value on the host. All ranks call it for the same names in the same order."""
    # FSDP1's own way to get whole tensors on rank 0 fails on other ranks once parameters are frozen; so join shards.
    parameters = _shards(part) if _is_fsdp1(part) else dict(named_parameters(part))

    def value(name: str) -> torch.Tensor:
        joined = shards.whole(parameters[name].detach())
        # A copy, also if it is on the host already: training goes on while it is written.
        return torch.empty_like(joined, device="cpu").copy_(joined)

    return value


def load(
    parts: Parts,
    state: Mapping[str, Any],
    pp_group: dist.ProcessGroup | None,
    judge: Callable[[set[str], set[str]], None],
) -> int:
    """Load rank 0's `state` into the parameters of all ranks; returns how many this rank has loaded. Collective.

    Args:
        judge: Called before anything is loaded, with the keys that are missing and those that belong to no parameter,
            the same on every rank of a pipeline; raises to refuse.

    Raises:
        ValueError: shapes differ; lists all of them, on every rank of a pipeline, and nothing was loaded.
    """
    announced = _from_rank_0([(key, value.shape, value.dtype) for key, value in state.items()])
    spelt = {spelling: key for key, others in stored_keys(parts).items() for spelling in [*others, key]}
    shapes = _shapes(parts)
    if pp_group is not None:
        everyone: list[Any] = [None] * dist.get_world_size(pp_group)
        dist.all_gather_object(everyone, (shapes, spelt), group=pp_group)
        # Those of all stages: a rank that refused alone would leave the others waiting for a broadcast.
        shapes, spelt_anywhere = (
            {k: v for one in each for k, v in one.items()} for each in zip(*everyone, strict=True)
        )
    else:
        spelt_anywhere = spelt
    given = [(spelt_anywhere[key], shape) for key, shape, _ in announced if key in spelt_anywhere]
    judge(shapes.keys() - dict(given).keys(), {key for key, _, _ in announced if key not in spelt_anywhere})
    dense.refuse_shapes((key, shape, shapes[key]) for key, shape in given)

    targets = {
        OUTER_PREFIX + prefix + short: (index, name)
        for index, (prefix, part) in enumerate(parts)
        for name, short in _trained(part)
    }
    values: list[dict[str, Any]] = [{} for _ in parts]
    parameters = [dict(named_parameters(part)) for _, part in parts]
    num_loaded = 0
    for key, shape, dtype in announced:
        value = _broadcast(state.get(key), shape, dtype)
        if spelt.get(key) in targets:
            index, name = targets[spelt[key]]
            num_loaded += 1
            if _is_fsdp1(parts[index][1]):
                values[index][name] = value
            else:
                _put(parameters[index][name], value)
    for (_, part), whole in zip(parts, values, strict=True):
        if _is_fsdp1(part):
            dense.load(part, get_model_state_dict(part), whole)
    return num_loaded


def _shapes(parts: Parts) -> dict[str, torch.Size]:
    """The shape of each trained parameter, by the key that it is stored under."""
    shapes: dict[str, torch.Size] = {}
    for prefix, part in parts:
        parameters = _shards(part) if _is_fsdp1(part) else dict(named_parameters(part))
        shapes |= {OUTER_PREFIX + prefix + short: parameters[name].shape for name, short in _trained(part)}
    return shapes


@torch.no_grad()
def _put(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        on_device = whole.to(parameter.device)
        whole = distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def _from_rank_0(value: Any) -> Any:
    if not _distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _broadcast(value: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if not _distributed():
        assert value is not None
        return value
    # A group with NCCL alone can't send host memory.
    device = torch.device(device_of())
    mine = value.to(device).contiguous() if dist.get_rank() == 0 and value is not None else None
    box = torch.empty(shape, dtype=dtype, device=device) if mine is None else mine
    # As bytes: backends refuse some dtypes, and a broadcast need not understand any. A tensor of one element counts as
    # contiguous whatever its stride is, and can be viewed as bytes only with a stride of 1, which `as_strided` sets.
    dist.broadcast(box.as_strided((box.numel(),), (1,)).view(torch.uint8), src=0)
    return box


def _is_fsdp1(part: nn.Module) -> bool:
    return bool(FullyShardedDataParallel.fsdp_modules(part))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
