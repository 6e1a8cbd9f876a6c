"""A run: the directory its checkpoints are in, and whom to tell about them.

This is all that `checkpoint.py` needs to know of its surroundings. Inside a Ray Train worker the run is a
`ray_stateful.ray_train.RayRun`; elsewhere it is a `DirectoryRun`: a directory, and nobody to tell.
"""

from __future__ import annotations

import logging
import math
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from ray_stateful.errors import DamagedCheckpoint
from ray_stateful.format import layout
from ray_stateful.format.layout import CheckpointName
from ray_stateful.format.manifest import Manifest
from ray_stateful.storage import opening
from ray_stateful.storage.base import Storage
from ray_stateful.storage.retries import RetryingStorage

logger = logging.getLogger(__name__)


class Run(Protocol):
    """Where checkpoints of this run are, and who keeps count of them.

    `path` is the run's directory on `storage`; a checkpoint is a directory directly in it.
    """

    @property
    def storage(self) -> Storage: ...

    @property
    def path(self) -> str: ...

    @property
    def uri(self) -> str: ...

    def prepare_report(self, metrics: dict[str, Any]) -> Any:
        """Make and check what `report` will be given. Called on every rank before anything is written.

        Raises:
            ValueError: a metric is not a plain JSON value; names it.
            RuntimeError: this process can't report any more.
        """
        ...

    def report(self, prepared: Any, name: str) -> None:
        """Report checkpoint `name` to whoever counts checkpoints. Collective: all ranks call it, or none does."""
        ...

    def candidates(self) -> Iterable[str]:
        """Names of checkpoints to resume from, newest first; may be looked up lazily. Called on rank 0 alone."""
        ...

    def never_reported(self, name: str) -> bool:
        """Whether somebody counts the checkpoints of this run but was never told of `name`. Called on rank 0 alone."""
        ...

    def tracked(self) -> frozenset[str] | None:
        """Names of checkpoints that somebody else counts and deletes; `None` if nobody does. Called on rank 0 alone."""
        ...


@dataclass(frozen=True, slots=True)
class DirectoryRun:
    """A run outside Ray Train, or in its local mode: the checkpoints of a directory, found by listing it."""

    storage: Storage
    path: str
    uri: str

    def prepare_report(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics

    def report(self, prepared: dict[str, Any], name: str) -> None:
        """Does nothing: nobody counts these checkpoints."""

    def candidates(self) -> Iterator[str]:
        directories = self.storage.directories(self.path)
        return committed(self.storage, self.path, filter(None, map(layout.parse_name, directories)))

    def never_reported(self, name: str) -> bool:
        return False

    def tracked(self) -> None:
        return None


def committed(storage: Storage, path: str, names: Iterable[CheckpointName]) -> Iterator[str]:
    """Those of `names` in directory `path` that are committed, newest first.

    Newest means the highest step and, within a step, the latest commit: a step has two if the run went back on purpose
    or saved it twice, and their names sort at random. Steps are looked at one by one: usually the first is enough, and
    there may be hundreds.
    """
    for _, of_step in groupby(sorted(names, reverse=True), key=lambda name: name.step):
        there = [str(name) for name in of_step]
        there = [name for name in there if layout.MANIFEST in storage.sizes(posixpath.join(path, name))]
        if len(there) > 1:
            there.sort(key=lambda name: _created_s(storage, posixpath.join(path, name)), reverse=True)
        yield from there


def _created_s(storage: Storage, path: str) -> float:
    try:
        return Manifest.from_json(opening.read_manifest(storage, path), path).created_s
    except (DamagedCheckpoint, FileNotFoundError):
        # Sorted first: whoever opens it will refuse it, and say so. Sorted last, it would be skipped silently.
        return math.inf


def within(run: Run, timeout_s: float) -> Run:
    """The same run, on a storage that gives up before peers who wait for `timeout_s` do."""
    if not isinstance(run.storage, RetryingStorage) or not is_dataclass(run):
        return run
    limited: Run = replace(run, storage=run.storage.within(timeout_s))
    return limited
