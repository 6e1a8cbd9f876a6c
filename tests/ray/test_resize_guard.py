"""A resize loses no step with the guard, and how many without it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train import collective
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from ray_stateful import ray_train, save_requests
from ray_stateful.format.layout import MANIFEST, CheckpointName, parse_name
from ray_stateful.ray_callbacks import ResizeGuard, logger

# A resource of the added nodes alone: the number of these nodes is the number of workers.
SLOT = {"resources_per_worker": {"CPU": 1, "slot": 1}, "elastic_resize_monitor_interval_s": 0.5}


def _train(config):
    """Steps that cost some hundredths of a second, and one checkpoint."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    run = ray_train.current_run()
    names = collective.broadcast_from_rank_zero(run.candidates() if rank == 0 else None)
    start = parse_name(names[0]).step if names else 0
    log = Path(config["tmp_path"], "log.jsonl")

    def say(**what):
        if rank == 0:
            with log.open("a") as file:
                file.write(json.dumps({"world_size": world_size, **what}) + "\n")

    def save(step):
        name = str(CheckpointName(step, f"{world_size:06x}"))
        if rank == 0:
            Path(run.path, name).mkdir()
            Path(run.path, name, MANIFEST).write_text("{}")
        run.report(run.prepare_report({"step": step}), name)
        return name

    say(start=start)
    pause, stop = threading.Event(), Path(config["tmp_path"], "stop")
    for step in range(start + 1, 2_000):
        pause.wait(0.02)
        say(trained=step)
        if config["checkpoint_at"] == step:
            save(step)
        stopped = collective.broadcast_from_rank_zero(stop.exists() if rank == 0 else None)
        if stopped:
            return step
    raise TimeoutError("nobody asked to stop")


class _Elastic:
    """A run in a thread of its own, and the cluster under it."""

    def __init__(self, cluster, fit, tmp_path, **config):
        self.cluster, self.log = cluster, tmp_path / "log.jsonl"
        self.stop = tmp_path / "stop"
        self.nodes = []
        self.result = None
        self.thread = threading.Thread(target=self._fit, args=(fit, config))

    def _fit(self, fit, config):
        callbacks = config.pop("callbacks")
        self.result = fit(_train, config, num_workers=(1, 2), scaling=SLOT, callbacks=callbacks)

    def add_node(self):
        self.nodes.append(self.cluster.add_node(num_cpus=1, resources={"slot": 1}))
        self.tick()

    def tick(self):
        """Have the coordinator look at the nodes now; by itself it looks every 20 s."""
        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("test", recompute=True))

    def wait_for(self, described, timeout_s=90.0):
        event = threading.Event()
        for _ in range(int(timeout_s / 0.1)):
            lines = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
            if any(described(line) for line in lines):
                return lines
            assert self.thread.is_alive(), "the run ended early"
            event.wait(0.1)
        raise TimeoutError(lines[-3:])

    def __enter__(self):
        self.add_node()
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.touch()
        self.thread.join(timeout=60)
        for node in self.nodes:
            self.cluster.remove_node(node)


def _lost(lines):
    """Steps that were trained and are not part of what the later worker groups started from."""
    starts = [(position, line["start"]) for position, line in enumerate(lines) if "start" in line]
    lost = []
    for position, start in starts[1:]:
        trained = [line["trained"] for line in lines[:position] if "trained" in line]
        lost.append(trained[-1] - start)
    return lost


def test_without_the_guard_the_steps_since_the_last_checkpoint_are_lost(cluster, fit, tmp_path):
    with _Elastic(cluster, fit, tmp_path, callbacks=[], checkpoint_at=3) as run:
        run.wait_for(lambda line: line["world_size"] == 1 and line.get("trained") == 10)
        run.add_node()
        lines = run.wait_for(lambda line: line["world_size"] == 2 and "trained" in line)

    assert next(line["start"] for line in lines if line["world_size"] == 2) == 3
    assert _lost(lines)[0] >= 7


# --- when things go wrong: the guard alone, and a group that misbehaves ----------------------------------------------


class _Group:
    """A worker group of this process: what the controller runs on the workers runs here."""

    def __init__(self, errors=(), raises=None, running=True):
        self.errors, self.raises, self.running, self.polls = errors, raises, running, 0

    def __len__(self):
        return 1

    def execute_async(self, function, *args):
        return [ray.put(function(*args))]

    def poll_status(self, timeout):
        self.polls += 1
        if self.raises is not None:
            raise self.raises
        error = RuntimeError("worker fell over") if self.errors else None
        return WorkerGroupPollStatus({0: WorkerStatus(running=self.running, error=error)})


