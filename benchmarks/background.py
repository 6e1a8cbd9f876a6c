"""Saving in the background: what training pays for at the step boundary, and what it loses altogether.

Two trainings are measured with and without saves. In one, steps wait for a device, as on a machine with accelerators:
the host is idle. In the other, steps are arithmetic on every core of this machine: whatever a save computes, training
loses.

A third one says what the thread costs that writes: its steps are Python and nothing else, so that they stand still
whenever that thread holds the interpreter's lock; and the same saves are made by another process, for comparison.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import states
from benchmarks.measuring import Ratio, ratio, seconds_of
from benchmarks.peers import Place, fresh_directory
from benchmarks.settings import Settings
from benchmarks.states import Size
from ray_stateful import Checkpointer, ModelState, OptimizerState
from ray_stateful.testing import run_ranks

Row = dict[str, Any]

_STEP_S = 0.05


def run(settings: Settings, place: Place) -> tuple[list[Row], list[Ratio]]:
    few, _, large = settings.sizes()
    outcomes = run_ranks(
        2, _all, few, place, settings.repeats, settings.train_s, timeout_s=900, collective_timeout_s=300
    ) + run_ranks(2, _all, large, place, settings.repeats, 0.0, timeout_s=900, collective_timeout_s=300)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    rows: list[Row] = [row for of_rank in outcomes for row in of_rank]
    rows += _in_python(few, place, settings.repeats)
    for row in rows:
        print("  " + "  ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)
    found = []
    # A fixed part of the stall is collecting the state: it is the large state that the target is for.
    for name, size, target in (("background.stall_vs_copy", large, 1.2), ("background.stall_vs_copy.small", few, None)):
        stalls = [row for row in rows if row["what"] == "stall" and row["size"] == str(size)]
        stall_s, copy_s = [row["stall_s"] for row in stalls], [row["copy_s"] for row in stalls]
        found.append(ratio(name, stall_s, copy_s, target=target, at_most=True))
    for name, kind, target in (
        ("background.throughput", "waiting for a device", 0.97),
        ("background.throughput_on_busy_cores", "computing on every core", None),
    ):
        of_kind = [row for row in rows if row["what"] == "training" and row["steps"] == kind]
        speeds = {saves: [row["steps_per_s"] for row in of_kind if row["saves"] == saves] for saves in (True, False)}
        found.append(ratio(name, speeds[True], speeds[False], target=target))
    steps = {who: seconds_of(rows, what="steps in Python", saved_by=who) for who in ("nobody", "thread", "process")}
    found += [
        ratio("background.python_steps.thread", steps["nobody"], steps["thread"]),
        ratio("background.python_steps.process", steps["nobody"], steps["process"]),
    ]
    return rows, found


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _all(size: Size, place: Place, repeats: int, train_s: float) -> list[Row]:
    model, optimizer = states.build(size)
    return [
        *_stalls(model, optimizer, place, 2 * repeats, str(size)),
        *(
            row
            for repeat in range(2 if train_s else 0)
            for waits in (True, False)
            for saves in (True, False)
            for row in _training(model, optimizer, place, repeat, train_s, waits, saves)
        ),
    ]


def _stalls(model: Any, optimizer: Any, place: Place, repeats: int, size: str) -> list[Row]:
    """How long `step` takes when it begins a save, and one copy of the same shards into buffers used before."""
    fresh_directory(place)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    shards = [tensor.to_local() for tensor in states.tensors(model, optimizer)]
    buffers = [torch.empty_like(shard) for shard in shards]
    rows: list[Row] = []
    with Checkpointer(state, background=True, at_end=False, run=place.uri) as checkpointer:
        for repeat in range(repeats + 1):
            dist.barrier()
            began = time.perf_counter()
            checkpointer.step()
            step_s = time.perf_counter() - began
            checkpointer.request_save()
            dist.barrier()
            began = time.perf_counter()
            checkpointer.step()
            stall_s = time.perf_counter() - began
            # Alone: what is written meanwhile would slow the copy down, and make the stall look good.
            checkpointer.wait()
            dist.barrier()
            began = time.perf_counter()
            for shard, buffer in zip(shards, buffers, strict=True):
                buffer.copy_(shard)
            copy_s = time.perf_counter() - began
            # The first save makes its buffers, and plans.
            if repeat > 0:
                rows.append(
                    {
                        "part": "background",
                        "what": "stall",
                        "size": size,
                        "rank": dist.get_rank(),
                        "repeat": repeat - 1,
                        "stall_s": stall_s,
                        "copy_s": copy_s,
                        "step_s": step_s,
                        "bytes": sum(shard.nbytes for shard in shards),
                    }
                )
    return rows


def _training(
    model: Any, optimizer: Any, place: Place, repeat: int, train_s: float, waits: bool, saves: bool
) -> list[Row]:
    """Steps a second over about `train_s` seconds, with a save after each third of that or with none."""
    fresh_directory(place)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    matrix = torch.rand(700, 700)
    interval_s = train_s / 3 if saves else None
    num_steps, num_saves = 0, 0
    with Checkpointer(state, background=True, every_s=interval_s, at_end=False, run=place.uri) as checkpointer:
        # One save before the clock runs: later ones find its buffers and its plan.
        checkpointer.request_save()
        checkpointer.step()
        checkpointer.wait()
        dist.barrier()
        began = time.perf_counter()
        for _ in range(max(20, int(train_s / _STEP_S))):
            if waits:
                # What is measured: a host that waits for its device.
                time.sleep(_STEP_S)
            else:
                _compute(matrix, _STEP_S)
            num_saves += checkpointer.step() is not None
            num_steps += 1
        seconds = time.perf_counter() - began
    if dist.get_rank() == 0 and os.path.isdir(place.directory):
        shutil.rmtree(place.directory)
    return [
        {
            "part": "background",
            "what": "training",
            "steps": "waiting for a device" if waits else "computing on every core",
            "saves": saves,
            "rank": dist.get_rank(),
            "repeat": repeat,
            "steps_per_s": num_steps / seconds,
            "num_saves": num_saves,
            "seconds": seconds,
        }
    ]


def _in_python(size: Size, place: Place, repeats: int) -> list[Row]:
    """Seconds of a number of steps that hold the interpreter's lock, while one save is written by nobody, a thread of
    this process, or another process. One rank: the other core is free to write."""
    _world_of_one()
    fresh_directory(place)
    model, optimizer = states.build(size)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_save_on_demand, args=(theirs, size, place), daemon=True)
    process.start()
    rows: list[Row] = []
    with Checkpointer(state, background=True, at_end=False, run=place.below("thread").uri) as checkpointer:
        for repeat in range(repeats + 1):
            for who in ("nobody", "thread", "process"):
                if who == "thread":
                    checkpointer.request_save()
                    checkpointer.step()
                elif who == "process":
                    ours.send("save")
                began = time.perf_counter()
                for _ in range(_PYTHON_STEPS):
                    _python_step()
                seconds = time.perf_counter() - began
                checkpointer.wait()
                if who == "process":
                    ours.recv()
                # The first save of each plans, makes its buffers, and imports.
                if repeat > 0:
                    row = {"part": "background", "what": "steps in Python", "saved_by": who, "repeat": repeat - 1}
                    rows.append({**row, "seconds": seconds})
    ours.send(None)
    process.join(60)
    dist.destroy_process_group()
    return rows


def _world_of_one() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _save_on_demand(connection: Connection, size: Size, place: Place) -> None:
    """A process with a state of its own, which saves it whenever it is told to."""
    _world_of_one()
    model, optimizer = states.build(size)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    checkpointer = Checkpointer(state, at_end=False, run=place.below("process").uri)
    while connection.recv() is not None:
        checkpointer.step_count += 1
        checkpointer.save()
        connection.send("saved")


# About a second and a half: some longer than one save takes.
_PYTHON_STEPS = 150


def _python_step() -> int:
    """Some ten milliseconds of nothing but Python."""
    total = 0
    for number in range(150_000):
        total += number & 7
    return total


def _compute(matrix: torch.Tensor, seconds: float) -> None:
    """A fixed amount of arithmetic, of about `seconds` on one undisturbed core."""
    for _ in range(_calibrated(matrix, seconds)):
        matrix @ matrix


def _calibrated(matrix: torch.Tensor, seconds: float) -> int:
    if "products" not in _CALIBRATION:
        began = time.perf_counter()
        for _ in range(20):
            matrix @ matrix
        _CALIBRATION["products"] = max(1, int(20 * seconds / (time.perf_counter() - began)))
    return _CALIBRATION["products"]


# How many products take a step's time; found once a process, so that every training does the same work.
_CALIBRATION: dict[str, int] = {}
