"""The run that the commands of cli.md are shown on: three saves of a small model by two workers, one of which fails.

Nothing in it is random but what is written here, so that a page built twice is the same page: attempt ids are given,
and times have as many digits as each other.
"""

from __future__ import annotations

import itertools
import logging
import posixpath
import random
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_stateful import Checkpointer, GlobalBatchSampler, ModelState, OptimizerState, RandomState
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import opening
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage, run_ranks

ATTEMPTS = ("1c77e0", "b20d4f", "9f3c21")
NAMES = [f"checkpoint_s{step:010d}_{attempt}" for step, attempt in zip((10, 20, 30), ATTEMPTS, strict=True)]


class Bytes(nn.Module):
    """What comes after a byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(tokens))))


def train(uri: str) -> None:
    """On every rank: 30 steps, saved every 10; the second save is denied its manifest."""
    # All of them are in the checkpoint.
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(17)
    model = Bytes()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    batches = GlobalBatchSampler(1000, global_batch_size=16, micro_batch_size=8, seed=17)
    state = {
        "model": ModelState(model),
        "optimizer": OptimizerState(model, optimizer, scheduler),
        "batches": batches,
        "random": RandomState(),
    }
    storage, path = resolve(uri)
    denied = Fail("write", nth=2, path="manifest.json", rank=0, error=PermissionError("denied"))
    run = DirectoryRun(RetryingStorage(FaultyStorage(storage.inner, [denied])), path, uri)
    with Checkpointer(state, every_n_steps=10, soft_fail=1, run=run, timeout_s=60) as checkpointer:
        for batch in itertools.islice(batches, 30):
            for micro in batch:
                tokens = torch.as_tensor(micro.indices) % 256
                loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 256, reduction="sum")
                (loss * micro.loss_scale).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            checkpointer.step()


def _train(uri: str) -> None:
    # The failed save is one of the things to be shown; the build is to be silent about it.
    logging.getLogger("ray_stateful").addHandler(logging.NullHandler())
    clock = SimpleNamespace(time=lambda: int(time.time()) + 0.5)
    with (
        mock.patch("ray_stateful.checkpoint.secrets", SimpleNamespace(token_hex=_one_of(ATTEMPTS))),
        mock.patch("ray_stateful.storage.commit.time", clock),
    ):
        train(uri)


def _one_of(attempts):
    left = iter(attempts)
    return lambda num_bytes: next(left)


def damage(uri: str, name: str, key: str) -> None:
    """Flip one bit of the first chunk of a tensor."""
    storage, path = resolve(posixpath.join(uri, name))
    chunk = opening.parse(opening.fetch(storage, path)).chunks[key][0]
    file = posixpath.join(path, chunk.file)
    content = bytearray(storage.read(file))
    content[chunk.data_offset] ^= 1
    storage.write(file, bytes(content))


def make(uri: str) -> None:
    """Make the run at `uri`, and a damaged copy of its last checkpoint at `uri`-damaged."""
    for outcome in run_ranks(2, _train, uri):
        if isinstance(outcome, BaseException):
            raise outcome
    storage, path = resolve(uri)
    for name, _ in storage.sizes(posixpath.join(path, NAMES[-1])).items():
        content = storage.read(posixpath.join(path, NAMES[-1], name))
        storage.write(posixpath.join(f"{path}-damaged", NAMES[-1], name), content)
    damage(f"{uri}-damaged", NAMES[-1], "model.hidden.weight")
