"""One decision of all ranks at a step boundary, from what each of them would like. Pure; no collectives."""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ray_stateful.errors import UnevenSteps


class Reason(enum.IntFlag):
    """Why a rank would like to save at this step boundary."""

    STEPS = enum.auto()
    SECONDS = enum.auto()
    REQUEST = enum.auto()
    PREEMPTION = enum.auto()
    END = enum.auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do at this step boundary.

    `resize` is the number of the newest request to save before a resize, 0 if there is none; `written` says that the
    background save has ended on every rank.
    """

    reasons: Reason
    resize: int = 0
    written: bool = False

    @property
    def save(self) -> bool:
        return bool(self.reasons) or self.resize > 0

    @property
    def urgent(self) -> bool:
        """Whether the workers may be gone before a background save would be done."""
        return bool(self.reasons & Reason.PREEMPTION) or self.resize > 0


def decide(wishes: Sequence[Sequence[int]]) -> Decision:
    """One decision from every rank's step count, reasons, newest resize request, and whether its background save ended.

    Pure: the same on every rank.

    Raises:
        UnevenSteps: ranks have completed different numbers of steps, or some are at the end and others go on.
    """
    steps = {rank: step for rank, (step, *_) in enumerate(wishes)}
    if len(set(steps.values())) > 1:
        raise UnevenSteps(steps)
    ended = {rank for rank, (_, reasons, *_) in enumerate(wishes) if reasons & Reason.END}
    if ended and len(ended) < len(wishes):
        # A rank that goes on has counted the same step as those at the end, and would wait for them in the next one.
        raise UnevenSteps({rank: step + (rank not in ended) for rank, step in steps.items()})
    reasons = functools.reduce(operator.or_, (Reason(reasons) for _, reasons, *_ in wishes), Reason(0))
    return Decision(
        reasons,
        resize=max(resize for _, _, resize, _ in wishes),
        written=all(written for *_, written in wishes),
    )
