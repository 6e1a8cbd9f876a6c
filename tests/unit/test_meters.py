"""What is kept count of: one list, in the code, on the page and on the dashboard; and what it costs to keep it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ray_stateful import Checkpointer, ModelState, checkpoint, initial, meters, ray_meters
from ray_stateful.errors import NoIntactCheckpoint, SaveFailed
from ray_stateful.ray_meters import RUN, Meter, Sample
from ray_stateful.report import ResumeReport, SaveReport
from ray_stateful.runs import DirectoryRun
from ray_stateful.stopwatch import Stopwatch
from ray_stateful.storage.reading import ReadStatistics
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage

DOCS = Path(__file__).parents[2] / "docs"


class Part:
    def __init__(self):
        self.value = {"weights": torch.zeros(1000)}

    def state_dict(self):
        return self.value

    def load_state_dict(self, value):
        self.value = value


# --- one list --------------------------------------------------------------------------------------------------------


def base_name(series):
    return re.sub("_(bucket|sum|count)$", "", series)


def test_every_meter_is_in_the_list_and_no_two_have_one_name():
    defined = [value for value in vars(meters).values() if isinstance(value, Meter)]

    assert defined == list(meters.METERS)
    assert len({meter.exported for meter in meters.METERS}) == len(defined)


def test_the_page_lists_the_meters_as_they_are():
    page = (DOCS / "observability.md").read_text()
    rows = re.findall(r"^\| `(ray_stateful_\w+)` \| (\w+) \| ([^|]+) \| ([^|]*) \| ([^|]+) \|$", page, re.MULTILINE)

    assert rows == [
        (
            meter.exported,
            meter.kind,
            meter.unit,
            ", ".join(f"`{tag}`" for tag in meter.tags) or "-",
            meter.help.removesuffix("."),
        )
        for meter in meters.METERS
    ]


def test_the_dashboard_draws_every_meter_and_nothing_else():
    dashboard = json.loads((DOCS / "grafana" / "ray_stateful.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    drawn = {name for expression in expressions for name in re.findall(r"ray_stateful_\w+", expression)}

    kinds = {meter.exported: meter.kind for meter in meters.METERS}
    assert {base_name(name) if base_name(name) in kinds else name for name in drawn} == kinds.keys()
    assert all(name in kinds or kinds[base_name(name)] == "histogram" for name in drawn)
    variables = json.dumps(dashboard["templating"])
    assert {base_name(name) for name in re.findall(r"ray_stateful_\w+", variables)} <= kinds.keys()
    # What it groups and filters by are tags that there are.
    tags = {tag for group in re.findall(r"(?:by|on) \(([^)]*)\)", " ".join(expressions)) for tag in group.split(", ")}
    assert tags == {RUN, "le"} | {tag for meter in meters.METERS for tag in meter.tags}


@pytest.mark.parametrize("meter", meters.METERS, ids=lambda meter: meter.name)
def test_the_unit_of_a_meter_is_in_its_name(meter):
    words = meter.unit.removesuffix(" since 1970").split(" per ")
    assert [word for word in words if word not in meter.name] == []


# --- from the reports ------------------------------------------------------------------------------------------------


def saved():
    phases = {"agree": 0.25, "collect": 0.25, "plan": 0.5, "write": 2.0, "wait": 2.0, "commit": 0.5, "report": 0.5}
    return SaveReport(
        name="checkpoint_s0000000020_aaaaaa",
        uri="s3://bucket/run/checkpoint_s0000000020_aaaaaa",
        step=20,
        num_bytes=4000,
        seconds=6.0,
        seconds_by_phase=phases,
        stalled_s=1.0,
        created_s=1000.0,
    )


def resumed():
    return ResumeReport(
        checkpoint="checkpoint_s0000000020_aaaaaa",
        step=20,
        samples=160,
        saved_world_size=2,
        world_size=2,
        verified=True,
        parts=(),
        statistics=ReadStatistics(bytes_read=300, bytes_wanted=200, num_requests=3),
        seconds=2.0,
        rejected={"checkpoint_s0000000030_bbbbbb": "damaged", "checkpoint_s0000000040_cccccc": "damaged"},
        created_s=1000.0,
    )


def figures(samples):
    return {(sample.meter.name.removeprefix("stateful_"), *sample.tags.values()): sample.value for sample in samples}


def test_a_save_adds_its_figures_on_rank_0_and_its_own_writing_on_each_rank():
    assert figures(meters.of_save(saved(), rank=1)) == {("rank_write_seconds", "1"): 2.0}
    assert figures(meters.of_save(saved(), rank=0)) == {
        ("rank_write_seconds", "0"): 2.0,
        **{("save_phase_seconds", phase): took_s for phase, took_s in saved().seconds_by_phase.items()},
        ("save_bytes_per_second",): 1000.0,
        ("save_seconds",): 6.0,
        ("save_stall_seconds",): 1.0,
        ("written_bytes",): 4000,
        ("last_commit_timestamp_seconds",): 1000.0,
        ("last_commit_step",): 20,
    }


def test_a_restore_adds_what_it_read_and_what_it_could_not_use():
    assert meters.of_restore(resumed(), rank=1) == []
    assert figures(meters.of_restore(resumed(), rank=0)) == {
        ("restore_seconds",): 2.0,
        ("read_bytes",): 300,
        ("rejected_checkpoints",): 2,
        ("lost_steps",): 20,
        ("last_commit_step",): 20,
        ("restore_bytes_per_second",): 150.0,
        ("read_amplification_ratio",): 1.5,
        ("last_commit_timestamp_seconds",): 1000.0,
    }


def test_a_damaged_checkpoint_of_an_earlier_step_costs_no_steps_and_never_less_than_none():
    later, earlier = "checkpoint_s0000000021_bbbbbb", "checkpoint_s0000000005_bbbbbb"
    of_one = dataclasses.replace(resumed(), rejected={later: "damaged", earlier: "damaged"})
    went_back = dataclasses.replace(resumed(), rejected={earlier: "damaged"})

    assert (of_one.steps_lost, went_back.steps_lost) == (1, 0)
    assert "costs 1 step, " in str(of_one)
    assert "costs" not in str(went_back)
    assert "costs 20 steps, " in str(resumed())


def test_initial_weights_are_no_commit_of_this_run():
    began = dataclasses.replace(resumed(), initial=True, rejected={}, step=0)

    added = figures(meters.of_restore(began, rank=0))
    assert [key for key in added if key[0].startswith("last_commit")] == []
    assert added["read_bytes",] == 300
    assert began.as_fields()["event"] == "began"


@pytest.mark.parametrize("meter", meters.METERS, ids=lambda meter: meter.name)
def test_samples_have_the_tags_of_their_meter(meter):
    clock = Stopwatch()
    storage = RetryingStorage(resolve("/nowhere")[0])
    storage.note_retry("read")
    samples = [
        *meters.of_save(saved(), 0),
        *meters.of_failed_save("write", clock, 0),
        *meters.of_restore(resumed(), 0),
        *meters.of_failed_restore({"checkpoint_s0000000030_bbbbbb": "damaged"}, 0),
        *meters.of_retries(storage, 0),
    ]

    mine = [sample for sample in samples if sample.meter is meter]
    assert mine
    assert {tuple(sample.tags) for sample in mine} == {meter.tags}


# --- as they come about ----------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """What would be emitted: the samples of every call, and the run's name."""
    calls = []
    monkeypatch.setattr(meters, "emit", lambda samples, run_name: calls.append((run_name, figures(samples))))
    return calls


