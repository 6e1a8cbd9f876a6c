"""Whether to save because a node will be taken away: once for each announcement, and only if there is time for it."""

from __future__ import annotations

import logging

from ray_stateful import ray_train

logger = logging.getLogger(__name__)

# Used where asking Ray is a barrier, which takes tens of milliseconds. A worker that Ray tells looks at every step.
_ASK_EVERY_N_STEPS = 10

# A save is assumed to take this many times as long as the last one. If less is left, it is skipped.
_MARGIN = 1.5


class PreemptionWatch:
    """What this rank has heard of preemptions, and which of them is dealt with. Ranks may hear at different steps."""

    def __init__(self) -> None:
        self._heard: ray_train.Preemption | None = None
        self._done: ray_train.Preemption | None = None
        # A save was made for a preemption that only other ranks had heard of.
        self._foretold = False

    def is_due(self, *, step: int, last_save_s: float | None, num_saves: int) -> bool:
        """Whether a node will be taken away, and there is time to save before that; true until `saved` is called.

        Args:
            last_save_s: Seconds that the last save took.
            num_saves: How many there is to be time for: two, if one is in flight, which has to end first.
        """
        found = ray_train.preemption(may_wait=step % _ASK_EVERY_N_STEPS == 0)
        if self._foretold and found not in (None, self._done):
            self._foretold, self._done = False, found
        if found is None or found == self._done:
            return False
        self._heard = found
        left_s, needed_s = found.seconds_left(), _MARGIN * (last_save_s or 0.0) * num_saves
        if left_s is not None and left_s < needed_s:
            logger.warning(
                "ranks %s will be preempted in %.1f s; a save needs %.1f s, so none is begun",
                found.ranks,
                left_s,
                needed_s,
            )
            # There will not be more time later.
            self._done = found
            return False
        return True

    def saved(self) -> None:
        """A save was made because some rank said that it is due."""
        # A rank that has not heard of the preemption yet must not ask for another save when it does.
        self._foretold = self._heard in (None, self._done)
        self._done = self._heard
