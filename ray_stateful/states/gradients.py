"""Reduces gradients once per optimizer step: only with the last micro-batch, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol, TypeVar

import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class MicroBatches(Protocol[T_co]):
    """What `accumulate` takes: the micro-batches of one optimizer step, the same number on every rank."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...


def accumulate(model: nn.Module, batch: MicroBatches[T]) -> Iterator[T]:
    """The micro-batches of `batch`, with the gradients of all but the last kept on their rank.

    Run both forward and backward in the body of the loop: DDP decides in forward what backward reduces. Handles DDP,
    FSDP2 (`fully_shard`) and FSDP1, also below other modules; a plain module needs nothing.

    FSDP keeps whole gradients, not shards, until the last micro-batch. If there is not enough memory for them, iterate
    over `batch` itself: then every micro-batch is reduced, and the sum is the same.
    """
    num_left = len(batch)
    for micro in batch:
        num_left -= 1
        with ExitStack() as unsynced:
            if num_left:
                _hold_back(model, unsynced)
            yield micro


def _hold_back(model: nn.Module, unsynced: ExitStack) -> None:
    # FSDP1 allows `no_sync` only on a root, where it covers all modules below. The model itself need not be a root.
    below_fsdp1: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each module separately: the outermost one may be below a module that is not sharded.
            module.set_requires_gradient_sync(False, recurse=False)
            unsynced.callback(module.set_requires_gradient_sync, True, recurse=False)
        elif isinstance(module, DistributedDataParallel):
            unsynced.enter_context(module.no_sync())
        elif isinstance(module, FullyShardedDataParallel) and module not in below_fsdp1:
            unsynced.enter_context(module.no_sync())
            below_fsdp1.update(module.modules())