def faulty_run(path, *faults):
    storage, path = resolve(str(path))
    faulty = FaultyStorage(storage.inner, faults)
    return DirectoryRun(RetryingStorage(faulty, RetryPolicy(budget_s=0.5, first_pause_s=0.01)), path, path)


def test_a_save_that_fails_is_counted_once_in_the_phase_in_which_it_failed_with_its_retries(tmp_path, told):
    transient = Fail("open_sink", num_times=2, error=ConnectionResetError("reset"))
    run = faulty_run(tmp_path / "run", transient, Fail("write", path="manifest", error=PermissionError(13, "denied")))

    with pytest.raises(SaveFailed):
        checkpoint.save({"part": Part()}, step=1, run=run)
    checkpoint.save({"part": Part()}, step=2, run=run)

    (name, failed), (_, second) = told
    assert name == "run"
    assert failed.pop(("save_stall_seconds",)) > 0
    assert failed == {("failed_saves", "commit"): 1, ("storage_retries", "0", "write"): 2}
    # Those of the first save are not told again.
    assert not any(key[0] == "storage_retries" for key in second)
    assert second["last_commit_step",] == 2


def test_what_training_waits_for_a_background_save_that_has_failed_is_counted_too(tmp_path, told):
    run = faulty_run(tmp_path / "run", Fail("write", path="manifest", error=PermissionError(13, "denied")))
    saver = Checkpointer({"part": Part()}, every_n_steps=1, background=True, run=run)
    saver.step()
    with pytest.raises(SaveFailed):
        saver.wait()

    (_, failed), (_, waited) = told
    assert failed["failed_saves", "commit"] == 1
    assert waited.keys() == {("save_stall_seconds",)}
    assert waited["save_stall_seconds",] > 0


def test_what_of_initial_weights_had_to_be_read_again_is_counted_for_the_run(tmp_path, told, monkeypatch):
    checkpoint.save({"model": ModelState(torch.nn.Linear(2, 2))}, step=1, run=str(tmp_path / "other"))
    source = faulty_run(tmp_path / "other", Fail("read", path="distcp", error=ConnectionResetError("reset")))
    name = next(source.candidates())
    monkeypatch.setattr(initial, "located", lambda given: (source.storage, f"{source.path}/{name}"))
    told.clear()

    checkpoint.restore({"model": ModelState(torch.nn.Linear(2, 2))}, initial="elsewhere", run=str(tmp_path / "run"))

    assert ("run", {("storage_retries", "0", "read"): 1}) in told


