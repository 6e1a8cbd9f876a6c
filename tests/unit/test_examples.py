"""The examples' own parts: text, model, notes, picture and verdict. The whole of it runs in tests/ray/test_demo.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# As when they are run: Python puts the directory of a script at the front of its path.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo
from history import Attempt, Journal, Point, Step, data_problems, read_attempts, steps_lost, surviving
from model import Shape, build_model, sample_losses
from plot import bands, draw
from text import ByteSamples, read_standard_library
from train_fsdp import num_workers, parse, run_of

CPU = torch.device("cpu")


def attempt(number: int, world_size: int, began: int, steps: range, seen_by: int | None = None) -> Attempt:
    """Steps of one attempt; step s trains samples 2 (s - 1) and 2 s - 1, and its loss says which attempt it was."""
    made = Attempt(number, world_size, began=began)
    for step in steps:
        made.steps[step] = Step(step, number + step / 100, [2 * step - 2, 2 * step - 1], seen_by or world_size)
    return made


def points(losses: list[float], world_size: int = 2) -> list[Point]:
    return [Point(i + 1, loss, world_size, (2 * i, 2 * i + 1)) for i, loss in enumerate(losses)]


def test_text_is_the_standard_library_in_the_same_order_each_time():
    text = read_standard_library(200_000)

    assert len(text) == 200_000
    assert text == read_standard_library(400_000)[:200_000]
    assert b"import" in text


def test_a_sample_begins_where_the_one_before_ends_and_knows_the_byte_after():
    samples = ByteSamples(bytes(range(25)), seq_len=8)

    assert len(samples) == 3
    assert samples[[2, 0]].tolist() == [list(range(16, 25)), list(range(9))]
    assert samples[[2]].dtype == torch.int64


def test_text_too_short_for_one_sample_is_refused():
    with pytest.raises(ValueError, match="8 bytes of text"):
        ByteSamples(bytes(8), seq_len=8)


def test_default_model_has_five_to_ten_million_parameters_and_a_tied_head():
    model = build_model(Shape(), seed=1, device=CPU)

    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert model.lm_head.weight is model.embedding.weight


def test_untrained_model_is_about_as_good_as_a_guess():
    samples = ByteSamples(read_standard_library(10_000), seq_len=64)[[0, 5, 9]]

    losses = sample_losses(build_model(Shape(), seed=1, device=CPU), samples)

    assert losses.shape == (3,)
    # ln 256, and a tenth for the spread of the first logits.
    assert torch.allclose(losses, torch.full((3,), 5.545), atol=0.15)


def test_a_byte_is_predicted_from_those_before_it_alone():
    model = build_model(Shape(dim=32, num_layers=2), seed=1, device=CPU)
    tokens = torch.arange(64)[None]
    changed = tokens.clone()
    changed[0, 40:] = 7

    assert torch.equal(model(tokens)[:, :40], model(changed)[:, :40])


def test_notes_of_a_killed_worker_are_read_up_to_its_last_whole_line(tmp_path):
    journal = Journal(tmp_path)
    journal.began(0, None)
    journal.trained(1, 5.5, [3, 1])
    [path] = tmp_path.iterdir()
    with path.open("a") as file:
        file.write(json.dumps({"step": 2, "loss": 5.0, "samples": [4, 2]})[:-9])

    [read] = read_attempts(tmp_path)

    assert (read.began, read.world_size, list(read.steps)) == (0, 1, [1])
    assert read.steps[1].samples == [3, 1]


def test_steps_after_the_one_a_resume_went_back_to_do_not_survive():
    attempts = [attempt(1, 2, 0, range(1, 15)), attempt(2, 3, 10, range(11, 21)), attempt(3, 1, 20, range(21, 26))]

    history = surviving(attempts)

    assert [point.step for point in history] == list(range(1, 26))
    assert [(point.world_size, int(point.loss)) for point in (history[9], history[10], history[20])] == [
        (2, 1),
        (3, 2),
        (1, 3),
    ]
    assert steps_lost(attempts) == [4, 0]
    assert bands(history) == [(1, 10, 2), (11, 20, 3), (21, 25, 1)]


def test_a_group_that_never_restored_lost_nothing():
    attempts = [attempt(1, 2, 0, range(1, 15)), Attempt(2, 3), attempt(3, 3, 10, range(11, 12))]

    assert steps_lost(attempts) == [4]
    assert len(surviving(attempts)) == 11


def test_a_step_that_some_workers_noted_is_not_one_that_survives():
    history = surviving([attempt(1, 2, 0, range(1, 5)), attempt(2, 2, 4, range(5, 6), seen_by=1)])

    assert [point.step for point in history] == [1, 2, 3, 4]


def test_a_resume_after_a_step_that_nobody_trained_is_refused():
    with pytest.raises(ValueError, match="after step 9"):
        surviving([attempt(1, 2, 0, range(1, 5)), attempt(2, 2, 9, range(10, 12))])


def test_samples_lost_and_repeated_are_found():
    reference = points([5.0] * 4)
    assert data_problems(reference, reference, num_samples=8) == []
    assert data_problems(reference[:3], reference, num_samples=8) == []  # an epoch that is under way

    repeated = [*reference[:3], Point(4, 5.0, 2, (0, 1))]
    found = data_problems([*repeated, *reference], [*reference, *reference], num_samples=8)

    assert found[0] == "step 4 trained on other samples than the uninterrupted run"
    assert "3 times, others 1 times" in found[1]


def test_losses_apart_by_more_than_rounding_fail_the_demo(tmp_path):
    plan = replace(demo.SHORT, steps=6, num_samples=12)
    elastic = [attempt(0, 2, 0, range(1, 4)), attempt(0, 3, 2, range(3, 6)), attempt(0, 1, 4, range(5, 7))]
    same, other = attempt(0, 2, 0, range(1, 7)), attempt(0, 2, 0, range(1, 7))
    other.steps[6].loss += 2 * demo.TOLERANCE

    summary = demo.judge(plan, elastic, [same], tmp_path / "same.png")
    assert "2 -> 3 -> 1 workers is at most 0.0e+00 from" in summary
    assert "1 after the kill, 1 after the stop" in summary
    assert (tmp_path / "same.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(demo.DemoFailed, match=r"2\.0e-03 apart, more than the 1e-03"):
        demo.judge(plan, elastic, [other], tmp_path / "other.png")
    with pytest.raises(demo.DemoFailed, match=r"by \[2, 3\] workers"):
        demo.judge(plan, elastic[:2], [same], tmp_path / "short.png")
    same.steps[5].samples[0] = 0
    with pytest.raises(demo.DemoFailed, match="step 5 trained on other samples"):
        demo.judge(plan, elastic, [same], tmp_path / "samples.png")


def test_a_slow_run_is_waited_for_as_long_as_it_moves_and_no_longer(tmp_path, monkeypatch):
    seconds = iter(range(10_000))
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)
    (tmp_path / "slow.log").write_text("what it said last")
    journal = Journal(tmp_path / "slow.history")
    journal.began(0, None)
    steps = iter(range(1, 31))

    def another_step(name, attempts):
        step = next(steps, None)
        if step is not None:
            journal.trained(step, 5.0, [step])

    training = demo.Training("slow", tmp_path, demo.SHORT, SimpleNamespace(show=another_step), {})
    training.process = SimpleNamespace(poll=lambda: None)

    reached = training.wait_until("step 30", lambda attempt: attempt.last_step == 30, timeout_s=5.0)
    assert reached.last_step == 30
    with pytest.raises(demo.DemoFailed, match=r"stood still for 5 s before step 31:\nwhat it said last"):
        training.wait_until("step 31", lambda attempt: attempt.last_step == 31, timeout_s=5.0)


def test_a_picture_needs_no_interruption(tmp_path):
    draw(tmp_path / "curve.png", points([5.0, 4.0]), points([5.0, 4.0]))

    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(("text", "meant"), [("4", 4), ("2:8", (2, 8)), ("0", 0)])
def test_a_number_of_workers_may_be_a_range(text, meant):
    assert num_workers(text) == meant
    assert parse(["--num-workers", text]).num_workers == meant


def test_a_run_without_ray_is_where_ray_would_put_it():
    assert run_of("/runs/", "bytes") == "/runs/bytes"
    assert run_of("s3://bucket/runs?scheme=http", "bytes") == "s3://bucket/runs/bytes?scheme=http"
