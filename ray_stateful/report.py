"""What a save and a restore did: returned, logged and printed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_stateful.format import layout
from ray_stateful.storage.reading import ReadStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """What became of one part: one word (exact, resharded, re-seeded, ...) and what there is to say about it."""

    name: str
    outcome: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join((f"  {self.name:<10} {self.outcome:<10}", *self.details)).replace("; ", " ", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeReport:
    """What was restored, and how. The same on every rank.

    `step` counts the optimizer steps completed when the checkpoint was saved, `samples` the samples trained. With
    `initial` both are 0: nothing was resumed, the models began from the weights at `checkpoint`, a place.
    `rejected` are newer checkpoints that could not be used, name to reason; `statistics` adds up what all ranks read.
    Of a checkpoint that is not `verified`, which this package did not write, steps, samples and who saved it are not
    known: they are 0, 0 and as many as are here.
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

    @property
    def steps_lost(self) -> int:
        """Optimizer steps between this checkpoint and the newest one that could not be used."""
        names = filter(None, map(layout.parse_name, self.rejected))
        return max((name.step - self.step for name in names), default=0)

    def __str__(self) -> str:
        now = "" if self.saved_world_size == self.world_size else f", now {self.world_size}"
        # What stock tools wrote says nothing of steps and workers.
        by = f"step {self.step:,}; written by {_workers(self.saved_world_size)}{now}"
        unverified = "unverified: it has no checksums"
        lines = [f"resumed {self.checkpoint} ({by if self.verified else f'not ours; {unverified}'})"]
        if self.initial:
            checked = "" if self.verified else f"; {unverified}"
            lines = [f"began from {self.checkpoint} (initial weights; step 0{checked})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        if self.steps_lost:
            lines.append(f"  that costs {self.steps_lost:,} steps, which will be trained again")
        lines += [str(part) for part in self.parts]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """A committed checkpoint: where it is, and what writing it took. The same on every rank."""

    name: str
    uri: str
    step: int
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = f", {size(self.num_bytes / self.seconds)}/s" if self.seconds > 0 else ""
        return f"saved {self.name} (step {self.step:,}; {size(self.num_bytes)} in {self.seconds:.1f} s{rate})"


def size(num_bytes: float) -> str:
    """Bytes as people write them: `1.21 GB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"
