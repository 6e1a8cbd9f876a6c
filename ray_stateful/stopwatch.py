"""How long each phase of a save takes, and how long training stands still for it. Pure, except for the clock."""

from __future__ import annotations

import threading
import time


class Stopwatch:
    """Seconds by phase. A phase lasts until the next one of the same thread begins, or until `stop`.

    The thread that makes the stopwatch must be the one that trains: training stands still during its phases.
    Another thread may have phases of its own at the same time.

    Attributes:
        seconds: By phase, in the order in which they ended.
        stalled_s: The seconds of all phases of the thread that trains.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.stalled_s = self._taken_s = 0.0
        self._trains = threading.get_ident()
        # By thread: one may write a background save while training waits for it in another.
        self._open: dict[int, tuple[str, float]] = {}

    def begin(self, phase: str) -> None:
        """End this thread's phase, if there is one, and begin another."""
        self.stop()
        self._open[threading.get_ident()] = (phase, time.monotonic())

    def stop(self) -> str:
        """End this thread's phase.

        Returns:
            Its name; empty if there is none.
        """
        thread = threading.get_ident()
        if thread not in self._open:
            return ""
        phase, since = self._open.pop(thread)
        took_s = time.monotonic() - since
        self.seconds[phase] = self.seconds.get(phase, 0.0) + took_s
        if thread == self._trains:
            self.stalled_s += took_s
        return phase

    def take_stalled_s(self) -> float:
        """What `stalled_s` has grown by since this was last called."""
        new_s, self._taken_s = self.stalled_s - self._taken_s, self.stalled_s
        return new_s
