"""Orphans: checkpoint directories that no save will finish and that nobody counts. Finds and deletes them.

A save that died leaves files without a manifest; Ray never heard of them and never deletes them. Nothing else is ever
deleted here. A directory stays if it is committed, counted by Ray, recently changed, the newest of all, not named like
a checkpoint, or if it holds anything that no save writes.
"""

from __future__ import annotations

import logging
import os
import posixpath
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import pyarrow.fs

from ray_stateful.errors import CheckpointError, StorageError
from ray_stateful.format import layout
from ray_stateful.runs import Run
from ray_stateful.storage.base import Storage
from ray_stateful.storage.pyarrow import local_root, os_errors
from ray_stateful.storage.uris import filesystem_of

logger = logging.getLogger(__name__)

# Seconds; longer than any save. An object is invisible until its upload ends, so a directory in use may look old.
DEFAULT_AGE_S = 24 * 3600.0

NewestChange = Callable[[Storage, str], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A directory to be deleted: what lies in it, and when it was last changed, in seconds since 1970."""

    name: str
    num_bytes: int
    num_files: int
    changed_s: float


def newest_change(storage: Storage, path: str) -> float | None:
    """When anything in directory `path` was last written, in seconds since 1970; `None` if storage does not tell.

    Includes temporary files that are still being written, which a listing of the checkpoint does not show.
    """
    filesystem = filesystem_of(storage)
    if filesystem is None:
        return None
    try:
        with os_errors(path):
            infos = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
            infos.append(filesystem.get_file_info(path))
    except OSError as error:
        raise StorageError("list", path, str(error)) from error
    found = [info.mtime_ns / 1e9 for info in infos if info.mtime_ns is not None]
    return max(found, default=None)


def find(
    run: Run,
    *,
    older_than_s: float = DEFAULT_AGE_S,
    now_s: float | None = None,
    changed: NewestChange = newest_change,
) -> list[Orphan]:
    """The orphans of a run, the oldest step first.

    Args:
        older_than_s: Seconds since anything in the directory last changed; a younger directory stays.
        changed: Tells when anything in a directory last changed; a directory of unknown age (`None`) stays.

    Raises:
        StorageError: Ray's list of checkpoints can't be read, so nothing may be deleted.
    """
    now_s = time.time() if now_s is None else now_s
    tracked = run.tracked() or frozenset()
    names = sorted(filter(None, map(layout.parse_name, run.storage.directories(run.path))))
    found = []
    # The newest directory stays, whatever is in it: it may belong to a save that is still running.
    for name in map(str, names[:-1]):
        if name in tracked:
            continue
        path = posixpath.join(run.path, name)
        sizes = run.storage.sizes(path)
        if layout.MANIFEST in sizes:
            continue
        changed_s = changed(run.storage, path)
        if changed_s is None or now_s - changed_s < older_than_s:
            continue
        if not _is_left_by_a_save(run.storage, path, sizes):
            continue
        found.append(Orphan(name=name, num_bytes=sum(sizes.values()), num_files=len(sizes), changed_s=changed_s))
    return found


def _is_left_by_a_save(storage: Storage, path: str, sizes: Mapping[str, int]) -> bool:
    """Whether a directory that lists no manifest holds only what a save writes; does not rely on the listing alone."""
    if (
        storage.directories(path)
        or not all(map(layout.is_file_of_checkpoint, sizes))
        or _has_other_than_files(storage, path)
    ):
        return False
    try:
        # A store's listing may lag behind; a read by name finds a manifest that was written just now.
        storage.read(posixpath.join(path, layout.MANIFEST), 0, 1)
    except FileNotFoundError:
        return True
    return False


def _has_other_than_files(storage: Storage, path: str) -> bool:
    """Whether a directory on this machine has links, pipes or the like in it, which a listing of files leaves out."""
    filesystem = filesystem_of(storage)
    root = None if filesystem is None else local_root(filesystem)
    if root is None:
        return False
    where = os.path.join(root, path.lstrip("/")) if root else path
    with suppress(FileNotFoundError), os.scandir(where) as entries:
        return any(not entry.is_file(follow_symlinks=False) for entry in entries)
    return False


def delete(
    run: Run, orphans: list[Orphan], *, changed: NewestChange = newest_change
) -> tuple[list[Orphan], dict[str, str]]:
    """Check each of `orphans` once more, then delete it; one that has changed since it was found stays.

    Returns:
        The orphans that were deleted; and for each of the others, by name, why it was kept.
    """
    tracked = run.tracked() or frozenset()
    deleted, kept = [], {}
    for orphan in orphans:
        path = posixpath.join(run.path, orphan.name)
        if layout.parse_name(orphan.name) is None:
            kept[orphan.name] = "not the name of a checkpoint"
        elif orphan.name in tracked:
            kept[orphan.name] = "Ray counts it now"
        elif layout.MANIFEST in (sizes := run.storage.sizes(path)):
            kept[orphan.name] = "was committed meanwhile"
        elif not _is_left_by_a_save(run.storage, path, sizes):
            kept[orphan.name] = "contains something that no save writes"
        elif changed(run.storage, path) != orphan.changed_s:
            kept[orphan.name] = "somebody is writing to it"
        else:
            try:
                run.storage.delete(path)
            except StorageError as error:
                kept[orphan.name] = str(error)
            else:
                deleted.append(orphan)
    return deleted, kept


def collect(run: Run, older_than_s: float = DEFAULT_AGE_S) -> None:
    """Find and delete the orphans of a run, and log it; a failure of storage is logged as a warning, not raised."""
    try:
        deleted, kept = delete(run, find(run, older_than_s=older_than_s))
    except (CheckpointError, OSError) as error:
        logger.warning("orphans of run %s were not deleted: %s", run.uri, error)
        return
    for orphan in deleted:
        logger.info("deleted %s: never committed, %d files, %d bytes", orphan.name, orphan.num_files, orphan.num_bytes)
    for name, why in kept.items():
        logger.info("orphan %s was kept: %s", name, why)