def test_a_restore_that_finds_nothing_intact_is_a_failed_one_with_all_it_rejected(tmp_path, told):
    for step in (1, 2):
        report = checkpoint.save({"part": Part()}, step=step, run=str(tmp_path / "run"))
        for file in Path(report.uri).glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:-1])
    told.clear()

    with pytest.raises(NoIntactCheckpoint):
        checkpoint.restore({"part": Part()}, run=str(tmp_path / "run"))

    assert told == [("run", {("failed_restores",): 1, ("rejected_checkpoints",): 2})]


def test_the_phases_of_a_save_in_the_foreground_are_the_time_that_training_stood_still(tmp_path):
    report = checkpoint.save({"part": Part()}, step=1, run=str(tmp_path))

    assert list(report.seconds_by_phase) == ["agree", "collect", "plan", "write", "wait", "commit", "report"]
    assert report.stalled_s == pytest.approx(sum(report.seconds_by_phase.values()))
    # To the commit: training waits for the report as well.
    assert report.stalled_s - report.seconds_by_phase["report"] <= report.seconds


def test_a_background_save_stops_training_for_its_copy_its_report_and_what_training_waits_for_it(tmp_path, caplog):
    with (
        caplog.at_level("INFO", logger="ray_stateful"),
        Checkpointer(
            {"part": Part()}, every_n_steps=1, at_end=False, background=True, run=str(tmp_path)
        ) as checkpointer,
    ):
        checkpointer.step()
        checkpointer.wait()

    (fields,) = [record.ray_stateful for record in caplog.records if hasattr(record, "ray_stateful")]
    phases = fields["seconds_by_phase"]
    assert phases.keys() == {"collect", "plan", "write", "wait", "commit", "join", "report"}
    assert fields["stalled_s"] == pytest.approx(phases["collect"] + phases["join"] + phases["report"], abs=1e-5)


def test_what_another_thread_does_is_no_time_that_training_stands_still():
    clock = Stopwatch()
    clock.begin("collect")
    assert clock.stop() == "collect"

    def write():
        clock.begin("plan")
        clock.begin("write")
        clock.stop()

    thread = threading.Thread(target=write)
    thread.start()
    clock.begin("join")
    thread.join()
    assert clock.stop() == "join"

    assert clock.stop() == ""
    assert clock.seconds.keys() == {"collect", "plan", "write", "join"}
    assert clock.stalled_s == pytest.approx(clock.seconds["collect"] + clock.seconds["join"])


# --- emitting --------------------------------------------------------------------------------------------------------


def test_outside_of_ray_nothing_is_emitted_and_nothing_imported():
    code = (
        "import sys; from ray_stateful import meters; from ray_stateful.ray_meters import Sample, emit;"
        "emit([Sample(meters.SAVE_SECONDS, 1.0)], 'run');"
        "assert not [name for name in sys.modules if name == 'ray' or name.startswith('ray.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_goes_wrong_with_metrics_is_said_once_with_its_cause_and_costs_no_save(tmp_path, monkeypatch, caplog):
    def broken(sample, tags):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(ray_meters, "_has_failed", False)
    monkeypatch.setattr(ray_meters, "_give", broken)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="0", is_initialized=lambda: True))
    monkeypatch.delitem(sys.modules, "ray.train", raising=False)

    for step in (1, 2):
        checkpoint.save({"part": Part()}, step=step, run=str(tmp_path))

    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "a mistake of ours" in logging.Formatter().format(warnings[0])


def test_an_increment_of_nothing_is_left_out_as_ray_refuses_it(monkeypatch):
    class Refusing:
        def inc(self, value, tags):
            raise AssertionError(value)

    monkeypatch.setitem(ray_meters._made, meters.LOST_STEPS.name, Refusing())
    ray_meters._give(Sample(meters.LOST_STEPS, 0), {})


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_fields_of_a_record_are_plain_json_and_those_of_the_report(tmp_path, caplog):
    with caplog.at_level("INFO", logger="ray_stateful"):
        first = checkpoint.save({"part": Part()}, step=1, run=str(tmp_path))
        report = checkpoint.restore({"part": Part()}, run=str(tmp_path))

    fields = [record.ray_stateful for record in caplog.records if hasattr(record, "ray_stateful")]
    assert json.loads(json.dumps(fields, allow_nan=False)) == [first.as_fields(), report.as_fields()]
    assert [entry["event"] for entry in fields] == ["saved", "resumed"]
    assert fields[1]["checkpoint"] == fields[0]["checkpoint"] == first.name


@pytest.mark.parametrize(("kind", "event"), [(saved, "saved"), (resumed, "resumed")])
def test_the_page_shows_the_line_of_a_machine_with_the_fields_that_there_are(kind, event):
    page = (DOCS / "observability.md").read_text()
    lines = [json.loads(line) for line in re.findall(r"^\{.*\}$", page, re.MULTILINE)]

    (shown,) = [line["ray_stateful"] for line in lines if line["ray_stateful"]["event"] == event]
    assert list(shown) == list(kind().as_fields())


def test_the_line_for_people_says_how_long_training_stood_still_where_that_was_not_the_whole_save():
    assert str(saved()).endswith(" in 6.0 s, 667 B/s; training stood still for 1.0 s)")
    assert "stood still" not in str(dataclasses.replace(saved(), stalled_s=5.9))
