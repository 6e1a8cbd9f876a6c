"""What Ray Train 2.60 does to those who use it as it suggests itself, and that our run does not walk into it.

Each naive half is here so that it is noticed when a new Ray no longer does it; `docs/design/ray.md` tells the stories.
"""

from __future__ import annotations

import dataclasses
import json
import logging.handlers
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray.train
import torch
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.train_fn_utils import set_train_fn_utils

from ray_stateful import Checkpointer, ray_train
from ray_stateful.checkpoint import restore, save
from ray_stateful.errors import ReportFailed, SaveFailed, StorageError
from ray_stateful.format.layout import MANIFEST, parse_name
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.pyarrow import PyarrowStorage
from tests.part import Part

# Seconds within which a call returns that is not stranded.
SOON_S = 3.0


def _starts(call):
    """Run `call` in a thread of its own; the event is set when it has returned, or raised."""
    done = threading.Event()

    def run():
        try:
            call()
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def _write_checkpoint(run_path, name, committed=True):
    directory = Path(run_path, name)
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(b"x" * 100)
    if committed:
        (directory / MANIFEST).write_text("{}")
    return str(directory)


def _meet(config, name, timeout_s=60.0):
    """A barrier of the two ranks that Ray has no part in."""
    rank = ray.train.get_context().get_world_rank()
    Path(config["tmp_path"], f"{name}.{rank}").touch()
    event, other = threading.Event(), Path(config["tmp_path"], f"{name}.{1 - rank}")
    for _ in range(int(timeout_s / 0.02)):
        if other.exists():
            return
        event.wait(0.02)
    raise TimeoutError(name)


# --- one run that does what it should not ----------------------------------------------------------------------------


def _naive(config):
    rank = ray.train.get_context().get_world_rank()
    run_path = ray.train.get_context().get_storage().experiment_fs_path
    seen = {}

    def report(name, mode=CheckpointUploadMode.NO_UPLOAD, path=None, **kwargs):
        checkpoint = Checkpoint(path or os.path.join(run_path, name))
        ray.train.report({}, checkpoint=checkpoint, checkpoint_upload_mode=mode, **kwargs)

    # R1: rank 1 has a reason not to report.
    if rank == 0:
        _write_checkpoint(run_path, "first")
        _meet(config, "before_r1")
        done = _starts(lambda: report("first"))
        seen["rank 0 waits for a rank that does not report"] = not done.wait(SOON_S)
        _meet(config, "after_r1")
        seen["and goes on when it does"] = done.wait(30)
    else:
        _meet(config, "before_r1")
        _meet(config, "after_r1")
        report("first")

    # R9: asking for a preemption is no different.
    _meet(config, "before_r9")
    if rank == 0:
        done = _starts(ray.train.get_preemption_info)
        seen["rank 0 waits for a rank that does not ask"] = not done.wait(SOON_S)
        _meet(config, "after_r9")
        seen["and has its answer when it does"] = done.wait(30)
    else:
        _meet(config, "after_r9")
        ray.train.get_preemption_info()

    # R3: the checkpoint lies where it belongs, and is reported for upload in the background.
    name = f"async_{rank}"
    path = _write_checkpoint(run_path, name)
    ray.train.report(
        {},
        checkpoint=Checkpoint(path) if rank == 0 else None,
        checkpoint_dir_name="async_0",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )
    if rank == 0:
        event = threading.Event()
        for _ in range(100):
            if not os.path.exists(path):
                break
            event.wait(0.05)
        seen["an upload in the background deletes what is there already"] = not os.path.exists(path)

    # R2: a report that raises, caught, and the next one.
    _meet(config, "before_r2")
    with pytest.raises(ValueError, match="outside the experiment"):
        report("", path="/somewhere/else")
    _write_checkpoint(run_path, f"next_{rank}")
    done = _starts(lambda: report(f"next_{rank}"))
    seen["a report after one that raised never returns"] = not done.wait(SOON_S)
    _meet(config, "after_r2")
    return seen


def test_ray_strands_deletes_and_hangs_when_used_naively(fit):
    seen = fit(_naive).return_value

    assert dict.fromkeys(seen, True) == seen
    assert len(seen) == 6


# --- controllers that die --------------------------------------------------------------------------------------------


def _report_numpy(config):
    ray.train.report({"loss": np.float32(1)}, checkpoint=Checkpoint(_write_checkpoint(config["tmp_path"], "local")))


