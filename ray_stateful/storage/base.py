"""What we ask of a storage: six calls, over paths of one filesystem.

Paths are POSIX strings relative to the filesystem, without a scheme. Implementations are used from several threads at
once, and every error they raise is an `OSError` (or a subclass): which of them are transient and tried again is decided
in `ray_stateful.storage.retries`, never here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from typing_extensions import Buffer, Self


class Sink(Protocol):
    """A file being written, front to back. As a context manager, it is published only by an exit without an error."""

    def write(self, data: Buffer) -> None:
        """Append all of `data`. Blocks while the storage is behind, so that memory stays bounded."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the file durably; or, after an exception in the body, delete it as far as the storage can."""
        ...


class Storage(Protocol):
    """Where checkpoints live."""

    def open_sink(self, path: str) -> Sink:
        """Start a new file at `path`; makes its directory if the storage has directories."""
        ...

    def write(self, path: str, data: Buffer) -> None:
        """Write one small file, whole or not at all."""
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read `length` bytes from `offset`, or all bytes from there on; fewer only if the file ends before.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def sizes(self, path: str) -> Mapping[str, int]:
        """The files directly in directory `path`: name to size in bytes. Empty if there is no such directory."""
        ...

    def directories(self, path: str) -> list[str]:
        """The names of the directories directly in `path`, sorted. Empty if there is no such directory.

        Raises:
            NotADirectoryError: `path` is a file, if the storage can tell.
        """
        ...

    def delete(self, path: str) -> None:
        """Delete directory `path` and everything in it. Succeeds if there is no such directory."""
        ...
