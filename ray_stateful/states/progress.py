"""How far the run is, in numbers that only grow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray_stateful.states.counts import MAX_COUNT, count_problems
from ray_stateful.states.part import RankPart, World, problems_of_all


class Progress(RankPart):
    """Counters of the whole run, not of one rank: give every rank the same numbers.

    Saved per rank, as every rank has a clock of its own. A different number of workers takes the counts, which are the
    same on all ranks, and the longest wall time.

    `step` is counted by the Checkpointer. Report samples, tokens and epochs with `count`:

    ```python
    progress.count(samples=batch.num_samples, tokens=num_tokens_of_all_ranks, epoch=batch.epoch)
    ```

    All counts refuse to go backwards, which would mean that two callers count at once, or that a checkpoint was not
    restored. Only `load_state_dict` may lower them.

    Attributes:
        step: Optimizer steps completed.
        wall_s: Seconds since the run began, without the time between a save and its restore.
    """

    resized_as = "exact"

    def __init__(self) -> None:
        self.step = 0
        self.samples = 0
        self.tokens = 0
        self.epoch = 0
        self._wall_s = 0.0
        self._since = time.monotonic()

    @property
    def wall_s(self) -> float:
        return self._wall_s + time.monotonic() - self._since

    def count(self, *, samples: int = 0, tokens: int = 0, epoch: int | None = None) -> None:
        """Add `samples` and `tokens`, and move to `epoch`.

        Raises:
            ValueError: a count would go backwards, or is not a whole number; nothing was counted.
        """
        epoch = self.epoch if epoch is None else epoch
        for name, value in (("samples", samples), ("tokens", tokens), ("epoch", epoch)):
            if value != int(value):
                raise ValueError(f"{name}={value} is no whole number")
        # A NumPy number or a tensor is stored as the Python int that it equals.
        samples, tokens, epoch = int(samples), int(tokens), int(epoch)
        for name, value, least in [("samples", samples, 0), ("tokens", tokens, 0), ("epoch", epoch, self.epoch)]:
            if value < least:
                raise ValueError(f"{name}={value} would take the progress backwards: give at least {least}")
        self.samples += samples
        self.tokens += tokens
        self.epoch = epoch

    def on_step(self, *, step: int) -> None:
        """Set the number of completed optimizer steps to `step`.

        Raises:
            ValueError: `step` is not above the steps that were counted before.
        """
        if step <= self.step:
            raise ValueError(
                f"step={step} would take the progress backwards from step {self.step}: count each step once, in one "
                "place"
            )
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "epoch": self.epoch,
            "wall_s": self.wall_s,
        }

    def check_saved(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """What keeps `saved` from being loaded, one line each; changes nothing."""
        wrong = count_problems(saved, dict.fromkeys(("step", "samples", "tokens", "epoch"), 0))
        wall_s = saved.get("wall_s") if isinstance(saved, Mapping) else 0.0
        # Not by `isfinite`, which fails for an int that is too large for a float.
        is_time = isinstance(wall_s, int | float) and abs(wall_s) <= MAX_COUNT
        return wrong if is_time else (*wrong, "wall_s is no time in the checkpoint: it is not one of ours")

    def check_resized(self, saved: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
        """The same on a different number of ranks, each problem once."""
        return problems_of_all(self.check_saved, saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.samples = int(state_dict["step"]), int(state_dict["samples"])
        self.tokens, self.epoch = int(state_dict["tokens"]), int(state_dict["epoch"])
        self._wall_s, self._since = state_dict["wall_s"], time.monotonic()

    def check_resize(self, name: str, world: World) -> None:
        """Any number of ranks will do."""

    def resize(self, saved: Mapping[int, Mapping[str, Any]], world: World) -> str:
        self.load_state_dict({**saved[0], "wall_s": max(state["wall_s"] for state in saved.values())})
        return self.describe()

    def describe(self) -> str:
        hours, seconds = divmod(round(self._wall_s), 3600)
        return (
            f"step {self.step:,}, epoch {self.epoch}, {self.samples:,} samples, {self.tokens:,} tokens, "
            f"{hours} h {seconds // 60:02} min"
        )
