"""FSDP1's `ShardedTensor`s as DTensors, and back.

torch's planners drop a ShardedTensor of which a rank has no shard, and then take the checkpoint for one of an older
layout: a model with an empty shard would save and not load. As DTensors they are what FSDP2 has, for every reader.
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


def as_dtensor(value: Any) -> Any:
    """A DTensor over the same memory; anything but a ShardedTensor as it is."""
    if not isinstance(value, ShardedTensor):
        return value
    with _deprecated():
        shape, shards = value.size(), value.local_shards()
        # FSDP1 cuts the first dim into equal pieces, the last one shorter, as `Shard(0)` does.
        local = shards[0].tensor if shards else torch.empty(0, *shape[1:], dtype=value.dtype)
        mesh = _mesh(value._process_group, local.device.type)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def into_sharded(ours: Any, theirs: Any) -> Any:
    """The ShardedTensor `ours`, holding what the DTensor or whole tensor `theirs` has."""
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


@functools.cache
def _mesh(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type)


@contextmanager
def _deprecated() -> Iterator[None]:
    # FSDP1 makes these tensors; whoever looks at them is told that they are deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
