"""Saving while training goes on: one save in flight, written by a thread over a process group of its own.

The training thread pays for `begin`: collecting the state and one copy of the local shards. The background thread does
the rest up to the commit. The training thread makes the report, at the first step boundary at which every rank's
background thread has ended.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ray_stateful.checkpoint import Saving
from ray_stateful.errors import RankFailed, RankTimeout
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.report import SaveReport
from ray_stateful.storage.staging import Staging

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds that a process whose training failed, or ended without `wait`, is held up for a save in flight. If the save's
# thread is in a collective when the interpreter ends, SIGABRT ends the process, and its error and exit code are lost.
# Files being written are not part of these seconds: the interpreter joins the threads of pools before `atexit` runs.
_LEAVE_S = 5.0


@dataclass(frozen=True, slots=True)
class _UntilLeft(Ranks):
    """Ranks that begin no collective once `left` is set."""

    left: threading.Event = field(default_factory=threading.Event)

    def within_deadline(self, phase: str, collective: Callable[[], T]) -> T:
        if self.left.is_set():
            raise RankTimeout(phase, self.rank, 0.0, "training has ended on this rank")
        # Not super(): `slots=True` makes a second class, and super() would look for the first one.
        return Ranks.within_deadline(self, phase, collective)


class BackgroundSaver:
    """At most one save in flight.

    Args:
        ranks: Over a group that nothing else uses: a group shared with training would deadlock.
        timeout_s: How long `wait` waits.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self._ranks = _UntilLeft(ranks.rank, ranks.world_size, ranks.group, ranks.timeout_s)
        self._timeout_s = timeout_s
        self._staging = Staging()
        self._saving: Saving | None = None
        self._thread: threading.Thread | None = None
        self._outcome = Outcome()
        _savers.add(self)

    @property
    def busy(self) -> bool:
        """Whether a save was begun and not finished."""
        return self._saving is not None

    @property
    def written(self) -> bool:
        """Whether this rank's thread for the save in flight has ended, with or without an error. Local."""
        return self._thread is not None and not self._thread.is_alive()

    def begin(self, saving: Saving) -> None:
        """Copy the state and start writing it. Collective only as far as the parts' `state_dict` methods are."""
        # The buffers hold the last save until it is finished: filling them now would tear it.
        assert not self.busy
        saving.collect(self._staging)
        self._saving, self._outcome, released = saving, Outcome(), threading.Event()
        self._thread = threading.Thread(
            target=self._write, args=(saving, self._outcome, released), name="checkpoint", daemon=True
        )
        try:
            # It waits for the thread to run, which would then hold the interpreter's lock while it plans: training
            # would stand still for another `sys.getswitchinterval()`, which is 5 ms.
            self._thread.start()
        finally:
            released.set()

    def wait(self) -> None:
        """Wait for this rank's thread.

        Raises:
            RankTimeout: the thread has not ended in time.
        """
        assert self._thread is not None
        assert self._saving is not None
        began = time.monotonic()
        self._saving.clock.begin("join")
        self._thread.join(self._timeout_s)
        self._saving.clock.stop()
        if self._thread.is_alive():
            waited_s = time.monotonic() - began
            raise RankTimeout("end a background save", self._ranks.rank, waited_s, "its thread is still writing")

    def leave(self, advice: str = "") -> None:
        """Give up the save in flight unless it ends within `_LEAVE_S`. Local; this rank saves no more."""
        if self._thread is None:
            return
        is_first = not self._ranks.left.is_set()
        self._thread.join(_LEAVE_S)
        # A write in progress can't be stopped from here. When it ends the thread ends too, at its next collective.
        self._ranks.left.set()
        error = "it is still being written" if self._thread.is_alive() else self._outcome.error
        if is_first and error is not None:
            # Nobody will ask for it.
            logger.error("a background save was not finished when this process left it: %s%s", error, advice)

    def finish(self, ranks: Ranks) -> SaveReport:
        """Report the save, or raise what it ended with. Collective; only when every rank's thread has ended.

        Args:
            ranks: Of the training thread.

        Raises:
            SaveFailed: on every rank; nothing was committed.
            ReportFailed: on every rank; the checkpoint is committed.
            RankFailed: on the ranks that had done their part, if another rank ran into its deadline.
        """
        assert self.written
        assert self._saving is not None
        saving, self._saving, self._thread = self._saving, None, None
        failures = ranks.failures("end a background save", self._outcome)
        if not failures:
            return saving.report(ranks)
        saving.tell_stall(ranks)
        # A write that was given up may still be reading the old buffers.
        self._staging = Staging()
        if self._outcome.error is not None:
            raise self._outcome.error
        raise RankFailed("save in the background", {rank: failure.text for rank, failure in failures.items()})

    def _write(self, saving: Saving, outcome: Outcome, released: threading.Event) -> None:
        released.wait()
        with outcome.catch():
            saving.write(self._ranks)


_savers: weakref.WeakSet[BackgroundSaver] = weakref.WeakSet()


def _leave_all() -> None:
    for saver in list(_savers):
        # By now the interpreter lets no thread start any more, so a save that had not begun to write fails even if
        # nothing is wrong with it.
        saver.leave("; end the `with` block of the Checkpointer, or call wait(), before the process ends")


atexit.register(_leave_all)
