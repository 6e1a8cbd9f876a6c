"""What torch leaves to whoever looks at a sharded parameter: joining its shards on the right device."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


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
