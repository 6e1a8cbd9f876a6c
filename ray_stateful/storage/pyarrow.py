"""`Storage` over any `pyarrow.fs.FileSystem`: local, S3, GCS, Azure, a directory of one of them, or a wrapped fsspec.

In an object store a file appears when it is complete, and there is no rename: files are written in place, and the
manifest, written last, says that they are whole. What one kind of filesystem does differently is a field of `Traits`,
with the reason, and nowhere else.
"""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

import pyarrow
import pyarrow.fs
from typing_extensions import Buffer, Self

from ray_stateful.format import layout
from ray_stateful.storage.base import Sink
from ray_stateful.storage.credentials import without_credentials
from ray_stateful.storage.handles import Handles
from ray_stateful.storage.local import LocalStorage
from ray_stateful.storage.paths import as_bytes, checked_range, normalised

_MIB = 1 << 20

# The size of one part on S3, fixed in pyarrow. A file of this size or larger is uploaded in parts.
_PART_BYTES = 10 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a kind of filesystem differs.

    Attributes:
        max_file_bytes: The largest file that can be written; `None` if there is no limit that matters.
        flush_bytes: Wait for background uploads after each this many bytes written; `None` for never.
        write_buffer_bytes: Collect writes up to this size; `None` to pass each on.
        shares_handles: Whether an open file may be read from several threads at once.
        has_directories: Whether a directory must be made before a file in it can be written, or found.
        deletes_known_files: Whether to check that a file is there before deleting it.
    """

    max_file_bytes: int | None = None
    flush_bytes: int | None = None
    write_buffer_bytes: int | None = None
    shares_handles: bool = False
    has_directories: bool = False
    deletes_known_files: bool = False


_TRAITS = {
    # At most 10,000 parts, also fixed. Uploads run in the background with no bound on memory, so a flush waits for them
    # now and then; a flush does not publish what is written so far.
    "s3": Traits(max_file_bytes=10_000 * _PART_BYTES, flush_bytes=64 * _MIB, shares_handles=True),
    # Unbuffered, each write of 256 KiB or more would be a request that is waited for. Only a directory with a marker
    # object is listed. The first use of an open file requests all of it, and drops the answer: with shared handles this
    # happens once per file, not once per range.
    "gcs": Traits(max_file_bytes=5 << 40, write_buffer_bytes=8 * _MIB, has_directories=True, shares_handles=True),
    # 50,000 blocks of 10 MiB. No flushing: a flush commits the blocks, and a part of the file would look like a file.
    # The client takes a lease on a file to delete it. If the lease is refused, as for a missing file, the client was
    # seen to lose count of the answer's bytes: it waits for seconds, or ends the process with a C++ exception.
    "abfs": Traits(max_file_bytes=50_000 * 10 * _MIB, shares_handles=True, deletes_known_files=True),
}
_OTHER = Traits(has_directories=True)


class PyarrowStorage:
    """`ray_stateful.storage.base.Storage` over a pyarrow filesystem.

    Paths are what the filesystem takes: `bucket/directory/file` on an object store, a path of the system on a local
    one. Files on this machine, also through a `SubTreeFileSystem` or fsspec, are written under a temporary name,
    flushed to the disk and renamed (`LocalStorage`).

    Attributes:
        filesystem: As given.
        max_file_bytes: The largest file that can be written; `None` if there is no limit.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem) -> None:
        self.filesystem = filesystem
        self._kind = _kind_of(filesystem)
        root = local_root(filesystem)
        self._local = None if root is None else LocalStorage(root)
        self._traits = Traits() if self._local is not None else _TRAITS.get(self._kind, _OTHER)
        self.max_file_bytes = self._traits.max_file_bytes
        self._handles = Handles(self._open_file)
        self._made_directories: set[str] = set()
        # The kinds of upload, in parts (True) or whole (False), of which one file's size has been checked.
        self._seen: set[bool] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PyarrowStorage], tuple[pyarrow.fs.FileSystem]]:
        return PyarrowStorage, (self.filesystem,)

    def __repr__(self) -> str:
        # Without the filesystem's own fields: they may hold a secret key.
        return f"PyarrowStorage({self._kind})"

    def open_sink(self, path: str) -> Sink:
        if self._local is not None:
            return self._local.open_sink(path)
        return self._open_stream(normalised(path))

    def write(self, path: str, data: Buffer) -> None:
        if self._local is not None:
            self._local.write(path, data)
            return
        view = as_bytes(data)
        with self._open_stream(normalised(path), content=view) as sink:
            sink.write(view)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if self._local is not None:
            return self._local.read(path, offset, length)
        where = normalised(path)
        with os_errors(where):
            if self._kind == "gcs" and offset == 0 and length is None:
                # One request instead of three.
                with self.filesystem.open_input_stream(where, compression=None) as stream:
                    return bytes(stream.readall())
            if not self._traits.shares_handles:
                with self._open_file(where) as file:
                    return _read_range(file, where, offset, length)
            # A handle keeps the size that the file had when opened; a caller who wants all of it needs its size now.
            file, is_new = self._handles.get(where, fresh=length is None)
            try:
                data = _read_range(file, where, offset, length)
                if length is not None and len(data) < length and not is_new:
                    data = _read_range(self._handles.get(where, fresh=True)[0], where, offset, length)
            except OSError:
                self._handles.forget(where)
                raise
            return data

    def sizes(self, path: str) -> dict[str, int]:
        if self._local is not None:
            return self._local.sizes(path)
        return {info.base_name: info.size for info in self._list(path) if info.type == pyarrow.fs.FileType.File}

    def directories(self, path: str) -> list[str]:
        if self._local is not None:
            return self._local.directories(path)
        return sorted(info.base_name for info in self._list(path) if info.type == pyarrow.fs.FileType.Directory)

    def delete(self, path: str) -> None:
        if self._local is not None:
            self._local.delete(path)
            return
        where = normalised(path, to_delete=True)
        with self._lock:
            self._made_directories.clear()
        with os_errors(where):
            # The manifest goes first: what an interrupted deletion leaves must not be taken for a checkpoint.
            manifest = f"{where}/{layout.MANIFEST}"
            if not self._traits.deletes_known_files or self.size_of(manifest) is not None:
                with suppress(FileNotFoundError):
                    self.filesystem.delete_file(manifest)
            try:
                self.filesystem.delete_dir(where)
            except OSError:
                # For a missing directory, GCS raises an error like any other.
                if self._remains(where):
                    raise
        self._handles.forget_all()

    def size_of(self, path: str) -> int | None:
        """The size of file `path` in bytes; `None` if there is no such file."""
        with os_errors(path):
            info = self.filesystem.get_file_info(path)
        return info.size if info.type == pyarrow.fs.FileType.File else None

    def check_first(self, path: str, size: int) -> None:
        """Check the size of file `path`, if it is the first that this storage wrote with its kind of upload.

        Some servers store the trailer of a chunked upload as part of the file, and report success. They do so every
        time, so one file is enough: a check of every file would be a request that all ranks wait for. A save checks the
        sizes of all files once more, in one listing before the manifest.

        Raises:
            OSError: it is not `size` bytes. The file is deleted, and the next file of its kind is checked again.
        """
        in_parts = size >= _PART_BYTES
        with self._lock:
            if in_parts in self._seen:
                return
            self._seen.add(in_parts)
        # Not under the lock: a request that hangs is given up, and must not hold up later files.
        try:
            found = self.size_of(path)
            if found != size:
                self.discard(path)
                raise OSError(errno.EBADMSG, f"wrote {size:,} bytes, and the storage has {found or 0:,}", path)
        except (OSError, MemoryError):
            with self._lock:
                self._seen.discard(in_parts)
            raise

    def discard(self, path: str) -> None:
        """Try to delete file `path`, ignoring errors: it is damaged, and nothing refers to it."""
        with suppress(OSError), os_errors(path):
            self.filesystem.delete_file(path)

    def _open_stream(self, where: str, content: memoryview | None = None) -> _StreamSink:
        with os_errors(where):
            self._make_directory_of(where)
            # Without `compression=None` a file called `x.gz` would be stored compressed.
            stream = self.filesystem.open_output_stream(
                where, compression=None, buffer_size=self._traits.write_buffer_bytes
            )
        self._handles.forget(where)
        return _StreamSink(self, where, stream, self._traits, content)

    def _open_file(self, path: str) -> pyarrow.NativeFile:
        with os_errors(path):
            return self.filesystem.open_input_file(path)

    def _remains(self, path: str) -> bool:
        selector = pyarrow.fs.FileSelector(path, allow_not_found=True, recursive=True)
        try:
            return bool(self.filesystem.get_file_info(selector))
        except FileNotFoundError:
            return False

    def _list(self, path: str) -> list[pyarrow.fs.FileInfo]:
        where = normalised(path)
        selector = pyarrow.fs.FileSelector(where, allow_not_found=True, recursive=False)
        with os_errors(where):
            try:
                infos = self.filesystem.get_file_info(selector)
            except (FileNotFoundError, NotADirectoryError):
                return []
        # Some stores list the directory's own marker object, with an empty name or the directory's path.
        return [info for info in infos if info.base_name and info.path.strip("/") != where.strip("/")]

    def _make_directory_of(self, path: str) -> None:
        directory = path.rpartition("/")[0]
        if not self._traits.has_directories or directory in self._made_directories or not directory:
            return
        self.filesystem.create_dir(directory, recursive=True)
        with self._lock:
            self._made_directories.add(directory)


