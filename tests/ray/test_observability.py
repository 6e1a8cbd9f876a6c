"""What a run tells people and machines: the figures at Ray's own metrics endpoint, and the lines of its log."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import ray.train
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray import cloudpickle
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ray_stateful import Checkpointer, ray_train
from ray_stateful.errors import StateMismatch
from ray_stateful.meters import METERS
from ray_stateful.ray_meters import RANK, RUN
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.testing import Fail, FaultyStorage

RUN_NAME = "observed"

# Ray's processes pass their metrics on every 10 s.
SCRAPE_S = 60.0


class _Weights:
    def __init__(self):
        self.value = {"weights": torch.zeros(1000, dtype=torch.float64)}

    def state_dict(self):
        return self.value

    def load_state_dict(self, value):
        self.value = value


def _scrape():
    """Every sample of this run at the metrics endpoints of all nodes, as `(name, tags without Ray's own, value)`."""
    found = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            for sample in (sample for family in families for sample in family.samples):
                if sample.labels.get(RUN) == RUN_NAME:
                    tags = {key: sample.labels[key] for key in ("phase", "operation", RANK) if key in sample.labels}
                    found.append((sample.name, tags, sample.value))
    return found


def _counts(found):
    """The samples that are counts, and not seconds."""
    return sorted(
        (name, *sorted(tags.values()), value)
        for name, tags, value in found
        if name.endswith(("_total", "_count")) and "seconds_total" not in name
    )


def _damage(directory):
    """Flip a bit of the largest file: those are the weights."""
    file = max(Path(directory).glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _train(config):
    """Two saves, one with a retry; a restore that falls back by one step; a save that fails; a restore that fails."""
    faults = [
        Fail("open_sink", rank=1, path="s0000000001", num_times=2, error=ConnectionResetError("reset")),
        Fail("open_sink", rank=1, path="s0000000003", error=PermissionError(13, "denied")),
    ]
    run = ray_train.current_run()
    storage = RetryingStorage(FaultyStorage(run.storage.inner, faults), RetryPolicy(first_pause_s=0.01))
    run = dataclasses.replace(run, storage=storage)
    # A value of each rank's own, so that each rank has a file to write.
    state = {"weights": _Weights(), "random": _OfEachRank()}
    rank, saved = torch.distributed.get_rank(), []
    with Checkpointer(state, every_n_steps=1, at_end=False, soft_fail=1, run=run, timeout_s=60) as checkpointer:
        saved += [checkpointer.step(), checkpointer.step()]
        if rank == 0:
            _damage(Path(run.path, saved[-1].name))
        torch.distributed.barrier()
        resumed = checkpointer.restore()
        saved.append(checkpointer.step())
        # The third step: the save fails, and training goes on.
        assert checkpointer.step() is None
        checkpointer.state = {**state, "unknown": _Weights()}
        with pytest.raises(StateMismatch):
            checkpointer.restore()
    sizes = [report.num_bytes for report in saved]
    counts = sorted(
        [
            ("ray_stateful_failed_restores_total", 1.0),
            ("ray_stateful_failed_saves_total", "wait", 1.0),
            ("ray_stateful_lost_steps_total", 1.0),
            ("ray_stateful_read_bytes_total", float(resumed.statistics.bytes_read)),
            ("ray_stateful_rejected_checkpoints_total", 1.0),
            ("ray_stateful_restore_seconds_count", 1.0),
            ("ray_stateful_save_seconds_count", 3.0),
            ("ray_stateful_storage_retries_total", "1", "write", 2.0),
            ("ray_stateful_written_bytes_total", float(sum(sizes))),
        ]
    )
    found, pause, deadline = [], threading.Event(), time.monotonic() + SCRAPE_S
    while rank == 0 and time.monotonic() < deadline:
        found = _scrape()
        if _counts(found) == counts and sum(name == "ray_stateful_rank_write_seconds" for name, _, _ in found) == 2:
            break
        pause.wait(0.25)
    # Figures of a worker that has ended are not passed on any more: all of them stay until they were seen.
    torch.distributed.barrier()
    return {
        "saved": [report.as_fields() for report in saved],
        "resumed": resumed.as_fields(),
        "counts": counts,
        "found": found,
    }


class _OfEachRank(_Weights):
    resized_as = "re-seeded"

    def check_resize(self, name, world):
        """Any."""

    def resize(self, saved, world):
        return ""


@pytest.fixture(scope="module")
def observed(cluster, tmp_path_factory):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run_config = RunConfig(name=RUN_NAME, storage_path=str(tmp_path_factory.mktemp("runs")))
    return TorchTrainer(_train, scaling_config=ScalingConfig(num_workers=2), run_config=run_config).fit().return_value


def test_every_meter_is_at_rays_metrics_endpoint_with_the_figures_of_the_reports(observed):
    assert _counts(observed["found"]) == [tuple(count) for count in observed["counts"]]

    names = {name for name, _, _ in observed["found"]}
    assert {meter.exported for meter in METERS if meter.kind != "histogram"} <= names
    assert {f"{meter.exported}_bucket" for meter in METERS if meter.kind == "histogram"} <= names

    values = {(name, *sorted(tags.values())): value for name, tags, value in observed["found"]}
    last, resumed = observed["saved"][-1], observed["resumed"]
    assert values["ray_stateful_last_commit_step",] == last["step"]
    assert values["ray_stateful_last_commit_timestamp_seconds",] == pytest.approx(last["created_s"], abs=1e-3)
    amplification = resumed["bytes_read"] / resumed["bytes_wanted"]
    assert values["ray_stateful_read_amplification_ratio",] == pytest.approx(amplification)
    phases = {tags["phase"]: value for name, tags, value in observed["found"] if name.endswith("phase_seconds_total")}
    assert phases.keys() == last["seconds_by_phase"].keys()
    for phase, total_s in phases.items():
        spent_s = sum(report["seconds_by_phase"][phase] for report in observed["saved"])
        assert total_s == pytest.approx(spent_s, abs=1e-4)
    # The save that failed is in it as well.
    stalled_s = sum(report["stalled_s"] for report in observed["saved"])
    assert values["ray_stateful_save_stall_seconds_total",] > stalled_s


def test_a_machine_reads_each_save_and_restore_in_the_log_of_rays_worker(observed):
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs", "train")
    lines = [line for path in logs.glob("ray-train-app-worker-*.log") for line in path.read_text().splitlines()]
    records = [record for record in map(json.loads, lines) if record.get("run_name") == RUN_NAME]

    fields = [record["ray_stateful"] for record in records if "ray_stateful" in record and record["world_rank"] == 0]
    saved, resumed = observed["saved"], observed["resumed"]
    assert [entry for entry in fields if entry["event"] == "saved"] == saved
    assert [entry for entry in fields if entry["event"] == "resumed"] == [resumed]
    rejected = [entry["checkpoint"] for entry in fields if entry["event"] == "rejected"]
    assert rejected == [saved[1]["checkpoint"]]
    assert [entry["step"] for entry in fields if entry["event"] == "save_failed"] == [3]
    # For people, the same line says it in words; and nothing went wrong with the metrics.
    assert any(record["message"].startswith(f"saved {saved[0]['checkpoint']} (step 1; ") for record in records)
    assert [record for record in records if "metrics of this worker" in record["message"]] == []
