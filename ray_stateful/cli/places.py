"""Arguments that are places: from a path or URI to a storage and a path on it, and a run with what Ray knows of it."""

from __future__ import annotations

import posixpath

import pyarrow.fs

from ray_stateful.errors import StorageError
from ray_stateful.ray_train import SNAPSHOT, RayRun
from ray_stateful.storage import opening
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.storage.uris import resolve

# A person waits in front of it: a store that is down for longer is reported, not waited for.
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
    return storage, opening.parse(opening.fetch_description(storage, path))


class ListedRun(RayRun):
    """A run as it is found on storage, without a Ray worker around it."""

    __slots__ = ()

    def known_to_ray(self) -> frozenset[str] | None:
        """What Ray counts; `None` where it has no list."""
        if SNAPSHOT not in self.storage.sizes(self.path):
            return None
        return self.tracked()


def open_run(uri: str) -> ListedRun:
    """The run at `uri`.

    Raises:
        StorageError: there is no such directory.
    """
    storage, path = place(uri)
    filesystem = getattr(storage.inner, "filesystem", None)
    assert isinstance(filesystem, pyarrow.fs.FileSystem)
    run = ListedRun(storage, path, uri, filesystem)
    if not run.storage.directories(path) and not run.storage.sizes(path):
        raise StorageError("list", path, "no such directory, or an empty one; a run is at <storage_path>/<run name>")
    if "manifest.json" in run.storage.sizes(path):
        raise ValueError(f"{uri} is a checkpoint, not a run; its run is {posixpath.dirname(uri.rstrip('/'))}")
    return run
