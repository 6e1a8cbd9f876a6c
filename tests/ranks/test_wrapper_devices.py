"""Shards and groups of a device that is not the host. `meta` stands for it: a group that moves nothing in host memory.

What NCCL says to a tensor of the host, such a group says too: "No backend type associated with device type cpu".
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Backend
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ray_stateful.testing import run_ranks
from ray_stateful.wrappers.shards import whole
from tests.ranks.wrapper_models import passed


def group_of_a_device() -> dist.ProcessGroup:
    """A group of all ranks, for tensors of `meta` alone."""
    if "elsewhere" not in Backend.backend_list:
        Backend.register_backend("elsewhere", dist.ProcessGroupGloo, devices=["meta"])
    group = dist.new_group(backend="elsewhere")
    assert dist.get_backend_config(group) == "meta:elsewhere"
    return group


def offloaded() -> tuple[str, tuple[int, ...]]:
    mesh = DeviceMesh.from_group(group_of_a_device(), "meta")
    # As FSDP2 has them under CPUOffloadPolicy; `from_local` would move the shard to the mesh's device.
    local, layout = torch.ones(2, 3), TensorMeta(torch.Size([4, 3]), (3, 1), torch.float32)
    shard = DTensor(local, DTensorSpec(mesh, (Shard(0),), tensor_meta=layout), requires_grad=False)
    assert shard.device.type == "cpu"
    joined = whole(shard)
    return joined.device.type, tuple(joined.shape)


def test_shards_that_were_offloaded_to_the_host_are_joined_on_the_device_of_their_mesh():
    assert passed(run_ranks(2, offloaded)) == [("meta", (4, 3))] * 2
