"""What a run of the benchmarks measures, by how much."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.states import FEW, MANY, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes and repetitions.

    Attributes:
        small, large: The two model sizes in bytes.
        repeats: How often each contender is measured.
        train_s: How long a training is that saves in the background, two or three times.
    """

    small: int = 250_000_000
    large: int = 1_000_000_000
    repeats: int = 3
    num_ranks: int = 4
    train_s: float = 15.0
    planning_ranks: tuple[int, ...] = (64, 256, 1024)

    def sizes(self) -> list[Size]:
        return [Size(self.small, FEW), Size(self.small, MANY), Size(self.large, FEW)]


QUICK = Settings(
    small=50_000_000,
    large=100_000_000,
    repeats=2,
    train_s=6.0,
    planning_ranks=(64, 256),
)