class _StreamSink:
    """A file being written to an output stream, in place."""

    def __init__(
        self,
        storage: PyarrowStorage,
        path: str,
        stream: pyarrow.NativeFile,
        traits: Traits,
        content: memoryview | None = None,
    ) -> None:
        self._storage, self._path, self._stream, self._traits = storage, path, stream, traits
        self._content = content
        self._size = self._flushed = 0

    def write(self, data: Buffer) -> None:
        view = as_bytes(data)
        limit = self._traits.max_file_bytes
        if limit is not None and self._size + view.nbytes > limit:
            # Otherwise the storage would refuse the last part, after hours.
            raise OSError(errno.EFBIG, f"a file here ends at {limit:,} bytes; split it", self._path)
        with os_errors(self._path):
            self._stream.write(view)
            self._size += view.nbytes
            if self._traits.flush_bytes is not None and self._size - self._flushed >= self._traits.flush_bytes:
                self._stream.flush()
                self._flushed = self._size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # There is no way to abort: closing publishes what was written, and so would the stream's destructor.
            with suppress(OSError), os_errors(self._path):
                self._stream.close()
            # If this attempt was given up and ends only now, a later one may have written the whole file already.
            if self._content is None or not self._is_there():
                self._storage.discard(self._path)
            return
        try:
            with os_errors(self._path):
                self._stream.close()
        except OSError:
            # Maybe only the reply to the request that completes the file was lost, and the file is there.
            if not self._is_there():
                raise
            return
        self._storage.check_first(self._path, self._size)

    def _is_there(self) -> bool:
        try:
            if self._content is not None:
                # It is small, so read it: an older file of the same name and size may be there.
                return self._storage.read(self._path) == self._content
            return self._storage.size_of(self._path) == self._size
        except OSError:
            return False


