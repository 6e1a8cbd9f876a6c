"""What torch leaves to whoever looks at the parameters of a sharded model: to have shards, and to join them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def reshard(parts: Iterable[nn.Module]) -> None:
    """Let the parameters of FSDP2 be the shards that are trained. Local.

    After a forward without a backward, an evaluation, the root's are whole copies, perhaps of a lower precision: no
    optimizer knows them, and what is loaded into them is lost with them.
    """
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its shards joined; one that is not sharded as it is. Collective over the mesh of a DTensor.

    What was offloaded is in host memory, while the mesh is of the devices that train; NCCL moves nothing from there.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, local = tensor.device_mesh, tensor.to_local()
    if local.device.type != mesh.device_type:
        # It moves the shard to the mesh's device.
        tensor = DTensor.from_local(
            local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return tensor.full_tensor()
