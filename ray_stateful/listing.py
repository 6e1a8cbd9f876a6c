"""The checkpoints of a run, as a listing shows them. No torch."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_stateful.errors import DamagedCheckpoint, StorageError
from ray_stateful.format import layout
from ray_stateful.format.manifest import Manifest
from ray_stateful.storage import opening
from ray_stateful.storage.base import Storage

_NUM_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One directory of a run. `created_s` is UNIX time in seconds; `num_bytes` the size of all files there.

    `known_to_ray` is `None` where Ray keeps no list. `problem` is set if the manifest can't be read or names files that
    are missing or of a different size, and if the directory can't be looked at.
    """

    name: str
    step: int
    committed: bool
    num_bytes: int
    known_to_ray: bool | None
    world_size: int | None = None
    created_s: float | None = None
    problem: str | None = None

    @property
    def is_orphan(self) -> bool:
        """Neither committed nor known to Ray: left by a save that failed, or that is still in progress."""
        return not self.committed and not self.known_to_ray and self.problem is None


def entries(storage: Storage, path: str, tracked: Set[str] | None) -> list[Entry]:
    """The directories in `path` that have a checkpoint's name, the newest last.

    Costs one request, and at most two for each directory.

    Args:
        tracked: Names in Ray's list; `None` if there is no list.
    """
    names = sorted(name for name in storage.directories(path) if layout.parse_name(name) is not None)
    with ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="checkpoint-list") as pool:
        found = pool.map(lambda name: _entry(storage, path, name, tracked), names)
    # The reverse of `runs.committed`: a restore tries the last one first, also if its manifest can't be read.
    return sorted(found, key=lambda entry: (entry.step, _created_s(entry)))


def _created_s(entry: Entry) -> float:
    if entry.created_s is not None:
        return entry.created_s
    return math.inf if entry.committed else 0.0


def _entry(storage: Storage, path: str, name: str, tracked: Set[str] | None) -> Entry:
    parsed = layout.parse_name(name)
    assert parsed is not None
    directory = posixpath.join(path, name)
    sizes: Mapping[str, int] = {}
    manifest, problem = None, None
    committed = False
    try:
        sizes = storage.sizes(directory)
        committed = layout.MANIFEST in sizes
        if committed:
            manifest = Manifest.from_json(opening.read_manifest(storage, directory), layout.MANIFEST)
    except DamagedCheckpoint as error:
        problem = error.found
    except FileNotFoundError:
        # Ray may delete the oldest checkpoints while we look.
        committed = False
    except StorageError as error:
        # A problem of this one only: the others are still worth a line each.
        problem = f"can't be looked at: {error.cause}"
    if manifest is not None:
        wrong = [file for file, stored in manifest.files.items() if sizes.get(file) != stored.size]
        problem = f"{len(wrong)} file(s) missing or of the wrong size, {wrong[0]} among them" if wrong else None
    return Entry(
        name=name,
        step=parsed.step,
        committed=committed,
        num_bytes=sum(sizes.values()),
        known_to_ray=None if tracked is None else name in tracked,
        world_size=manifest.world_size if manifest else None,
        created_s=manifest.created_s if manifest else None,
        problem=problem,
    )
