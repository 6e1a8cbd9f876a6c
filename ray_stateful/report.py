"""What a save and a restore did: returned, logged and printed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_stateful.format import layout
from ray_stateful.printable import printable
from ray_stateful.storage.reading import ReadStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """What became of one part: one word (exact, partial, changed, re-seeded ...) and what there is to say about it."""

    name: str
    outcome: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return printable("; ".join((f"  {self.name:<10} {self.outcome:<10}", *self.details)).replace("; ", " ", 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeReport:
    """What was restored, and how. The same on every rank, but for `seconds` and, in a pipeline, `details`.

    `step` counts the optimizer steps completed when the checkpoint was saved, `samples` the samples trained. With
    `initial` both are 0: nothing was resumed, the models began from the weights at the path or URI `checkpoint`.
    `rejected` are newer checkpoints that could not be used, name to reason; `statistics` adds up what all ranks read.
    A checkpoint that is not `verified` was not written by this package and does not record these numbers: `step` and
    `samples` are 0, and `saved_world_size` is that of this run.
    `created_s` is when the checkpoint was committed, in seconds since 1970; 0 if it is not known.
    """

    checkpoint: str
    step: int
    samples: int
    saved_world_size: int
    world_size: int
    verified: bool
    parts: tuple[PartReport, ...]
    statistics: ReadStatistics = field(default_factory=ReadStatistics)
    seconds: float = 0.0
    rejected: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    initial: bool = False
    created_s: float = 0.0

    @property
    def steps_lost(self) -> int:
        """Optimizer steps between this checkpoint and the newest one that could not be used."""
        names = filter(None, map(layout.parse_name, self.rejected))
        # Never below 0: after going back on purpose, a checkpoint that was reported later may be of an earlier step.
        return max([0, *(name.step - self.step for name in names)])

    def as_fields(self) -> dict[str, Any]:
        """The report as plain JSON values, for logs that machines read."""
        return {
            "event": "began" if self.initial else "resumed",
            "checkpoint": self.checkpoint,
            "step": self.step,
            "samples": self.samples,
            "saved_world_size": self.saved_world_size,
            "world_size": self.world_size,
            "verified": self.verified,
            "seconds": round(self.seconds, 6),
            "bytes_read": self.statistics.bytes_read,
            "bytes_wanted": self.statistics.bytes_wanted,
            "num_requests": self.statistics.num_requests,
            "created_s": self.created_s,
            "steps_lost": self.steps_lost,
            "rejected": dict(self.rejected),
            "parts": {part.name: {"outcome": part.outcome, "details": list(part.details)} for part in self.parts},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        now = "" if self.saved_world_size == self.world_size else f", now {self.world_size}"
        # A checkpoint that stock tools wrote does not record steps and workers.
        by = f"step {self.step:,}; written by {_counted(self.saved_world_size, 'worker')}{now}"
        unverified = "unverified: it has no checksums"
        lines = [f"resumed {self.checkpoint} ({by if self.verified else f'not ours; {unverified}'})"]
        if self.initial:
            checked = "" if self.verified else f"; {unverified}"
            lines = [f"began from {self.checkpoint} (initial weights; step 0{checked})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        if self.steps_lost:
            lines.append(f"  that costs {_counted(self.steps_lost, 'step')}, which will be trained again")
        lines += [str(part) for part in self.parts]
        lines += [f"  {note}" for note in self.notes]
        return printable("\n".join(lines))


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """A committed checkpoint: where it is, and what writing it took. The same on every rank, except for times.

    `seconds` is the time from the beginning of the save to its commit. `seconds_by_phase` (see `docs/observability.md`)
    is how long each phase took, the report included. `stalled_s` is how long training stood still: throughout, unless
    the checkpoint was written in the background. `created_s` is when it was committed, in seconds since 1970.
    """

    name: str
    uri: str
    step: int
    num_bytes: int
    seconds: float
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)
    stalled_s: float = 0.0
    created_s: float = 0.0

    def as_fields(self) -> dict[str, Any]:
        """The report as plain JSON values, for logs that machines read."""
        return {
            "event": "saved",
            "checkpoint": self.name,
            "uri": self.uri,
            "step": self.step,
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 6),
            "seconds_by_phase": {phase: round(took_s, 6) for phase, took_s in self.seconds_by_phase.items()},
            "stalled_s": round(self.stalled_s, 6),
            "created_s": self.created_s,
        }

    def __str__(self) -> str:
        rate = f", {size(self.num_bytes / self.seconds)}/s" if self.seconds > 0 else ""
        written = f"{size(self.num_bytes)} in {self.seconds:.1f} s{rate}"
        # A save in the foreground stops training throughout: that is not worth saying.
        is_all = self.stalled_s > 0.9 * self.seconds
        waited = "" if is_all else f"; training stood still for {self.stalled_s:.1f} s"
        return f"saved {self.name} (step {self.step:,}; {written}{waited})"


def size(num_bytes: float) -> str:
    """Bytes as people write them: `1.21 GB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
