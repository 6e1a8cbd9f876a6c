"""Storage on a filesystem of this machine: a file is whole and on the disk, or it is not there.

A local file is visible before it is closed, and closed before it is on the disk. So a file is written under a temporary
name, flushed to the disk and renamed, and then its directory is flushed: if the process is killed or the power fails at
any point, a reader finds the whole file or none.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from typing_extensions import Buffer, Self

from ray_stateful.format import layout
from ray_stateful.storage.paths import as_bytes, checked_range, normalised

# Files with this prefix are still being written, or were left behind by a process that died: no listing shows them.
ASIDE_PREFIX = ".tmp-"

# Linux moves at most 2 GiB less one page in one call.
_CALL_BYTES = 1 << 30

# What fsync of a directory fails with if the filesystem has no directory handles (some network and user-space ones).
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)

# After this many bytes, the kernel is asked to begin writing them to the disk. Left to itself, it collects a file until
# it is flushed, and the disk is idle meanwhile.
_SEND_BYTES = 8 << 20

# How many times to try to empty a directory into which somebody still writes.
_DELETE_ATTEMPTS = 10


class LocalStorage:
    """Storage below directory `root` of this machine; with an empty `root`, paths are those of the system."""

    max_file_bytes: int | None = None

    def __init__(self, root: str = "") -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    def open_sink(self, path: str) -> LocalSink:
        return LocalSink(self._os_path(path))

    def write(self, path: str, data: Buffer) -> None:
        with self.open_sink(path) as sink:
            sink.write(data)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        # Non-blocking: opening a pipe waits until somebody writes to it, and a hostile checkpoint may contain one.
        flags, where = os.O_RDONLY | os.O_NONBLOCK, self._os_path(path)
        if layout.is_file_of_checkpoint(os.path.basename(where)):
            # A link counts as missing, as in a listing: it leads out of the directory, to a file that may be anyone's.
            # Other files are read through links, as the cache of Hugging Face keeps weights behind links.
            flags |= os.O_NOFOLLOW
        with _opened(where, flags) as descriptor:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, "is not a file", path)
            start, stop = checked_range(path, offset, length, found.st_size)
            if stop - start <= _CALL_BYTES:
                data = os.pread(descriptor, stop - start, start)
                if len(data) == stop - start:
                    return data
            return _read_in_parts(descriptor, start, stop)

    def sizes(self, path: str) -> dict[str, int]:
        sizes = {}
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in self._entries(path):
                # A file that is deleted between being listed and being looked at is left out.
                with suppress(FileNotFoundError):
                    # So is a link: it leads out of the directory.
                    if entry.is_file(follow_symlinks=False):
                        sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        return sizes

    def directories(self, path: str) -> list[str]:
        with suppress(FileNotFoundError):
            # An error if `path` is a file: a run would begin from scratch if it saw a directory without directories.
            return sorted(entry.name for entry in self._entries(path) if entry.is_dir())
        return []

    def delete(self, path: str) -> None:
        where = self._os_path(normalised(path, to_delete=True))
        if os.path.islink(where):
            # Refused before anything in it is deleted: a link may lead anywhere.
            raise OSError(errno.ELOOP, "is a link, which is not deleted", path)
        # The manifest goes first: what an interrupted deletion leaves must not be taken for a checkpoint.
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(os.path.join(where, layout.MANIFEST))
            _fsync_directory(where)
        for attempt in range(_DELETE_ATTEMPTS):
            try:
                shutil.rmtree(where)
            except FileNotFoundError:
                # The directory itself was missing, or a file in it that a different process deleted first.
                if not os.path.lexists(where):
                    break
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or attempt == _DELETE_ATTEMPTS - 1:
                    raise
            else:
                break
        with suppress(FileNotFoundError):
            _fsync_directory(os.path.dirname(where) or ".")

    def _os_path(self, path: str) -> str:
        where = normalised(path)
        # A leading slash means the top of this storage, not of the machine.
        return (os.path.join(self.root, where.lstrip("/")) if self.root else where) or "."

    def _entries(self, path: str) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._os_path(path)) as entries:
            yield from (entry for entry in entries if not entry.name.startswith(ASIDE_PREFIX))


class LocalSink:
    """A local file being written, under a temporary name until it is whole."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._directory, name = os.path.split(path)
        self._directory = self._directory or "."
        self._aside = os.path.join(self._directory, f"{ASIDE_PREFIX}{secrets.token_hex(8)}-{name}"[:255])
        make_directory(self._directory)
        self._descriptor = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._size = self._sent = 0

    def write(self, data: Buffer) -> None:
        view = as_bytes(data)
        while view.nbytes:
            written = os.write(self._descriptor, view[:_CALL_BYTES])
            self._size += written
            view = view[written:]
        if self._size - self._sent >= _SEND_BYTES:
            _send_on(self._descriptor, self._sent, self._size)
            self._sent = self._size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._drop()
            return
        try:
            self._publish()
        except BaseException:
            self._drop()
            raise

    def _publish(self) -> None:
        os.fsync(self._descriptor)
        found = os.fstat(self._descriptor).st_size
        if found != self._size:
            raise OSError(errno.EIO, f"wrote {self._size:,} bytes and {found:,} are there", self._path)
        descriptor, self._descriptor = self._descriptor, -1
        # Network filesystems may report a full disk only here.
        os.close(descriptor)
        os.replace(self._aside, self._path)
        # Only this puts the new name on the disk: until then, a power cut could undo the rename.
        _fsync_directory(self._directory)

    def _drop(self) -> None:
        # Errors of the clean-up must not hide the error that led here.
        with suppress(OSError):
            if self._descriptor >= 0:
                os.close(self._descriptor)
        self._descriptor = -1
        with suppress(OSError):
            os.unlink(self._aside)


def make_directory(path: str) -> None:
    """Make directory `path` and its missing parents, durably. Succeeds if it exists already."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path) or "."
    make_directory(parent)
    with suppress(FileExistsError):
        os.mkdir(path)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    _fsync_directory(parent)


def _send_on(descriptor: int, start: int, stop: int) -> None:
    """Have the kernel begin to write a range to the disk, without waiting for it."""
    # Linux does so when told that a range which is not on the disk yet is no longer needed. This is advice: if the
    # filesystem ignores it, or the system has no such call, only time is lost.
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def _read_in_parts(descriptor: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop:
        part = os.pread(descriptor, min(_CALL_BYTES, stop - start), start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _fsync_directory(path: str) -> None:
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_FSYNC:
                raise


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise FileNotFoundError(errno.ENOENT, "is a link, which is not followed", path) from error
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)