def test_a_numpy_metric_ends_the_controller(fit):
    with pytest.raises(ray.train.TrainingFailedError, match="float32"):
        fit(_report_numpy, num_workers=1)


def _report_one_name_twice(config):
    run_path = ray.train.get_context().get_storage().experiment_fs_path
    path = _write_checkpoint(run_path, "step_1")
    for _ in range(2):
        ray.train.report({}, checkpoint=Checkpoint(path), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
    event = threading.Event()
    for _ in range(200):
        if not os.path.exists(path):
            Path(config["tmp_path"], "deleted_while_it_was_the_newest").touch()
            break
        event.wait(0.05)
    # Ray still counts what is not there any more, and fails when it deletes it again.
    other = _write_checkpoint(run_path, "step_2")
    ray.train.report({}, checkpoint=Checkpoint(other), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def test_a_name_used_twice_costs_the_live_checkpoint_and_a_deletion_by_others_costs_the_run(fit, tmp_path):
    with pytest.raises(ray.train.TrainingFailedError):
        fit(_report_one_name_twice, num_workers=1, checkpoint_config=CheckpointConfig(num_to_keep=1))

    assert (tmp_path / "deleted_while_it_was_the_newest").exists()


# --- a save that fails ----------------------------------------------------------------------------------------------


class _Value:
    """A part that is one value, and cannot say which on a rank that is named."""

    def __init__(self, value, bad_rank=None):
        self.value, self.bad_rank = value, bad_rank

    def state_dict(self):
        if self.bad_rank == ray.train.get_context().get_world_rank():
            raise RuntimeError("this rank has lost its value")
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]


def _fail_to_save(config):
    save({"value": _Value(1, bad_rank=1)}, step=1, timeout_s=30)


def test_a_failed_save_reaches_the_driver_as_what_it_is_from_every_rank(fit, tmp_path):
    with pytest.raises(ray.train.WorkerGroupError) as failed:
        fit(_fail_to_save, trainer=TorchTrainer)

    errors = failed.value.worker_failures
    assert {rank: type(_cause(error)) for rank, error in errors.items()} == {0: SaveFailed, 1: SaveFailed}
    assert {rank: list(_cause(error).causes) for rank, error in errors.items()} == {0: [1], 1: [1]}
    assert "this rank has lost its value" in str(_cause(errors[0]))
    assert list((tmp_path / "run").glob("checkpoint_s*")) == []


def _cause(error):
    # Ray puts it into one of its own, which keeps the traceback.
    return getattr(error, "_base_exc", error)


# --- our run ---------------------------------------------------------------------------------------------------------


def _ours(config):
    rank = ray.train.get_context().get_world_rank()
    run = ray_train.current_run()
    assert isinstance(run, ray_train.RayRun)
    if rank == 0:
        assert run.candidates() == []
        assert run.tracked() == frozenset()
        _write_checkpoint(run.path, "checkpoint_s0000000001_0badf0", committed=False)
        _write_checkpoint(run.path, "checkpoint_s0000000002_aaaaaa", committed=False)
    names = [f"checkpoint_s{step:010d}_{step:06x}" for step in (10, 20, 30)]
    for name in names:
        if rank == 0:
            _write_checkpoint(run.path, name)
        metrics = {"loss": np.float32(0.5), "nan": torch.tensor(float("nan")), "nested": {"n": [np.int64(3)]}, "s": "a"}
        run.report(run.prepare_report(metrics), name)
    assert ray_train.preemption() is None
    # Each would take itself for the whole world, and save a checkpoint of its own.
    with pytest.raises(RuntimeError, match="Ray Train runs 2 workers, and this one has no torch process group"):
        save({"value": _Value(1)}, step=1)
    return {"uri": run.uri, "names": names}


def _ours_again(config):
    rank = ray.train.get_context().get_world_rank()
    run, said = ray_train.current_run(), logging.handlers.BufferingHandler(100)
    ray_train.logger.addHandler(said)
    candidates, tracked = run.candidates(), run.tracked()
    # R2, on both ranks: the directory is not this run's.
    with pytest.raises(ReportFailed, match="outside the experiment") as failed:
        dataclasses.replace(run, path="/somewhere").report({}, "else")
    assert list(failed.value.causes) == [rank]
    done = []
    thread = _starts(lambda: done.append(_refusal(ray_train.current_run())))
    assert thread.wait(SOON_S)
    said = [record.getMessage() for record in said.buffer if record.levelno >= logging.INFO]
    return {"candidates": candidates, "tracked": sorted(tracked), "second": done[0], "said": said}


def _refusal(run):
    # Before anything is written, as a rule.
    with pytest.raises(RuntimeError, match="an earlier report of this worker failed"):
        run.prepare_report({})
    try:
        run.report({}, "checkpoint_s0000000099_ffffff")
    except ReportFailed as error:
        return str(error)
    return None


def test_a_run_reports_survives_its_metrics_and_finds_its_checkpoints_again(fit, tmp_path):
    first = fit(_ours, checkpoint_config=CheckpointConfig(num_to_keep=2))

    run_path = tmp_path / "run"
    names = first.return_value["names"]
    assert first.return_value["uri"] == str(run_path)
    assert first.checkpoint.path == str(run_path / names[2])
    assert first.metrics["loss"] == 0.5
    assert type(first.metrics["loss"]) is float
    assert first.metrics["nan"] != first.metrics["nan"]
    assert first.metrics["nested"] == {"n": [3]}
    # R7: Ray keeps two, deletes the third, and does not touch what was never reported.
    left = sorted(path.name for path in run_path.iterdir() if path.is_dir())
    assert left == ["checkpoint_s0000000001_0badf0", "checkpoint_s0000000002_aaaaaa", *names[1:]]

    # Committed when the workers died, and never reported; and one that was not committed.
    _write_checkpoint(run_path, "checkpoint_s0000000040_bbbbbb")
    _write_checkpoint(run_path, "checkpoint_s0000000050_cccccc", committed=False)
    # Older than what Ray has: left behind by an abandoned attempt.
    _write_checkpoint(run_path, "checkpoint_s0000000025_dddddd")
    again = fit(_ours_again).return_value

    assert again["candidates"] == ["checkpoint_s0000000040_bbbbbb", names[2], names[1]]
    assert again["tracked"] == names[1:]
    assert "earlier report of this worker failed" in again["second"]
    # R15: a name that was used before by mistake is resumed, too, and nothing else would say why.
    assert any("a run of this name has been here before" in said and str(run_path) in said for said in again["said"])


def _commit_without_a_report(config):
    """Three checkpoints, of which one is reported when it is saved; the others as by workers that died before."""
    run = ray_train.current_run()
    unheard = DirectoryRun(run.storage, run.path, run.uri)
    names = [save({"value": _Value(1)}, {"loss": 0.5}, step=1).name]
    names.append(save({"value": _Value(2)}, step=2, run=unheard).name)
    # The second time Ray's list may not have it yet; to report it again would be R4.
    steps = [restore({"value": _Value(0)}).step for _ in range(2)]
    names.append(save({"value": _Value(3)}, step=3, run=unheard).name)
    # On purpose, whatever the reason: that is not where the run is.
    steps.append(restore({"value": _Value(0)}, checkpoint=names[2]).step)
    return names, steps


def test_what_was_committed_and_never_reported_is_reported_once_when_the_run_goes_on_from_it(fit, tmp_path):
    keep = CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="loss", checkpoint_score_order="min")
    result = fit(_commit_without_a_report, trainer=TorchTrainer, checkpoint_config=keep)

    names, steps = result.return_value
    assert steps == [2, 2, 3]
    assert Path(result.checkpoint.path).name == names[1]
    # Ray counts it, and takes it neither for the best one nor for one without a score.
    assert [checkpoint.path.rpartition("/")[2] for checkpoint, _ in result.best_checkpoints] == [names[0]]
    assert result.metrics == {"step": 2, "loss": sys.float_info.max}
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint_s*")) == names


