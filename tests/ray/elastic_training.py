"""What the elastic tests train, with Ray and without: tiny steps in float64 whose samples and losses are noted.

Imports no ray: the reference runs in processes that have no use for it. In a Ray worker it travels by value.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.states.batches import GlobalBatchSampler
from ray_stateful.states.gradients import accumulate

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from history import Journal

GLOBAL_BATCH, BATCHES_PER_EPOCH = 32, 16
# 15 full global batches, which 3 workers don't divide, and one of 2 samples, in which some workers have none.
LENGTH = 15 * GLOBAL_BATCH + 2
NUM_STEPS = 200


def data():
    """Noise that can't be fitted keeps the losses away from zero, where relative errors mean nothing."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(LENGTH, 6, dtype=torch.float64, generator=generator)
    noise = torch.randn(LENGTH, 1, dtype=torch.float64, generator=generator)
    return inputs, 3 * inputs[:, :1].sin() + inputs[:, 1:2] * inputs[:, 2:3] + noise


def build(seed):
    """A model, sharded where there are ranks, its optimizer, its batches, and the state of the three."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    if torch.distributed.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    batches = GlobalBatchSampler(LENGTH, global_batch_size=GLOBAL_BATCH, micro_batch_size=12, seed=3)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer), "batches": batches}
    return model, optimizer, batches, state


def train_one(model, optimizer, batch, inputs, targets):
    """One optimizer step: the loss over the global batch, and this worker's samples of it."""
    trained, total = [], torch.zeros((), dtype=torch.float64)
    for micro in accumulate(model, batch):
        # The clone is for FSDP2, which warns of an output that is a view.
        losses = (model(inputs[micro.indices]).clone() - targets[micro.indices]).square()
        (losses.sum() * micro.loss_scale).backward()
        if not micro.is_padding:
            total += losses.detach().sum() / batch.num_samples
            trained += micro.indices
    optimizer.step()
    optimizer.zero_grad()
    torch.distributed.all_reduce(total)
    return total.item(), trained


def parameters(model):
    values = [parameter.detach() for parameter in model.parameters()]
    return [value.full_tensor() if isinstance(value, DTensor) else value for value in values]


def train_uninterrupted(directory):
    """All steps without Ray and without a break, for `run_ranks`; the final parameters."""
    model, optimizer, batches, _ = build(seed=1)
    journal, (inputs, targets), step = Journal(Path(directory)), data(), 0
    journal.began(0, None)
    while True:
        for batch in batches:
            step += 1
            loss, trained = train_one(model, optimizer, batch, inputs, targets)
            journal.trained(step, loss, trained)
            batches.on_step(step=step)
            if step == NUM_STEPS:
                return parameters(model)
