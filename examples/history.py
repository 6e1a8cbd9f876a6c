"""What a run did, step by step, as its workers noted it: one JSONL file per worker process.

Beside the checkpoints and independent of them, so that it can testify about them. A process that is killed leaves the
lines it had written; a run that is resumed adds files. `surviving` says which of the noted steps are part of the model
that the run ended with: those that no later resume went back behind.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any


class Journal:
    """This worker's notes. Made by all workers together, at the start of the training function."""

    def __init__(self, directory: Path) -> None:
        # Here, as whoever only reads notes needs no torch, which takes seconds to import.
        import torch.distributed as dist

        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        # Rank 0's clock names the attempt for everybody: it is what tells one group of workers from the next.
        box = [time.time_ns()]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{box[0]}_{self.rank}.jsonl"
        self._note(attempt=box[0], rank=self.rank, world_size=self.world_size, pid=os.getpid())

    def began(self, step: int, report: str | None) -> None:
        """Training goes on after `step`, as `report` says; from the beginning if there is none."""
        self._note(began=step, report=report)

    def trained(self, step: int, loss: float, samples: Sequence[int]) -> None:
        """`step` is done: the loss over its whole global batch, and the samples that this worker had of it."""
        self._note(step=step, loss=loss, samples=list(samples))

    def _note(self, **entry: Any) -> None:
        # Opened and closed each time: a process that is killed has no notes left in a buffer.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@dataclass(slots=True)
class Step:
    """One optimizer step of one attempt. `samples` are those of all workers that noted it."""

    step: int
    loss: float
    samples: list[int] = field(default_factory=list)
    num_workers: int = 0


@dataclass(slots=True)
class Attempt:
    """One group of workers, from its start to its end. `began` is the step it went on after, once it is known."""

    attempt: int
    world_size: int
    pids: dict[int, int] = field(default_factory=dict)
    began: int | None = None
    report: str | None = None
    steps: dict[int, Step] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last step that any of its workers noted."""
        return max(self.steps, default=self.began or 0)


def read_attempts(directory: Path) -> list[Attempt]:
    """All attempts noted under `directory`, oldest first; also while they are being written."""
    attempts: dict[int, Attempt] = {}
    for path in sorted(directory.glob("*_*.jsonl")):
        # Without its newline a line is not written yet, or never will be.
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        if not lines:
            continue
        head = lines[0]
        attempt = attempts.setdefault(head["attempt"], Attempt(head["attempt"], head["world_size"]))
        attempt.pids[head["rank"]] = head["pid"]
        for entry in lines[1:]:
            if "began" in entry:
                attempt.began, attempt.report = entry["began"], entry["report"]
                continue
            step = attempt.steps.setdefault(entry["step"], Step(entry["step"], entry["loss"]))
            step.samples += entry["samples"]
            step.num_workers += 1
    return [attempts[key] for key in sorted(attempts)]


@dataclass(frozen=True, slots=True)
class Point:
    """One step that the final model has gone through."""

    step: int
    loss: float
    world_size: int
    samples: tuple[int, ...]


def surviving(attempts: Iterable[Attempt]) -> list[Point]:
    """The steps that the final model has gone through, in order.

    Raises:
        ValueError: a step is missing, or was noted by some of the workers only.
    """
    points: dict[int, Point] = {}
    for attempt in attempts:
        if attempt.began is None:
            continue
        points = {step: point for step, point in points.items() if step <= attempt.began}
        if len(points) != attempt.began:
            raise ValueError(
                f"an attempt on {attempt.world_size} workers went on after step {attempt.began}, untrained"
            )
        for step in sorted(attempt.steps.values(), key=lambda step: step.step):
            if step.num_workers == attempt.world_size:
                points[step.step] = Point(step.step, step.loss, attempt.world_size, tuple(sorted(step.samples)))
    if sorted(points) != list(range(1, len(points) + 1)):
        raise ValueError(f"steps are missing from the history: {sorted(points)}")
    return [points[step] for step in sorted(points)]


def steps_lost(attempts: Sequence[Attempt]) -> list[int]:
    """At each transition from one attempt to the next: the steps that had been trained and were trained again."""
    known = [attempt for attempt in attempts if attempt.began is not None]
    return [max(0, before.last_step - (after.began or 0)) for before, after in pairwise(known)]


def data_problems(points: Sequence[Point], reference: Sequence[Point], num_samples: int) -> list[str]:
    """What is wrong with the data: samples lost or repeated in an epoch, or others than the reference trained on."""
    problems = []
    for point, wanted in zip(points, reference, strict=False):
        if point.samples != wanted.samples:
            problems.append(f"step {point.step} trained on other samples than the uninterrupted run")
    seen = Counter(sample for point in points for sample in point.samples)
    rounds = [seen[sample] for sample in range(num_samples)]
    # In whole epochs every sample occurs equally often; in the one that is under way, once or not yet.
    if max(rounds) - min(rounds) > 1:
        problems.append(f"some samples were trained {max(rounds)} times, others {min(rounds)} times")
    return problems