@pytest.fixture
def said(monkeypatch):
    """What the guard logs, with the level."""
    lines = []
    monkeypatch.setattr(save_requests, "_mailbox", save_requests._Mailbox())
    monkeypatch.setattr(logger, "log", lambda level, text, *args, **kw: lines.append((level, text % args)))
    monkeypatch.setattr(logger, "info", lambda text, *args, **kw: lines.append(("info", text % args)))
    monkeypatch.setattr(logger, "warning", lambda text, *args, **kw: lines.append(("warning", text % args)))
    return lines


def _resize(guard, group, after=lambda guard: None):
    guard.after_worker_group_start(group)
    after(guard)
    guard.before_controller_execute_resize_decision(ResizeDecision(num_workers=2, resources_per_worker={}))


def test_nothing_is_asked_at_a_first_start_after_a_failure_and_of_a_group_that_is_gone(said):
    ResizeGuard().before_controller_execute_resize_decision(ResizeDecision(num_workers=2, resources_per_worker={}))
    _resize(ResizeGuard(), _Group(), lambda guard: guard.before_controller_execute_failure_decision(None))
    _resize(ResizeGuard(), _Group(), lambda guard: guard.before_worker_group_shutdown(None))
    _resize(ResizeGuard(), _Group(), lambda guard: guard.after_worker_group_abort(None))

    assert said == []
    assert save_requests.save_requested() == 0


def test_a_training_function_that_never_looks_is_not_waited_for(cluster, said):
    group = _Group()
    _resize(ResizeGuard(timeout_s=60), group)

    assert [level for level, _ in said] == ["warning"]
    assert "no Checkpointer looks for requests to save" in said[0][1]
    assert group.polls == 0


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (_Group(errors=[1]), "worker fell over"),
        (_Group(raises=OSError("storage is away")), "saving before a resize failed"),
        (_Group(), "no checkpoint in 1 s"),
    ],
)
def test_whatever_goes_wrong_is_a_warning_and_the_resize_goes_on(cluster, said, group, sentence):
    save_requests.save_requested()
    _resize(ResizeGuard(timeout_s=1), group)

    assert [level for level, _ in said] == ["warning"]
    assert sentence in said[0][1]


def test_training_that_ends_is_not_waited_for(cluster, said):
    save_requests.save_requested()
    group = _Group(running=False)
    _resize(ResizeGuard(timeout_s=60), group)

    assert [level for level, _ in said] == ["info"]
    assert "training ended first" in said[0][1]
    assert group.polls == 1


@pytest.mark.parametrize(("saved", "level"), [(None, "warning"), ("never_registered", "warning"), ("name", "info")])
def test_a_rank_that_holds_is_not_enough_ray_must_have_registered_what_it_saved(cluster, said, saved, level):
    save_requests.save_requested()
    threading.Thread(target=save_requests.hold, args=(1, saved), daemon=True).start()
    assert save_requests.wait_until_held(1, 30.0)
    guard = ResizeGuard(timeout_s=1)
    report = SimpleNamespace(checkpoint=SimpleNamespace(path="/storage/run/name"))
    _resize(guard, _Group(), lambda guard: guard.after_report(training_report=report, metrics=[]))

    assert [each for each, _ in said] == [level]


def test_what_was_saved_where_ray_does_not_count_is_not_waited_for(cluster, said):
    save_requests.save_requested()
    threading.Thread(
        target=save_requests.hold, args=(1, "elsewhere"), kwargs={"is_counted": False}, daemon=True
    ).start()
    assert save_requests.wait_until_held(1, 30.0)
    _resize(ResizeGuard(timeout_s=60), group := _Group())

    assert [each for each, _ in said] == ["info"]
    assert "saved elsewhere first, outside of this run" in said[0][1]
    assert group.polls == 1


def test_a_ray_without_the_hooks_gets_a_callback_that_does_nothing_and_says_so():
    code = """
import sys, warnings, ray.train
sys.modules["ray.train.v2._internal.execution.callback"] = None
from ray_stateful.ray_callbacks import ResizeGuard
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    guard = ResizeGuard(timeout_s=5)
assert "does nothing" in str(caught[0].message), caught
ray.train.RunConfig(callbacks=[guard])
guard.after_report(run_context=None, metrics=[], checkpoint=None)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_guard_without_patience_is_refused():
    with pytest.raises(ValueError, match="timeout_s is 0"):
        ResizeGuard(timeout_s=0)
