"""Turns a URI, or a path of this machine, into a storage and a path on it."""

from __future__ import annotations

import os
import posixpath
import re
from datetime import timedelta
from typing import Any

import pyarrow.fs

from ray_stateful.storage.base import Storage
from ray_stateful.storage.credentials import SECRET
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.retries import RetryingStorage

# Seconds. A request that moves no byte for so long counts as hung; by default, the AWS client takes 90 s with retries.
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 20.0


# The beginning of a path that was meant to be a URI.
_ONE_SLASH = re.compile("(file|s3|gs|gcs|abfs|abfss|hdfs):", re.IGNORECASE)


def resolve(uri: str) -> tuple[RetryingStorage, str]:
    """The storage of `uri`, with retries and deadlines, and the path on it.

    Args:
        uri: `s3://`, `gs://`, `abfs://`, `file://` ... as `pyarrow.fs.FileSystem.from_uri` takes it, or a path of this
            machine.

    Raises:
        OSError: the storage can't be reached.
        ValueError: no filesystem is known for the scheme, or `uri` is malformed or ambiguous.
    """
    scheme, colon, _ = uri.partition("://")
    if not colon:
        _refuse_ambiguous(uri)
        return RetryingStorage(PyarrowStorage(pyarrow.fs.LocalFileSystem())), os.path.abspath(uri)
    # What follows would be silently dropped, and two runs would share a directory. The URI is not shown: the character
    # may be part of a secret.
    if "#" in uri:
        raise ValueError(f"a {scheme}:// URI with a '#' in it, which ends it: write %23 for a '#' of a name or secret")
    if scheme.lower() == "file" and "?" in uri:
        raise ValueError("a file:// URI with a '?' in it, which ends the path: write %3F for a '?' of a name")
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    except ValueError:
        if not SECRET.search(uri):
            raise
        # pyarrow's error has the URI in it, whole or in parts; so it is not even chained.
        raise ValueError(
            f"a {scheme}:// URI can't be parsed. The reason is not shown, as the URI has a secret in it: try it "
            "without the secret. In a secret, percent-encode everything but letters and digits ('/' is %2F); or pass "
            "the secret in the environment"
        ) from None
    return RetryingStorage(PyarrowStorage(with_timeouts(filesystem))), path


def _refuse_ambiguous(path: str) -> None:
    """Refuse a path that would name a directory in the working directory, but was meant differently.

    Raises:
        ValueError: `path` is empty, is or begins with `~`, or begins with a scheme but has no `//` after it.
    """
    scheme = _ONE_SLASH.match(path)
    if not path:
        raise ValueError("an empty path: name a directory, or '.' for the working directory")
    if path == "~" or path.startswith("~/"):
        raise ValueError(f"{path!r}: '~' is replaced by shells, and not here: use os.path.expanduser(), or './~'")
    if scheme is not None:
        raise ValueError(f"a URI that begins with {scheme[0]!r}, without '//': write {scheme[0]}//... (file:///...)")


def located(place: Any) -> tuple[RetryingStorage, str]:
    """Like `resolve`, for a `ray.train.Checkpoint`, which knows its filesystem, a path object, or a URI.

    Raises:
        OSError, ValueError: as `resolve`.
    """
    if hasattr(place, "filesystem") and hasattr(place, "path"):
        return RetryingStorage(PyarrowStorage(with_timeouts(place.filesystem))), str(place.path)
    return resolve(os.fspath(place))


def filesystem_of(storage: Storage) -> pyarrow.fs.FileSystem | None:
    """The filesystem below `storage`, or below the storage that it wraps; `None` for a storage of another kind."""
    filesystem = getattr(getattr(storage, "inner", storage), "filesystem", None)
    return filesystem if isinstance(filesystem, pyarrow.fs.FileSystem) else None


def with_timeouts(filesystem: pyarrow.fs.FileSystem) -> pyarrow.fs.FileSystem:
    """`filesystem`; or, if it is on S3 or GCS or a directory there, one like it that gives up on requests in time.

    On S3, the returned one also writes a small file in one request, instead of five.
    """
    if isinstance(filesystem, pyarrow.fs.SubTreeFileSystem):
        return pyarrow.fs.SubTreeFileSystem(filesystem.base_path, with_timeouts(filesystem.base_fs))
    if filesystem.type_name == "gcs":
        return _with_retry_limit(filesystem)
    if not isinstance(filesystem, pyarrow.fs.S3FileSystem):
        return filesystem
    # Pickling keeps everything of a filesystem except the retry strategy, and `from_uri` set the default one.
    rebuild, (options,) = filesystem.__reduce__()
    return rebuild(
        {
            **options,
            "allow_delayed_open": True,
            "connect_timeout": options["connect_timeout"] if options["connect_timeout"] > 0 else CONNECT_TIMEOUT_S,
            "request_timeout": options["request_timeout"] if options["request_timeout"] > 0 else REQUEST_TIMEOUT_S,
        }
    )


def _with_retry_limit(filesystem: pyarrow.fs.FileSystem) -> pyarrow.fs.FileSystem:
    """A GCS filesystem like `filesystem` that retries for seconds, not for minutes.

    It makes the first request for a file's bytes while it holds the GIL: as long as it retries that request, no other
    thread of the process runs, and none of our deadlines works.
    """
    rebuild, (options,) = filesystem.__reduce__()
    return rebuild({**options, "retry_time_limit": options["retry_time_limit"] or timedelta(seconds=REQUEST_TIMEOUT_S)})


def below(uri: str, name: str) -> str:
    """The URI of `name` in directory `uri`; the query, after a "?", configures the storage, and stays last."""
    if "://" not in uri:
        return posixpath.join(uri, name)
    path, question, query = uri.partition("?")
    return posixpath.join(path, name) + question + query
