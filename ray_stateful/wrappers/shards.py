"""What torch leaves to those who access the parameters of a sharded model: to get shards, and to join them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def reshard(parts: Iterable[nn.Module]) -> None:
    """Make the parameters of FSDP2 modules the shards that are trained. Not collective.

    After a forward without a backward (an evaluation), the root's parameters are whole copies, perhaps in a lower
    precision: no optimizer knows these, and what is loaded into them is lost when they are freed.
    """
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its shards joined; one that is not sharded as it is. Collective over the mesh of a DTensor.

    An offloaded shard is in host memory, while the mesh is of the devices that train; NCCL can't send host memory.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, local = tensor.device_mesh, tensor.to_local()
    if local.device.type != mesh.device_type:
        # `from_local` moves the shard to the mesh's device.
        tensor = DTensor.from_local(
            local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return tensor.full_tensor()
