"""The elastic contract under a real Ray: nodes come, are drained and go, a worker is killed; the mathematics stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import ray
import ray.train
import torch
from ray import cloudpickle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    ResourceRequestPriority,
    get_or_create_autoscaling_coordinator,
)
from ray.train.torch import TorchTrainer

from ray_stateful import ray_train
from ray_stateful.checkpoint import restore
from ray_stateful.checkpointer import Checkpointer
from ray_stateful.ray_callbacks import ResizeGuard
from ray_stateful.testing import run_ranks
from tests.ray import elastic_training
from tests.ray.elastic_training import (
    BATCHES_PER_EPOCH,
    LENGTH,
    NUM_STEPS,
    build,
    parameters,
    train_one,
    train_uninterrupted,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import history
from history import Journal, data_problems, read_attempts, steps_lost, surviving

# In steps. A group that is to be given up has always trained some more than it had saved.
SAVE_EVERY, STEPS_EACH = 10, 15
# Seconds for a step of a group that has trained these, so that the run is not over before a change has come.
WAITING_STEP_S = 1.0

# A resource of the added nodes alone: the number of their slots is the number of workers.
SLOT = {"resources_per_worker": {"CPU": 1, "slot": 1}, "elastic_resize_monitor_interval_s": 0.5}


def _train(config):
    """Up to the last step: `STEPS_EACH` as fast as it goes, and then slowly until this group's end, or "go on"."""
    directory, pause, data = Path(config["tmp_path"]), threading.Event(), elastic_training.data()
    # Another seed for each attempt: nothing but the checkpoint makes them alike.
    model, optimizer, batches, state = build(seed=1 if ray.train.get_checkpoint() is None else 2)
    journal = Journal(directory / "history")
    with Checkpointer(state, every_n_steps=SAVE_EVERY, timeout_s=60) as checkpointer:
        report = checkpointer.restore()
        journal.began(checkpointer.step_count, report and str(report))
        until = checkpointer.step_count + STEPS_EACH
        while True:
            for batch in batches:
                if checkpointer.step_count >= until and not (directory / "go on").exists():
                    pause.wait(WAITING_STEP_S)
                loss, trained = train_one(model, optimizer, batch, *data)
                journal.trained(checkpointer.step_count + 1, loss, trained)
                saved = checkpointer.step()
                if saved is not None and ray_train.preemption() is not None:
                    Path(directory, f"saved for the drain.{saved.step}").touch()
                if checkpointer.step_count == NUM_STEPS:
                    return


class _Run:
    """A run in a thread of its own, on as many workers as the nodes that were added have slots."""

    def __init__(self, cluster, fit, tmp_path):
        for module in (history, elastic_training):
            cloudpickle.register_pickle_by_value(module)
        self.cluster, self.tmp_path, self.nodes, self.result = cluster, tmp_path, {}, None
        failures = ray.train.FailureConfig(max_failures=5)

        def target():
            run_config = {"callbacks": [ResizeGuard(timeout_s=60)], "failure_config": failures}
            self.result = fit(_train, {}, num_workers=(1, 4), scaling=SLOT, trainer=TorchTrainer, **run_config)

        self.thread = threading.Thread(target=target)

    def add_node(self, num_slots=1):
        node = self.cluster.add_node(num_cpus=num_slots, resources={"slot": num_slots}, object_store_memory=100 * 2**20)
        self.nodes[node] = num_slots
        self._look()
        return node

    def remove_node(self, node):
        """Without waiting for what is on it. No group that starts after this is planned with it."""
        # Ray hears of a node's end later than of its workers', and a group planned in between would wait for the node.
        self.others_want(self.nodes.pop(node))
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.wait_for_nodes()
        self._look()
        self.others_want(0)

    def others_want(self, num_slots):
        """Somebody else wants slots, and has asked before the run did."""
        # Who has asked first is served first, also when it asks for more later. Here, for next to nothing.
        wanted = [{"slot": 1}] * num_slots or [{"memory": 1}]
        request = get_or_create_autoscaling_coordinator().request_resources
        ray.get(request.remote("somebody else", wanted, 3600, priority=ResourceRequestPriority.HIGH))

    def _look(self):
        """Have the coordinator of resources look at the nodes now; by itself it looks every 20 s."""
        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("test", recompute=True))

    def wait_for_group(self, number, world_size, timeout_s=150.0):
        """Until the group of workers with this number, from 0, has trained its steps."""

        def trained():
            groups = read_attempts(self.tmp_path / "history")
            if len(groups) > number and groups[number].last_step >= (groups[number].began or 0) + STEPS_EACH:
                assert groups[number].world_size == world_size
                return groups[number]
            return None

        return self.wait_for(trained, f"the steps of group {number}", timeout_s)

    def wait_for_save_for_drain(self, timeout_s=60.0):
        """Until the workers have saved because of a drain; the step."""

        def saved():
            return min((int(path.suffix[1:]) for path in self.tmp_path.glob("saved for the drain.*")), default=None)

        return self.wait_for(saved, "a save for the drain", timeout_s)

    def wait_for(self, look, what, timeout_s):
        pause = threading.Event()
        for _ in range(int(timeout_s / 0.1)):
            if (found := look()) is not None:
                return found
            assert self.thread.is_alive(), f"the run ended early: {self.result}"
            pause.wait(0.1)
        raise TimeoutError(f"{what} did not come in {timeout_s} s: {read_attempts(self.tmp_path / 'history')[-1:]}")

    def __enter__(self):
        self.others_want(0)
        return self

    def start(self):
        self.thread.start()

    def __exit__(self, *error):
        (self.tmp_path / "go on").touch()
        self.thread.join(timeout=60)
        for node in self.nodes:
            self.cluster.remove_node(node)
        ray.get(get_or_create_autoscaling_coordinator().cancel_request.remote("somebody else"))


