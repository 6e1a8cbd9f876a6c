"""A run: the directory its checkpoints are in, and whom to tell about them.

`checkpoint.py` asks only this of its surroundings. Inside a Ray Train worker the answer is
`ray_stateful.ray_train.RayRun`; elsewhere it is a `DirectoryRun`: a directory, and nobody to tell.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol

from ray_stateful.format import layout
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
        """What `report` will be given, made and checked on every rank before anything is written.

        Raises:
            ValueError: a metric is not a plain JSON value; names it.
            RuntimeError: this process can't report any more.
        """
        ...

    def report(self, prepared: Any, name: str) -> None:
        """Tell whoever counts checkpoints of the one called `name`. Collective: all ranks call it, or none does."""
        ...

    def candidates(self) -> Iterable[str]:
        """Names of checkpoints to resume from, newest first; looked for as they are asked for. On rank 0 alone."""
        ...

    def tracked(self) -> frozenset[str] | None:
        """Names that somebody else counts, and deletes; `None` when nobody does. Called on rank 0 alone."""
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
        """Nobody counts."""

    def candidates(self) -> Iterator[str]:
        names = [name for name in self.storage.directories(self.path) if layout.parse_name(name) is not None]
        for name in sorted(names, reverse=True):
            # One by one: the newest is enough, as a rule, and there may be hundreds.
            if layout.MANIFEST in self.storage.sizes(posixpath.join(self.path, name)):
                yield name

    def tracked(self) -> None:
        return None


def within(run: Run, timeout_s: float) -> Run:
    """The same run, on a storage that gives up before peers who wait for `timeout_s` do."""
    if not isinstance(run.storage, RetryingStorage) or not is_dataclass(run):
        return run
    limited: Run = replace(run, storage=run.storage.within(timeout_s))
    return limited
