"""Calls into a storage that end by a deadline, whatever the storage does.

A client library may wait for a server for ever, and a network disk does. The call is made by a thread of ours; at the
deadline the caller goes on with a `TimeoutError`, and the thread is abandoned: it ends when the call returns, if it
ever does, and as a daemon thread it does not keep the process alive.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def call(function: Callable[[], T], timeout_s: float, what: str, if_late: Callable[[T], object] | None = None) -> T:
    """`function()`, or `TimeoutError` naming `what` after `timeout_s` seconds.

    Args:
        if_late: Called with what `function` returns after the deadline, if it ever does: nobody else gets it then.
    """
    line = Line()
    try:
        return line.call(function, timeout_s, what, if_late)
    finally:
        line.end()


class Line:
    """Calls made one after another by one thread, even when one of them is given up.

    A client library's stream is for one thread at a time. Closing it while a write to it hangs would corrupt it.
    """

    def __init__(self) -> None:
        try:
            self._worker = _idle.pop()
        except IndexError:
            # Not asked for beforehand: a different thread may take the last one in between.
            self._worker = _Worker()
        self.stuck = False

    def call(
        self, function: Callable[[], T], timeout_s: float, what: str, if_late: Callable[[T], object] | None = None
    ) -> T:
        """Like the function `call` of this module."""
        job = self._queue(Call(function, if_late))
        if not job.done.wait(timeout_s) and job.give_up():
            self.stuck = True
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout_s:.1f} s", what)
        if job.error is not None:
            try:
                raise job.error
            finally:
                # The error's traceback keeps this frame alive, and with it the call's arguments: megabytes, at times.
                del job, function
        # Taken out: whoever keeps the job, as an open file does, would keep megabytes that were read.
        result, job.result = job.result, None
        return result  # type: ignore[no-any-return]  # `function` returned a T

    def post(self, function: Callable[[], object]) -> Call:
        """Queue `function`, to be called once the calls before it have ended; does not wait."""
        return self._queue(Call(function))

    def end(self) -> None:
        """Give the worker thread back: no call follows."""
        if self.stuck:
            # Not kept for other calls, which would wait for the hanging one.
            self._worker.jobs.put(None)
        else:
            _idle.append(self._worker)

    def _queue(self, job: Call) -> Call:
        self._worker.jobs.put(job)
        return job


class Call:
    """A call that was queued. `given_up`: nobody waits for it any more."""

    __slots__ = ("_if_late", "_lock", "done", "error", "function", "given_up", "result")

    def __init__(self, function: Callable[[], Any], if_late: Callable[[Any], object] | None = None) -> None:
        self.function = function
        self.given_up = False
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._if_late = if_late
        self._lock = threading.Lock()

    def give_up(self) -> bool:
        """Wait no longer; `False` if the call has ended meanwhile."""
        with self._lock:
            self.given_up = not self.done.is_set()
            return self.given_up

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Hand over what the call returned or raised, to whoever waits for it."""
        # Under a lock, as the caller may give up right now: either it gets the result, or `_if_late` does.
        with self._lock:
            if not self.given_up:
                self.result, self.error = result, error
            self.done.set()
        if self.given_up and error is None and self._if_late is not None:
            self._if_late(result)


class _Worker:
    def __init__(self) -> None:
        self.jobs: SimpleQueue[Call | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self.jobs,), name="storage-call", daemon=True).start()


def this_call() -> Call | None:
    """The call that this thread is making; `None` if it is not a worker thread of this module."""
    return getattr(_of_thread, "call", None)


def _work(jobs: SimpleQueue[Call | None]) -> None:
    while (job := jobs.get()) is not None:
        _of_thread.call = job
        try:
            job.end(job.function())
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            job.end(error=error)
        del job, _of_thread.call


_of_thread = threading.local()

# Workers without a job, kept: as many as the most calls that were ever made at once. Appending and popping are atomic.
_idle: list[_Worker] = []
# A forked child inherits the list, but none of the threads.
os.register_at_fork(after_in_child=_idle.clear)