def test_a_run_through_4_2_3_1_and_4_workers_is_drained_killed_and_resized_and_follows_one_that_stayed_at_4(
    cluster, fit, drain, tmp_path
):
    with _Run(cluster, fit, tmp_path) as run:
        leaving, _ = run.add_node(num_slots=2), run.add_node(num_slots=2)
        run.start()
        run.wait_for_group(0, world_size=4)
        drain(leaving.node_id, seconds=120)
        saved_for_drain = run.wait_for_save_for_drain()
        run.remove_node(leaving)
        run.wait_for_group(1, world_size=2)
        run.add_node()
        group = run.wait_for_group(2, world_size=3)
        os.kill(group.pids[1], signal.SIGKILL)
        run.wait_for_group(3, world_size=3)
        run.others_want(2)
        run.wait_for_group(4, world_size=1)
        # Until there is room for all four at once, it is others' room.
        run.others_want(3)
        run.add_node()
        run.others_want(0)
        run.wait_for_group(5, world_size=4)

    groups = read_attempts(tmp_path / "history")
    assert run.result.error is None
    assert [group.world_size for group in groups] == [4, 2, 3, 3, 1, 4]
    # A planned change costs nothing: the step that was saved is the last that was trained.
    drained, joined, killed, wanted, grown = steps_lost(groups)
    assert (joined, wanted, grown) == (0, 0, 0)
    # The others cost what was trained since the last save, and no more.
    assert max(drained, killed) <= SAVE_EVERY
    assert groups[1].began >= saved_for_drain
    assert groups[3].began % SAVE_EVERY == 0

    expected, *_ = run_ranks(4, train_uninterrupted, str(tmp_path / "steady"))
    points, reference = surviving(groups), surviving(read_attempts(tmp_path / "steady"))
    assert [point.step for point in points] == [point.step for point in reference] == list(range(1, NUM_STEPS + 1))
    assert {point.world_size for point in reference} == {4}
    # Exactly once: the same samples in every step, and in every whole epoch each of them.
    assert data_problems(points, reference, LENGTH) == []
    for first in range(0, NUM_STEPS - BATCHES_PER_EPOCH + 1, BATCHES_PER_EPOCH):
        epoch = points[first : first + BATCHES_PER_EPOCH]
        assert Counter(sample for point in epoch for sample in point.samples) == Counter(range(LENGTH))

    # In float64, another number of workers changes the rounding of a sum and nothing else; AdamW carries it on.
    losses = torch.tensor([[point.loss for point in run] for run in (points, reference)], dtype=torch.float64)
    assert torch.allclose(losses[0], losses[1], rtol=1e-9, atol=0.0)
    # What the last four left behind, read by one process into a model that was built another way.
    model, _, _, state = build(seed=2)
    assert restore(state, run=str(tmp_path / "run"), verify="full").step == NUM_STEPS
    apart = [(p - q).abs().max().item() for p, q in zip(parameters(model), expected, strict=True)]
    assert max(apart) < 1e-9
    # It did train, and the worlds did differ.
    assert losses[0, -24:-8].mean() < 0.5 * losses[0, :16].mean()
    assert not torch.equal(losses[0], losses[1])
