"""Keeps files open: one per path, however many threads read it, and a limited number in all.

Opening a file on an object store requests its size; a restore that opened the file for every range would make twice as
many requests.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray_stateful.storage import deadlines
from ray_stateful.storage.deadlines import Call

MAX_HANDLES = 64


@dataclass(frozen=True, slots=True)
class _Opening:
    """A file that is open, or that `call` is opening."""

    call: Call | None = field(default_factory=deadlines.this_call)
    file: Future[Any] = field(default_factory=Future)

    @property
    def is_given_up(self) -> bool:
        return self.call is not None and self.call.given_up and not self.file.done()


class Handles:
    """Open files by path. A file that is no longer kept here stays open as long as somebody reads it."""

    def __init__(self, open_file: Callable[[str], Any], max_handles: int = MAX_HANDLES) -> None:
        self._open_file = open_file
        self._max_handles = max_handles
        self._files: OrderedDict[str, _Opening] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, *, fresh: bool = False) -> tuple[Any, bool]:
        """The open file at `path`, and whether it was opened by this call.

        Threads that ask at the same time wait for one of them to open it; but if that one hangs and its call was given
        up, the next to ask opens the file again.

        Args:
            fresh: Open the file anew, and keep the new handle in place of the old one.
        """
        with self._lock:
            opening = None if fresh else self._files.get(path)
            if opening is not None and not opening.is_given_up:
                self._files.move_to_end(path)
            else:
                opening, mine = None, _Opening()
                self._files[path] = mine
                self._files.move_to_end(path)
                while len(self._files) > self._max_handles:
                    self._files.popitem(last=False)
        if opening is not None:
            return opening.file.result(), False
        try:
            mine.file.set_result(self._open_file(path))
        except BaseException as error:
            with self._lock:
                if self._files.get(path) is mine:
                    del self._files[path]
            mine.file.set_exception(error)
            raise
        return mine.file.result(), True

    def forget(self, path: str) -> None:
        """Open `path` anew next time: it is a different file now."""
        with self._lock:
            self._files.pop(path, None)

    def forget_all(self) -> None:
        """Open every file anew next time."""
        with self._lock:
            self._files.clear()
