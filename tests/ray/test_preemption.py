"""A node that is drained: every rank hears of it, and a checkpoint is there before the deadline."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import ray
import ray.train
import torch
from ray.train import collective
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ray_stateful import ray_train
from ray_stateful.checkpoint import restore
from ray_stateful.checkpointer import Checkpointer
from ray_stateful.format.layout import CheckpointName
from ray_stateful.testing import FaultyStorage

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
        self.rows = torch.full((2, 1000), float(fill))
        if torch.distributed.is_initialized():
            self.rows = distribute_tensor(self.rows, init_device_mesh("cpu", (2,)), [Shard(0)])

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


class _DeadlyStorage(FaultyStorage):
    """Rank 1 dies in its second save, when the other has written its part and Ray waits for the other alone."""

    def open_sink(self, path):
        if ray.train.get_context().get_world_rank() == 1 and self.counts()["open_sink"]:
            required, pause = get_train_context().get_synchronization_actor().get_required_ranks, threading.Event()
            for _ in range(int(DRAIN_S / 0.05)):
                if ray.get(required.remote()) == [0] and Path(path).with_name("__0_0.distcp").exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                pause.wait(0.05)
            raise TimeoutError("Ray has not relaxed its barrier, or rank 0 has not written")
        return super().open_sink(path)


def _lose_a_rank_in_a_save(config):
    """A save that somebody asks for, and one because a node is drained."""
    pause, part, run = threading.Event(), _Sharded(0), ray_train.current_run()
    run = dataclasses.replace(run, storage=_DeadlyStorage(run.storage))
    checkpointer = Checkpointer({"part": part}, run=run, timeout_s=60)
    checkpointer.request_save()
    while checkpointer.step_count < 5_000:
        pause.wait(0.01)
        part.rows += 1
        saved = checkpointer.step({})
        if saved is not None:
            _say(config, node=ray.get_runtime_context().get_node_id(), saved=saved.name)


def _report_alone(config):
    """Rank 1 is gone so far as anybody can see, and its peer does not ask whether everything was written."""
    rank, run = ray.train.get_context().get_world_rank(), ray_train.current_run()
    name = str(CheckpointName(_train_until_preempted(config), "bbbbbb"))
    if rank == 1:
        return None
    Path(run.path, name).mkdir()
    run.report(run.prepare_report({}), name)
    return name


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def run_drained(cluster, fit, drain, tmp_path):
    return partial(_run_drained, cluster, fit, drain, tmp_path)


def _run_drained(cluster, fit, drain, tmp_path, function, trainer=DataParallelTrainer, **failure):
    """A run of two workers on a node each; that of rank 1 is drained. What the run comes to, or its error."""
    nodes = [cluster.add_node(num_cpus=1, resources={"slot": 1}) for _ in range(2)]
    results, pause = [], threading.Event()

    def run():
        scaling = {"resources_per_worker": {"CPU": 1, "slot": 1}}
        failures = ray.train.FailureConfig(**failure)
        try:
            results.append(fit(function, scaling=scaling, trainer=trainer, failure_config=failures))
        except ray.train.TrainingFailedError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not (lines := _lines(tmp_path / "log.1")):
            assert thread.is_alive(), "the run ended early"
            pause.wait(0.1)
        drain(lines[0]["node"], DRAIN_S)
        thread.join(timeout=60)
        assert not thread.is_alive()
    finally:
        for node in nodes:
            cluster.remove_node(node)
    return results[0]


def test_a_drained_node_leads_to_a_checkpoint_before_the_deadline(run_drained, tmp_path):
    result = run_drained(_train_with_checkpointer, trainer=TorchTrainer)

    assert Path(result.checkpoint.path).name == result.return_value
    zero, one = _lines(tmp_path / "log.0"), _lines(tmp_path / "log.1")
    assert zero[1]["step"] == one[1]["step"]
    for _, told in (zero, one):
        assert told["ranks"] == [1]
        assert 0 < told["left"] < DRAIN_S


def test_a_save_in_which_a_rank_dies_is_not_committed_when_ray_would_register_it(run_drained, tmp_path):
    relaxed = {"relax_collectives_on_preemption": True, "max_preemption_failures": 0}
    result = run_drained(_lose_a_rank_in_a_save, trainer=TorchTrainer, **relaxed)

    assert isinstance(result, ray.train.TrainingFailedError)
    whole, in_part = sorted((tmp_path / "run").glob("checkpoint_s*"))
    assert [path.name for path in in_part.iterdir()] == ["__0_0.distcp"]
    assert [line["saved"] for line in _lines(tmp_path / "log.0")] == [whole.name]
    # Ray knows of no other, and the one that it knows is whole.
    known = json.loads((tmp_path / "run" / ray_train.SNAPSHOT).read_text())["checkpoint_results"]
    assert [each["checkpoint_dir_name"] for each in known] == [whole.name]
    part = _Sharded(0)
    assert restore({"part": part}, run=str(tmp_path / "run"), verify="full").step == 1
    assert torch.equal(part.rows, torch.ones(2, 1000))


def test_a_relaxed_report_registers_what_one_rank_wrote_alone(run_drained):
    result = run_drained(_report_alone, relax_collectives_on_preemption=True)

    # Only the missing manifest says that it is not whole: nothing that Ray keeps does.
    assert Path(result.checkpoint.path).name == result.return_value
    assert list(Path(result.checkpoint.path).iterdir()) == []
