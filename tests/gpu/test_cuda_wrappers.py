"""Sharded adapters on two CUDA devices with NCCL, which moves nothing in host memory."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, FullyShardedDataParallel, fully_shard

from ray_stateful import ModelState
from ray_stateful.testing import run_ranks
from tests.ranks.wrapper_models import assert_same, passed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

KEY = "base_model.model.score.weight"


def nccl() -> dist.ProcessGroup:
    torch.cuda.set_device(dist.get_rank())
    return dist.new_group(backend="nccl")


class OneLabel(nn.Module):
    """A head of one row: on two ranks, the second has no shard of it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.score = nn.Linear(4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.base(x))


def there_and_back(saved: nn.Module, fresh: nn.Module, **options: Any) -> dict[str, Any]:
    state = ModelState(saved, is_peft=True, **options).state_dict()
    again = ModelState(fresh, is_peft=True, **options)
    again.load_state_dict(state)
    assert_same(again.state_dict(), state)
    return state


def offloaded() -> dict[str, Any]:
    mesh = DeviceMesh.from_group(nccl(), "cuda")
    return there_and_back(
        *(fully_shard(OneLabel(seed), mesh=mesh, offload_policy=CPUOffloadPolicy()) for seed in (1, 2))
    )


def test_an_adapter_whose_shards_are_offloaded_to_the_host_comes_back():
    state, nothing = passed(run_ranks(2, offloaded))
    assert_same(state, {KEY: OneLabel(1).score.weight.detach()})
    assert nothing == {}


def fewer_rows_than_ranks(cpu_offload: bool) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # FSDP1 announces its end
    group = nccl()
    device = torch.device("cuda", dist.get_rank())
    offload = CPUOffload(offload_params=cpu_offload)
    models = [
        FullyShardedDataParallel(
            OneLabel(seed), process_group=group, device_id=device, use_orig_params=True, cpu_offload=offload
        )
        for seed in (1, 2)
    ]
    return there_and_back(*models)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_a_head_with_fewer_rows_than_ranks_comes_back_under_fsdp1(cpu_offload):
    state, nothing = passed(run_ranks(2, fewer_rows_than_ranks, cpu_offload))
    assert_same(state, {KEY: OneLabel(1).score.weight.detach()})
    assert nothing == {}


def stages() -> tuple[list[str], int]:
    group = nccl()
    stage = nn.ModuleDict({f"stage_{dist.get_rank()}": OneLabel(dist.get_rank())})
    torch.cuda.reset_peak_memory_stats()
    state = there_and_back(stage, copy.deepcopy(stage), pp_group=group)
    return sorted(state), torch.cuda.max_memory_allocated()


def test_the_adapters_of_a_pipeline_over_nccl_are_joined_without_a_byte_on_the_devices():
    keys = [f"base_model.model.stage_{rank}.score.weight" for rank in (0, 1)]
    assert passed(run_ranks(2, stages)) == [(keys, 0), ([], 0)]
