"""FSDP1's `ShardedTensor`s as DTensors, and back.

torch's planners drop a ShardedTensor of which a rank has no shard, and then take the checkpoint for one of an older
layout: a model with an empty shard would save but not load. As DTensors they look like FSDP2's to every reader.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ray_stateful.ranks import device_of


def as_dtensor(value: Any) -> Any:
    """A DTensor over the memory of a ShardedTensor; anything else as it is."""
    if not isinstance(value, ShardedTensor):
        return value
    with _deprecated():
        shape, shards = value.size(), value.local_shards()
        # FSDP1 cuts the first dim into equal pieces, the last one shorter, as `Shard(0)` does.
        local = shards[0].tensor.detach() if shards else _no_rows(value)
        mesh = _mesh(value._process_group)
    stride = torch.empty(shape, device="meta").stride()
    layout = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(shape, stride, value.dtype))
    # Not `from_local`: it copies an offloaded shard to the mesh's device, and what is written to a copy is lost.
    return DTensor(local, layout, requires_grad=False)  # type: ignore[no-untyped-call]


def into_sharded(ours: Any, theirs: Any) -> Any:
    """The ShardedTensor `ours`, filled from the DTensor or whole tensor `theirs`; otherwise `theirs` as it is."""
    if not isinstance(ours, ShardedTensor) or isinstance(theirs, ShardedTensor) or not isinstance(theirs, torch.Tensor):
        return theirs
    with _deprecated(), torch.no_grad():
        mine = as_dtensor(ours)
        if isinstance(theirs, DTensor):
            mine.copy_(theirs)
        else:
            for shard in ours.local_shards():
                offset, length = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
                shard.tensor.copy_(theirs[offset : offset + length])
    return ours


def _no_rows(value: ShardedTensor) -> torch.Tensor:
    """An empty shard for a rank that has none, on the device type of the others' shards, which the metadata tells."""
    placement = value.metadata().shards_metadata[0].placement
    assert placement is not None
    # The device type alone: the index is that of another rank's device.
    return torch.empty(0, *value.size()[1:], dtype=value.dtype, device=placement.device().type)


@functools.cache
def _mesh(group: dist.ProcessGroup) -> DeviceMesh:
    # On the group's device, not on that of this rank's shard, which it may lack: with meshes of two kinds the ranks
    # would not meet in one collective. Shards that were offloaded are joined on the group's device too.
    return DeviceMesh.from_group(group, device_of(group))


@contextmanager
def _deprecated() -> Iterator[None]:
    # FSDP1 makes these tensors, but torch warns anyone who accesses them that they are deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
