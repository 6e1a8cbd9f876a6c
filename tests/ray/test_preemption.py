"""A node that is drained: every rank hears of it, and a checkpoint is there before the deadline."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import ray
import ray.train
import torch
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from ray.train import collective
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ray_stateful import ray_train
from ray_stateful.checkpoint import restore
from ray_stateful.checkpointer import Checkpointer
from ray_stateful.format.layout import CheckpointName

ASK_EVERY_N_STEPS = 5
DRAIN_S = 20.0


def _say(config, **what):
    with Path(config["tmp_path"], f"log.{ray.train.get_context().get_world_rank()}").open("a") as file:
        file.write(json.dumps(what) + "\n")


def _train_until_preempted(config):
    """Steps of a hundredth of a second; all ranks stop at the same one."""
    _say(config, node=ray.get_runtime_context().get_node_id())
    rank, pause = ray.train.get_context().get_world_rank(), threading.Event()
    for step in range(1, 5_000):
        pause.wait(0.01)
        if step % ASK_EVERY_N_STEPS == 0:
            found = ray_train.preemption()
            if collective.broadcast_from_rank_zero(found is not None if rank == 0 else None):
                break
    while (found := ray_train.preemption()) is None:
        pause.wait(0.01)
    _say(config, step=step, left=found.seconds_left(), ranks=found.ranks)
    return step


class _Sharded:
    """A row on each rank, so that a checkpoint without one of them is not whole."""

    def __init__(self, fill):
        mesh = init_device_mesh("cpu", (2,))
        self.rows = distribute_tensor(torch.full((2, 1000), float(fill)), mesh, [Shard(0)])

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state_dict):
        self.rows = state_dict["rows"]


def _train_with_checkpointer(config):
    """The loop that users write: it saves when a node is drained, and for no other reason."""
    _say(config, node=ray.get_runtime_context().get_node_id())
    pause, part = threading.Event(), _Sharded(1)
    checkpointer = Checkpointer({"part": part}, every_n_steps=1_000_000, timeout_s=15)
    saved = None
    while saved is None and checkpointer.step_count < 5_000:
        pause.wait(0.01)
        saved = checkpointer.step({})
    found = ray_train.preemption()
    _say(config, step=saved.step, left=found.seconds_left(), ranks=found.ranks)
    fresh = {"part": _Sharded(0)}
    assert restore(fresh, checkpoint=saved.name, verify="full").step == saved.step
    assert torch.equal(fresh["part"].rows.to_local(), part.rows.to_local())
    # Once is enough: it does not save at every step until the node is gone.
    assert [checkpointer.step({}) for _ in range(25)] == [None] * 25
    return saved.name


def _report_alone(config):
    """Rank 1 is gone so far as anybody can see, and its peer does not ask whether everything was written."""
    rank, run = ray.train.get_context().get_world_rank(), ray_train.current_run()
    name = str(CheckpointName(_train_until_preempted(config), "bbbbbb"))
    if rank == 1:
        return None
    Path(run.path, name).mkdir()
    run.report(run.prepare_report({}, name))
    return name


def _drain(cluster, node_id, seconds):
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the test takes it away",
        int((time.time() + seconds) * 1000),
    )
    assert accepted, why


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _run(cluster, fit, function, tmp_path, trainer=DataParallelTrainer, **failure):
    """A run of two workers on a node each; that of rank 1 is drained."""
    nodes = [cluster.add_node(num_cpus=1, resources={"slot": 1}) for _ in range(2)]
    results, pause = [], threading.Event()

    def run():
        scaling = {"resources_per_worker": {"CPU": 1, "slot": 1}}
        failures = ray.train.FailureConfig(**failure)
        results.append(fit(function, scaling=scaling, trainer=trainer, failure_config=failures))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not (lines := _lines(tmp_path / "log.1")):
            assert thread.is_alive(), "the run ended early"
            pause.wait(0.1)
        _drain(cluster, lines[0]["node"], DRAIN_S)
        thread.join(timeout=60)
        assert not thread.is_alive()
    finally:
        for node in nodes:
            cluster.remove_node(node)
    return results[0]


def test_a_drained_node_leads_to_a_checkpoint_before_the_deadline(cluster, fit, tmp_path):
    result = _run(cluster, fit, _train_with_checkpointer, tmp_path, trainer=TorchTrainer)

    assert Path(result.checkpoint.path).name == result.return_value
    zero, one = _lines(tmp_path / "log.0"), _lines(tmp_path / "log.1")
    assert zero[1]["step"] == one[1]["step"]
    for _, told in (zero, one):
        assert told["ranks"] == [1]
        assert 0 < told["left"] < DRAIN_S


def test_a_relaxed_report_registers_what_one_rank_wrote_alone(cluster, fit, tmp_path):
    result = _run(cluster, fit, _report_alone, tmp_path, relax_collectives_on_preemption=True)

    # Only the missing manifest says that it is not whole: nothing that Ray keeps does.
    assert Path(result.checkpoint.path).name == result.return_value
    assert list(Path(result.checkpoint.path).iterdir()) == []
