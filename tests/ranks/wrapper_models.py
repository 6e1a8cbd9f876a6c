"""Models and wrappings for the tests of the wrappers, and a bit-for-bit comparison that needs no DCP."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.distributed_c10d import Backend
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3)  # 3 rows: uneven on 2 ranks, empty shards on 4
        self.down = nn.Linear(3, WIDTH)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tied(nn.Module):
    """An embedding, blocks and a head; `tied` or not. `scale` has one element: empty on all ranks but one."""

    def __init__(self, *, tied: bool = True, seed: int = 0, num_blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.scale = nn.Parameter(torch.rand(1))
        self.lm_head = nn.Linear(WIDTH, 11, bias=False)
        self.tie = tied
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x * self.scale)


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model: nn.Module) -> nn.Module:
    return _fsdp1(model, use_orig_params=True)


def fsdp1_flat(model: nn.Module) -> nn.Module:
    return _fsdp1(model, use_orig_params=False)


def _fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        # FSDP1 announces its end at construction; people have it all the same.
        warnings.simplefilter("ignore", FutureWarning)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def fsdp2(model: nn.Module) -> nn.Module:
    for block in getattr(model, "blocks", []):
        fully_shard(block)
    return fully_shard(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(fsdp2(model), backend="eager")


def checkpointed(model: nn.Module) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return fsdp2(model)


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": plain,
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp1_flat": fsdp1_flat,
    "fsdp2": fsdp2,
    "compiled": compiled,
    "checkpointed": checkpointed,
}


def group_of_a_device(ranks: list[int] | None = None) -> dist.ProcessGroup:
    """A group of `ranks`, or of all, that moves nothing in host memory, as NCCL's: it is for tensors of `meta`."""
    if "elsewhere" not in Backend.backend_list:
        Backend.register_backend("elsewhere", dist.ProcessGroupGloo, devices=["meta"])
    group = dist.new_group(ranks, backend="elsewhere")
    assert group == dist.GroupMember.NON_GROUP_MEMBER or dist.get_backend_config(group) == "meta:elsewhere"
    return group


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None, num_steps: int = 3) -> None:
    """Deterministic, the same on all ranks, so that every wrapping computes the same up to rounding."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        tokens = torch.randint(0, 11, (2, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def whole(value: Any) -> Any:
    """`value` as one whole tensor on every rank, whatever it is sharded as."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if hasattr(value, "local_shards"):
        full = torch.zeros(value.size(), dtype=value.dtype)
        for shard in value.local_shards():
            box = tuple(
                slice(start, start + length)
                for start, length in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            )
            full[box] = shard.tensor
        dist.all_reduce(full)
        return full
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def passed(outcomes: list[Any]) -> list[Any]:
    """What the ranks returned; raises what one of them raised."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in leaves(value, f"{path}.{name}").items()}
    if isinstance(tree, list) and any(isinstance(item, (dict, list, torch.Tensor)) for item in tree):
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{path}.{i}").items()}
    return {path[1:]: whole(tree)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, key by key."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
            # Not torch.equal: -0.0 equals 0.0, and no NaN equals itself.
            assert bits(found[key]) == bits(value), key
        else:
            assert found[key] == value, (key, found[key], value)
