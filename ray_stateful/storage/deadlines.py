"""Calls that end: a call into a storage, with a deadline, whatever the storage does.

A client library may wait for a server for ever, and a network disk does. The call is made by a thread of ours; at the
deadline the caller goes on with a `TimeoutError`, and the thread is left to its fate: it ends when the call returns,
if it ever does, and being a daemon it does not keep the process.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def call(function: Callable[[], T], timeout_s: float, what: str) -> T:
    """`function()`, or `TimeoutError` naming `what` after `timeout_s` seconds."""
    line = Line()
    try:
        return line.call(function, timeout_s, what)
    finally:
        line.end()


class Line:
    """Calls that are never made at the same time, not even when one of them is given up: all by one thread.

    A stream of a client library is for one thread at a time. To close one while a write to it hangs would corrupt it.
    """

    def __init__(self) -> None:
        self._worker = _idle.pop() if _idle else _Worker()
        self.stuck = False

    def call(self, function: Callable[[], T], timeout_s: float, what: str) -> T:
        """`function()`, or `TimeoutError` naming `what` after `timeout_s` seconds."""
        job = self.post(function)
        if not job.done.wait(timeout_s):
            self.stuck = job.given_up = True
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout_s:.1f} s", what)
        if job.error is not None:
            try:
                raise job.error
            finally:
                # The error's traceback holds this frame, and through it what the call was given: megabytes, at times.
                del job, function
        result: T = job.result
        return result

    def post(self, function: Callable[[], object]) -> Call:
        """Have `function` called, after the calls before it, whenever that is."""
        job = Call(function)
        self._worker.jobs.put(job)
        return job

    def end(self) -> None:
        """No call follows."""
        if self.stuck:
            # Not kept for other calls, which would wait for this one.
            self._worker.jobs.put(None)
        else:
            _idle.append(self._worker)


class Call:
    """A call that was asked for. `given_up`: nobody waits for it any more."""

    __slots__ = ("done", "error", "function", "given_up", "result")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.given_up = False
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class _Worker:
    def __init__(self) -> None:
        self.jobs: SimpleQueue[Call | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self.jobs,), name="storage-call", daemon=True).start()


def this_call() -> Call | None:
    """The call that this thread was asked to make; `None` if it is no thread of ours."""
    return getattr(_of_thread, "call", None)


def _work(jobs: SimpleQueue[Call | None]) -> None:
    while (job := jobs.get()) is not None:
        _of_thread.call = job
        try:
            job.result = job.function()
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            job.error = error
        job.done.set()
        del job, _of_thread.call


_of_thread = threading.local()

# Workers without a job: as many as calls were ever made at once. Appending and popping are atomic.
_idle: list[_Worker] = []
# A forked child has the list and none of the threads.
os.register_at_fork(after_in_child=_idle.clear)
