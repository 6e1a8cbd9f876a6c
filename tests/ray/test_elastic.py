"""The elastic contract under a real Ray: nodes join and vanish, a worker is killed, and the mathematics stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import ray
import ray.train
import torch
from ray import cloudpickle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_stateful.checkpointer import Checkpointer
from ray_stateful.ray_callbacks import ResizeGuard
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.states.batches import GlobalBatchSampler
from ray_stateful.states.gradients import accumulate

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import history
from history import Journal, Point, data_problems, read_attempts, steps_lost, surviving

# The last batch of an epoch has one sample: with two workers, one of them has none.
LENGTH, GLOBAL_BATCH = 6 * 11 + 1, 11
# In steps; a group of workers that is given up has always trained some more.
SAVE_EVERY, STEPS_EACH = 10, 15

# A resource of the added nodes alone: the number of these nodes is the number of workers.
SLOT = {"resources_per_worker": {"CPU": 1, "slot": 1}, "elastic_resize_monitor_interval_s": 0.5}


def _inputs():
    return torch.randn(LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _build():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    batches = GlobalBatchSampler(LENGTH, global_batch_size=GLOBAL_BATCH, micro_batch_size=4, seed=3)
    return model, batches


def _train_one(model, optimizer, batch, inputs):
    """One optimizer step; this worker's part of the loss over the global batch, and its samples."""
    trained, total = [], torch.zeros((), dtype=torch.float64)
    for micro in accumulate(model, batch):
        rows = inputs[micro.indices]
        losses = (model(rows) - rows[:, :1] * rows[:, 1:2]).square()
        (losses.sum() * micro.loss_scale).backward()
        if not micro.is_padding:
            total += losses.detach().sum() / batch.num_samples
            trained += micro.indices
    optimizer.step()
    optimizer.zero_grad()
    return total, trained


def _train(config):
    """Steps of some hundredths of a second, until somebody says stop."""
    directory, pause = Path(config["tmp_path"]), threading.Event()
    model, batches = _build()
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer), "batches": batches}
    journal, inputs = Journal(directory / "history"), _inputs()
    with Checkpointer(state, every_n_steps=config["save_every"]) as checkpointer:
        report = checkpointer.restore()
        journal.began(checkpointer.step_count, report and str(report))
        while True:
            for batch in batches:
                pause.wait(0.03)
                loss, trained = _train_one(model, optimizer, batch, inputs)
                shared = torch.stack([loss, torch.tensor(float((directory / "stop").exists()))])
                torch.distributed.all_reduce(shared)
                journal.trained(checkpointer.step_count + 1, shared[0].item(), trained)
                checkpointer.step()
                if shared[1]:
                    return


def _uninterrupted(num_steps):
    """The same training in this process, which is one worker and has no break."""
    model, batches = _build()
    optimizer, inputs, points = torch.optim.AdamW(model.parameters(), lr=1e-2), _inputs(), []
    while len(points) < num_steps:
        for batch in batches:
            loss, trained = _train_one(model, optimizer, batch, inputs)
            batches.on_step(step=len(points) + 1)
            points.append(Point(len(points) + 1, loss.item(), 1, tuple(sorted(trained))))
    return points[:num_steps]


class _Run:
    """A run in a thread of its own, on as many workers as there are nodes with a slot."""

    def __init__(self, cluster, fit, tmp_path, save_every, callbacks):
        cloudpickle.register_pickle_by_value(history)
        self.cluster, self.tmp_path, self.nodes, self.result = cluster, tmp_path, [], None
        failures = ray.train.FailureConfig(max_failures=5)

        def target():
            config = {"save_every": save_every}
            run_config = {"callbacks": callbacks, "failure_config": failures}
            self.result = fit(_train, config, num_workers=(1, 2), scaling=SLOT, trainer=TorchTrainer, **run_config)

        self.thread = threading.Thread(target=target)

    def add_node(self):
        node = self.cluster.add_node(num_cpus=1, resources={"slot": 1}, object_store_memory=100 * 2**20)
        self.nodes.append(node)
        self._look()

    def remove_node(self):
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        self._look()

    def _look(self):
        """Have the coordinator of resources look at the nodes now; by itself it looks every 20 s."""
        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("test", recompute=True))

    def wait_for_group(self, number, world_size, timeout_s=150.0):
        """Until the group of workers with this number, from 0, has trained its steps."""
        pause = threading.Event()
        for _ in range(int(timeout_s / 0.1)):
            groups = read_attempts(self.tmp_path / "history")
            if len(groups) > number and groups[number].last_step >= (groups[number].began or 0) + STEPS_EACH:
                assert groups[number].world_size == world_size
                return groups[number]
            assert self.thread.is_alive(), f"the run ended early: {self.result}"
            pause.wait(0.1)
        raise TimeoutError(f"group {number} has not trained {STEPS_EACH} steps: {groups[-1:]}")

    def __enter__(self):
        self.add_node()
        self.thread.start()
        return self

    def __exit__(self, *error):
        (self.tmp_path / "stop").touch()
        self.thread.join(timeout=60)
        for node in self.nodes:
            self.cluster.remove_node(node)


def test_a_node_joins_a_worker_is_killed_a_node_vanishes_and_the_run_follows_one_without_any_of_it(
    cluster, fit, tmp_path
):
    with _Run(cluster, fit, tmp_path, SAVE_EVERY, [ResizeGuard(timeout_s=60)]) as run:
        run.wait_for_group(0, world_size=1)
        run.add_node()
        group = run.wait_for_group(1, world_size=2)
        os.kill(group.pids[1], signal.SIGKILL)
        run.wait_for_group(2, world_size=2)
        run.remove_node()
        run.wait_for_group(3, world_size=1)

    groups = read_attempts(tmp_path / "history")
    assert run.result.error is None
    assert [group.world_size for group in groups] == [1, 2, 2, 1]
    # The planned change costs nothing: the step that was saved is the last that was trained.
    joined, killed, vanished = steps_lost(groups)
    assert joined == 0
    assert groups[1].began == groups[0].last_step >= STEPS_EACH
    # The others cost what was trained since the last save, and no more.
    assert max(killed, vanished) <= SAVE_EVERY
    assert [group.began % SAVE_EVERY for group in groups[2:]] == [0, 0]

    points = surviving(groups)
    reference = _uninterrupted(len(points))
    assert data_problems(points, reference, LENGTH) == []
    # In float64, another number of workers changes the rounding of a sum and nothing else.
    pairs = [[point.loss, other.loss] for point, other in zip(points, reference, strict=True)]
    losses = torch.tensor(pairs, dtype=torch.float64)
    assert torch.allclose(losses[:, 0], losses[:, 1], rtol=1e-9, atol=0.0)


def test_without_the_guard_the_same_change_costs_the_steps_since_the_last_save(cluster, fit, tmp_path):
    with _Run(cluster, fit, tmp_path, 1_000_000, []) as run:
        run.wait_for_group(0, world_size=1)
        run.add_node()
        run.wait_for_group(1, world_size=2)

    groups = read_attempts(tmp_path / "history")
    assert [group.world_size for group in groups] == [1, 2]
    assert steps_lost(groups) == [groups[0].last_step]
    assert groups[0].last_step >= STEPS_EACH
    assert surviving(groups)[0].world_size == 2