def _without_a_score(config):
    begun = restore({"value": _Value(0)})
    step = 1 if begun is None else begun.step + 1
    for metrics in ({"loss": float("nan")}, {"loss": None}, {}, {"loss": 0.5}):
        save({"value": _Value(step)}, metrics, step=step)
        step += 1


def test_a_run_that_reported_no_score_or_a_nan_can_be_started_again_and_keeps_the_best(fit, tmp_path):
    keep = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="loss", checkpoint_score_order="min")
    # A driver of its own each time: it loads what the one before has written.
    for last in (4, 8):
        result = fit(_without_a_score, num_workers=1, trainer=TorchTrainer, checkpoint_config=keep)
        assert parse_name(Path(result.checkpoint.path).name).step == last
        assert result.best_checkpoints[-1][1]["loss"] == 0.5


def _in_local_mode(config):
    before = restore({"value": _Value(0)})
    saved = save({"value": _Value(7)}, {"loss": np.float32(2)}, step=3)
    fresh = _Value(0)
    restored = restore({"value": fresh})
    return {
        "before": before,
        "saved": saved.uri,
        "restored": (restored.step, fresh.value),
        "preemption": ray_train.preemption(),
    }


def test_local_mode_saves_to_a_directory_that_the_log_names_and_finds_it_again(fit, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ray.train.constants.DEFAULT_STORAGE_PATH", str(tmp_path / "ray_results"))
    path = str(tmp_path / "ray_results" / "run")
    try:
        result = fit(_in_local_mode, num_workers=0)
        saved = result.return_value.pop("saved")
        assert result.return_value == {"before": None, "restored": (3, 7), "preemption": None}
        assert saved.startswith(f"{path}/checkpoint_s0000000003_")
        assert result.metrics == {"loss": 2.0}
        assert result.checkpoint.path == saved
        assert path in caplog.text
    finally:
        # Ray leaves this process a worker of that run.
        set_train_fn_utils(None)


# --- without workers -------------------------------------------------------------------------------------------------


def test_a_worker_without_a_process_group_may_load_a_checkpoint_that_is_named_by_its_place(tmp_path, monkeypatch):
    saved = save({"part": Part({"n": 7})}, step=1, run=str(tmp_path))
    # One of four that evaluate, each for itself.
    context = SimpleNamespace(get_world_size=lambda: 4, get_storage=lambda: None)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    fresh = Part()
    assert restore({"part": fresh}, checkpoint=saved.uri).step == 1
    assert fresh.value == {"n": 7}
    with pytest.raises(RuntimeError, match="this one has no torch process group"):
        save({"part": fresh}, step=2, run=str(tmp_path))


def test_a_run_of_ray_is_not_said_to_go_on_from_what_it_has_just_saved_first(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray_train.RayRun, "prepare_report", lambda self, metrics: metrics)
    monkeypatch.setattr(ray_train.RayRun, "report", lambda self, prepared, name: None)
    local = LocalFileSystem()
    run = ray_train.RayRun(PyarrowStorage(local), str(tmp_path), str(tmp_path), local)
    saver = Checkpointer({"part": Part({"n": 1})}, run=run, every_n_steps=1, orphans_after_s=None)
    with caplog.at_level("INFO"):
        assert saver.step() is not None
        for thread in threading.enumerate():
            if thread.name == "newest":
                thread.join(30.0)

    assert not [record for record in caplog.records if "goes on from the newest" in record.message]


def test_outside_of_a_worker_there_is_no_run_and_a_directory_must_be_named(tmp_path):
    assert ray_train.current_run() is None
    assert ray_train.preemption() is None
    with pytest.raises(ValueError, match="give a directory or URI"):
        ray_train.find_run(None)
    found = ray_train.find_run(tmp_path / "here")
    assert isinstance(found, DirectoryRun)
    assert found.path == str(tmp_path / "here")
    assert ray_train.find_run(found) is found


def _run_of(path):
    filesystem = LocalFileSystem()
    return ray_train.RayRun(PyarrowStorage(filesystem), str(path), str(path), filesystem)


@pytest.mark.parametrize(
    "snapshot",
    ["", "{", "[]", '{"checkpoint_results": 3}', '{"checkpoint_results": [{}]}', '{"checkpoint_results": ["x"]}',
     '{"checkpoint_results": [], "checkpoint_report_indices": [5, 7]}', "[" * 100_000],
)  # fmt: skip
def test_half_a_snapshot_is_said_to_be_one_and_not_an_empty_list(tmp_path, snapshot):
    (tmp_path / ray_train.SNAPSHOT).write_text(snapshot)

    with pytest.raises(StorageError, match="not Ray's list"):
        _run_of(tmp_path).tracked()


def test_the_snapshot_is_read_in_the_order_of_reports_and_does_not_lead_elsewhere(tmp_path):
    names = ["best", "../outside", "/etc", "newest", "a//b", "second", "nested/inside"]
    snapshot = {
        "checkpoint_results": [{"checkpoint_dir_name": name} for name in names],
        "checkpoint_report_indices": [1, 9, 8, 7, 6, 5, 4],
        "latest_checkpoint_result": {"checkpoint_dir_name": "latest"},
        "pending_training_results": [{"checkpoint_dir_name": "pending"}, {"checkpoint_dir_name": "newest"}],
    }
    (tmp_path / ray_train.SNAPSHOT).write_text(json.dumps(snapshot))

    assert _run_of(tmp_path)._snapshot_names() == ["newest", "second", "nested/inside", "best", "latest", "pending"]
