"""Shards and groups of a device that is not the host. `meta` stands for it: a group that moves nothing in host memory.

What NCCL says to a tensor of the host, such a group says too: "No backend type associated with device type cpu".
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ray_stateful.testing import run_ranks
from ray_stateful.wrappers.sharded_tensors import as_dtensor
from ray_stateful.wrappers.shards import whole
from tests.ranks.wrapper_models import fsdp1, group_of_a_device, passed


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


def two_rows() -> list[tuple[str, str, tuple[int, ...]]]:
    warnings.simplefilter("ignore")  # FSDP1 and its ShardedTensor announce their end
    value = get_model_state_dict(fsdp1(nn.Linear(4, 2, bias=False)))["weight"]
    group = group_of_a_device()
    found = []
    for device in ("meta", "cpu"):
        moved = value.to(torch.device(device), process_group=group, copy=True)
        tensor = as_dtensor(moved)
        shard = tensor.to_local()
        assert all(shard.data_ptr() == mine.tensor.data_ptr() for mine in moved.local_shards())
        found.append((tensor.device_mesh.device_type, shard.device.type, tuple(shard.shape)))
    return found


def test_a_rank_without_a_shard_has_the_device_and_the_mesh_of_the_others_also_when_they_are_offloaded():
    *full, empty = passed(run_ranks(3, two_rows))
    assert empty == [("meta", "meta", (0, 4)), ("meta", "cpu", (0, 4))]
    assert full == [[("meta", "meta", (1, 4)), ("meta", "cpu", (1, 4))]] * 2
