"""What we ask of a storage: six calls, over paths of one filesystem.

Paths are POSIX strings relative to the filesystem, without a scheme. Implementations are used from several threads at
once, and every error they raise is an `OSError` (or a subclass): what of it may be tried again is decided in
`ray_stateful.storage.retries`, never here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from typing_extensions import Buffer, Self


class Sink(Protocol):
    """A file being written, front to back. As a context manager it is published by a clean exit alone."""

    def write(self, data: Buffer) -> None:
        """Append `data`, whole. Blocks while the storage is behind: memory stays bounded."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the file, durably; or, after an exception in the body, drop it as far as the storage can."""
        ...


class Storage(Protocol):
    """Where checkpoints live."""

    def open_sink(self, path: str) -> Sink:
        """Start a new file at `path`, making its directory where the storage has directories."""
        ...

    def write(self, path: str, data: Buffer) -> None:
        """Write one small file, whole or not at all."""
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read `length` bytes from `offset`, or all from there; fewer only where the file ends.

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
            NotADirectoryError: it is a file, where the storage can tell.
        """
        ...

    def delete(self, path: str) -> None:
        """Delete directory `path` and all in it. Succeeds if there is none."""
        ...