def _read_range(file: pyarrow.NativeFile, path: str, offset: int, length: int | None) -> bytes:
    if file.closed:
        # Nobody closed it: a file on GCS makes a request when it is first used, and counts as closed if that fails. The
        # reason is not reported, so the error is taken for transient.
        raise ConnectionAbortedError(
            errno.ECONNABORTED, "could not be opened to read; the client does not say why", path
        )
    start, stop = checked_range(path, offset, length, file.size())
    data = bytes(file.read_at(stop - start, start)) if stop > start else b""
    if len(data) < stop - start:
        # The file is longer, as the client itself says: an answer was cut off on its way, which is no damage.
        raise ConnectionAbortedError(
            errno.ECONNABORTED, f"asked for {stop - start:,} bytes and got {len(data):,}", path
        )
    return data


def _kind_of(filesystem: pyarrow.fs.FileSystem) -> str:
    while isinstance(filesystem, pyarrow.fs.SubTreeFileSystem):
        filesystem = filesystem.base_fs
    return str(filesystem.type_name)


def local_root(filesystem: pyarrow.fs.FileSystem) -> str | None:
    """Where on this machine `filesystem` starts: "" if its paths are the system's, `None` if it is elsewhere."""
    if isinstance(filesystem, pyarrow.fs.SubTreeFileSystem):
        base = local_root(filesystem.base_fs)
        return None if base is None else f"{base}{filesystem.base_path}"
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return ""
    # fsspec is not a dependency: if its module is not imported, no filesystem can be of it. Not a subclass: its paths
    # may mean something else.
    module = sys.modules.get("fsspec.implementations.local")
    handler = getattr(filesystem, "handler", None)
    if module is not None and type(getattr(handler, "fs", None)) is module.LocalFileSystem:
        return ""
    return None


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn every error of a filesystem but `MemoryError` into an `OSError`, without secrets."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        is_os_error = isinstance(error, OSError)
        # A wrapped fsspec filesystem raises whatever its SDK raises.
        said = str(error) if is_os_error else f"{type(error).__name__}: {error}"
        shown = without_credentials(said)
        if shown != said:
            # Azure's client names the URL of the request that failed, and a SAS token is a part of that. So its error
            # is not even chained.
            kind = type(error) if is_os_error and type(error).__module__ == "builtins" else OSError
            raise kind(getattr(error, "errno", None) or errno.EIO, shown) from None
        if is_os_error:
            raise
        raise OSError(errno.EIO, said, path) from error
