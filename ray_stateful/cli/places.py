"""Arguments that name places: turns a path or URI into a storage and a path on it, a checkpoint, or a run."""

from __future__ import annotations

import posixpath
from contextlib import suppress

import click
import pyarrow.fs

from ray_stateful.errors import DamagedCheckpoint, StorageError
from ray_stateful.ray_train import SNAPSHOT, RayRun
from ray_stateful.storage import opening
from ray_stateful.storage.credentials import without_credentials
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.storage.uris import resolve

# Short, as a person is waiting: a store that is down for longer is reported, not waited for.
_POLICY = RetryPolicy(budget_s=15.0)


def place(uri: str) -> tuple[RetryingStorage, str]:
    """The storage of `uri`, and the path on it.

    Raises:
        ValueError, OSError: no such filesystem.
    """
    storage, path = resolve(uri)
    return RetryingStorage(storage.inner, _POLICY), path.rstrip("/") or "/"


def open_checkpoint(uri: str) -> tuple[RetryingStorage, OpenCheckpoint]:
    """The checkpoint at `uri`, from its manifest and index alone: two reads.

    Raises:
        DamagedCheckpoint: there is none.
    """
    storage, path = place(uri)
    try:
        raw = opening.fetch_description(storage, path)
    except DamagedCheckpoint:
        refuse_missing_bucket(storage, path)
        raise
    return storage, opening.parse(raw)


def refuse_missing_bucket(storage: RetryingStorage, path: str) -> None:
    """Refuse a path whose bucket does not exist: for such a path a store only answers that nothing is there.

    Raises:
        StorageError: there is no such bucket.
    """
    filesystem = getattr(storage.inner, "filesystem", None)
    if not isinstance(filesystem, pyarrow.fs.FileSystem) or filesystem.type_name not in ("abfs", "gcs", "s3"):
        return
    bucket = path.lstrip("/").partition("/")[0]
    # An error says nothing: whoever may not ask for the bucket may still be allowed to read in it.
    with suppress(OSError):
        if filesystem.get_file_info(bucket).type == pyarrow.fs.FileType.NotFound:
            raise StorageError("find", bucket, "the bucket does not exist")


class ListedRun(RayRun):
    """A run as it is found on storage, without a Ray worker around it."""

    __slots__ = ()

    def known_to_ray(self) -> frozenset[str] | None:
        """What Ray counts; `None` where it has no list."""
        if SNAPSHOT not in self.storage.sizes(self.path):
            return None
        try:
            return self.tracked()
        except StorageError as error:
            # Ray rewrites the file in place, so that a reader may see half of it.
            click.echo(f"note: which checkpoints Ray counts is not known: {error}", err=True)
            return None


def open_run(uri: str) -> ListedRun:
    """The run at `uri`.

    Raises:
        StorageError: there is no such directory.
    """
    storage, path = place(uri)
    filesystem = getattr(storage.inner, "filesystem", None)
    assert isinstance(filesystem, pyarrow.fs.FileSystem)
    uri = without_credentials(uri)
    run = ListedRun(storage, path, uri, filesystem)
    if not run.storage.directories(path) and not run.storage.sizes(path):
        refuse_missing_bucket(storage, path)
        raise StorageError("list", path, "no such directory, or an empty one; a run is at <storage_path>/<run name>")
    if "manifest.json" in run.storage.sizes(path):
        raise ValueError(f"{uri} is a checkpoint, not a run; its run is {posixpath.dirname(uri.rstrip('/'))}")
    return run
