"""Random training states, saved and restored by other numbers of workers: `python -m tests.soak.worlds`.

All of a case follows from its seed. Some ranks train, save and train on. New objects are restored, by as many ranks and
by another number: they must be what was saved, bit for bit. On as many ranks they train on as well, and must end in the
bits of the run that was never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import random
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import lr_scheduler

from ray_stateful import Checkpointer, ModelState, OptimizerState, restore, save
from ray_stateful.storage.reader import CheckpointReader
from ray_stateful.storage.writer import CheckpointWriter
from ray_stateful.testing import run_ranks
from ray_stateful.testing.resuming import first_difference
from tests.ranks.wrapper_models import passed, whole

VOCABULARY = 11
SIZES = (1, 2, 3, 5, 8, 13)  # smaller than the world, uneven, and larger

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "dampening": 0.3},
    "RMSprop": {"momentum": 0.5, "centered": True},
}
SCHEDULERS = {
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.MultiStepLR(optimizer, [1])], [2]
    ),
}


class Net(nn.Module):
    """Layers of random sizes, some of them tied, frozen or never used; and buffers that are not just floats."""

    def __init__(self, chance: random.Random, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = chance.choice(SIZES)
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width))
            for inner in chance.choices(SIZES, k=chance.randint(1, 3))
        )
        self.lm_head = nn.Linear(width, VOCABULARY, bias=chance.random() < 0.5)
        if chance.random() < 0.3:
            self.lm_head.weight = self.embed_tokens.weight
        if chance.random() < 0.3:
            self.blocks.append(self.blocks[0])
        if chance.random() < 0.3:
            self.unused = nn.Linear(3, width)
        self.blocks[0][1].requires_grad_(chance.random() < 0.8)
        self.register_buffer("mask", torch.rand(chance.choice(SIZES), 2) > 0.5)
        self.register_buffer("scaled", torch.rand(4, 3).t().to(chance.choice([torch.float8_e4m3fn, torch.bfloat16])))
        self.register_buffer("turns", torch.rand(2, dtype=torch.complex64).conj())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def wrapped(model: Net, chance: random.Random, meshes: dict[str, DeviceMesh]) -> nn.Module:
    kind = chance.choice(["plain", "ddp", "fsdp2", "fsdp2", "hsdp"])
    if kind == "ddp":
        # gloo can't send some of the buffers, and the ranks have the same ones.
        options = {"find_unused_parameters": hasattr(model, "unused"), "init_sync": False, "broadcast_buffers": False}
        return nn.parallel.DistributedDataParallel(model, **options)
    if kind == "plain":
        return model
    for block in dict.fromkeys(model.blocks) if chance.random() < 0.6 else ():
        fully_shard(block, mesh=meshes[kind])
    return fully_shard(model, mesh=meshes[kind])


class Training:
    def __init__(self, seed: int, meshes: dict[str, DeviceMesh], *, fresh: bool = False) -> None:
        chance = random.Random(seed)
        self.net = Net(chance, seed=seed + 1000 * fresh)
        self.model = wrapped(self.net, chance, meshes)
        parameters, kind = list(self.net.parameters()), chance.choice(list(OPTIMIZERS))
        groups = [{"params": parameters[at::2], "lr": chance.choice([0.1, 0.01])} for at in range(2)]
        options = {"foreach": chance.choice([None, False]), "weight_decay": chance.choice([0.0, 0.1])}
        self.optimizers = [
            getattr(torch.optim, kind)(of_one, **options, **OPTIMIZERS[kind])
            for of_one in chance.choice([[groups], [[group] for group in groups]])
        ]
        make = SCHEDULERS[chance.choice(list(SCHEDULERS))]
        self.schedulers = [make(optimizer) for optimizer in self.optimizers]
        self.state = {"m": ModelState(self.model), "o": OptimizerState(self.model, self.optimizers, self.schedulers)}

    def train(self, num_steps: int) -> list[float]:
        losses = []
        for step in range(num_steps):
            # The same on all ranks, or a model without a wrapping would not stay the same on them.
            tokens = (torch.arange(10).view(2, 5) * (step + 2)) % VOCABULARY
            self.model.zero_grad()
            loss = nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            for one in (*self.optimizers, *self.schedulers):
                one.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def snapshot(self) -> dict[str, Any]:
        """All that torch's objects have, whole, by parameter name. Collective."""
        values = (*self.net.named_parameters(), *self.net.named_buffers())
        found: dict[str, Any] = {name: whole(value) for name, value in values}
        groups = {p: (o.state, group) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, parameter in self.net.named_parameters():
            state, group = groups[parameter]
            found[f"{name}, state"] = {key: whole(value) for key, value in state.get(parameter, {}).items()}
            found[f"{name}, group"] = {key: value for key, value in group.items() if key != "params"}
        found["schedulers"] = [one.state_dict() for one in self.schedulers]
        return copy.deepcopy(found)


def same(expected: Any, found: Any, what: str) -> None:
    difference = first_difference(expected, found)
    assert difference is None, f"{what}: {difference}"


def on_each_rank(seeds: range, directory: str, saves: bool) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("ray_stateful").setLevel(logging.CRITICAL)
    world = dist.get_world_size()
    two_axes = init_device_mesh("cpu", (2, 2) if world == 4 else (1, world), mesh_dim_names=("replicas", "shards"))
    meshes = {"fsdp2": init_device_mesh("cpu", (world,)), "hsdp": two_axes}
    for seed in seeds:
        place, way, what = f"{directory}/{seed}", ("save", "background", "dcp")[seed % 3], f"seed {seed}, {world} ranks"
        if saves:
            trained = Training(seed, meshes)
            trained.train(1 + seed % 2)
            expected = trained.snapshot()
            with Checkpointer(trained.state, background=True, at_end=False, run=place, timeout_s=60) as checkpointer:
                if way == "background":
                    checkpointer.request_save()
                    checkpointer.step()
                elif way == "save":
                    save(trained.state, step=1, run=place, timeout_s=60)
                else:
                    dcp.save(trained.state, storage_writer=CheckpointWriter(f"{place}/by_dcp"))
                losses = trained.train(3)
            if dist.get_rank() == 0:
                torch.save(expected, f"{place}/expected")
            dist.barrier()
        restored = Training(seed, meshes, fresh=True)
        if way == "dcp" and not saves:
            planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
            dcp.load(restored.state, storage_reader=CheckpointReader(f"{place}/by_dcp"), planner=planner)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                restore(restored.state, run=place, checkpoint=f"{place}/by_dcp" if way == "dcp" else None, timeout_s=60)
        same(torch.load(f"{place}/expected", weights_only=False), restored.snapshot(), f"{what}, restored")
        again = restored.train(3)
        if saves:
            same(losses, again, f"{what}, losses")
            same(trained.snapshot(), restored.snapshot(), f"{what}, trained on")


def run(saved_by: int, restored_by: int, seeds: range) -> None:
    with tempfile.TemporaryDirectory(prefix="worlds-") as directory:
        for num_ranks, saves in ((saved_by, True), (restored_by, False)):
            passed(run_ranks(num_ranks, on_each_rank, seeds, directory, saves, timeout_s=60 + 5.0 * len(seeds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]  # there is one
    parser.add_argument("--cases", type=int, default=24, help="for each pair of numbers of workers")
    num_cases = parser.parse_args().cases
    for number, pair in enumerate([(4, 3), (3, 4), (1, 4), (4, 2), (2, 1)]):
        began = time.monotonic()
        run(*pair, range(number * num_cases, (number + 1) * num_cases))
        print(f"{pair}: {num_cases} states, bit for bit; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
