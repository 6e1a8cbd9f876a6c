"""The verdict of the elastic example. The machines come and go in tests/ray/test_elastic.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import elastic
from demo import DemoFailed
from history import Attempt, Step

NUM_STEPS = 10


def attempts(*groups):
    """(workers, went on after, trained up to) of each group; step s trains samples 2 s - 2 and 2 s - 1."""
    made = []
    for number, (world_size, began, last) in enumerate(groups):
        group = Attempt(number, world_size, began=began)
        for step in range(began + 1, last + 1):
            group.steps[step] = Step(step, 1 / step, [2 * step - 2, 2 * step - 1], world_size)
        made.append(group)
    return made


def judge(groups, tmp_path, guard):
    plan = replace(elastic.PLAN, steps=NUM_STEPS, num_samples=2 * NUM_STEPS, guard=guard)
    return elastic.judge(plan, attempts(*groups), attempts((1, 0, NUM_STEPS)), tmp_path / "elastic.png")


def test_planned_changes_that_cost_nothing_and_a_loss_that_costs_a_step_are_told(tmp_path):
    said = judge([(2, 0, 2), (3, 2, 4), (4, 4, 6), (3, 6, 8), (2, 7, 10)], tmp_path, guard=True)

    assert "4 -> 3 workers, machine given up: had trained step 6, went on after step 6: 0 steps lost" in said
    assert "3 -> 2 workers, machine lost: had trained step 8, went on after step 7: 1 step lost" in said
    assert "0 steps lost to 3 planned changes, with ResizeGuard" in said
    assert (tmp_path / "elastic.png").read_bytes().startswith(b"\x89PNG")


def test_a_planned_change_that_costs_a_step_is_a_failure_with_the_guard_and_a_number_without(tmp_path):
    groups = [(2, 0, 3), (3, 2, 4), (4, 4, 6), (3, 6, 8), (2, 8, 10)]

    with pytest.raises(DemoFailed, match=r"planned changes cost \[1, 0, 0\] steps"):
        judge(groups, tmp_path, guard=True)
    assert "1 steps lost to 3 planned changes, without ResizeGuard" in judge(groups, tmp_path, guard=False)


def test_other_numbers_of_workers_than_planned_are_a_failure(tmp_path):
    with pytest.raises(DemoFailed, match=r"by \[2, 3\] workers in turn"):
        judge([(2, 0, 5), (3, 5, 10)], tmp_path, guard=True)


def test_the_training_script_is_told_of_the_guard():
    assert "--no-guard" not in elastic.PLAN.arguments()
    assert "--no-guard" in replace(elastic.PLAN, guard=False).arguments()
