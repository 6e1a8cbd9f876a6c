"""Which checkpoints a restore may begin from, newest first: rank 0 asks storage, and all ranks get the answer.

A checkpoint that turns out to be damaged is rejected by all ranks together.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_stateful import ray_train
from ray_stateful.errors import CheckpointError, RankFailed
from ray_stateful.format import layout
from ray_stateful.ranks import Failure, Outcome, Ranks
from ray_stateful.runs import DirectoryRun, Run, within
from ray_stateful.storage import opening
from ray_stateful.storage.uris import located

logger = logging.getLogger(__name__)


class Rejected(CheckpointError):
    """A checkpoint can't be used; raised on every rank, with the same reason."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __str__(self) -> str:
        return self.why


def agree(phase: str, failures: Mapping[int, Failure]) -> None:
    """Damage on any rank rejects the checkpoint on all of them; any other failure ends the restore."""
    if not failures:
        return
    if all(failure.damage for failure in failures.values()):
        raise Rejected("; ".join(f"rank {rank}: {failure.text}" for rank, failure in sorted(failures.items())))
    raise RankFailed(f"{phase} the checkpoint", {rank: failure.text for rank, failure in failures.items()})


def find(run: Run | str | os.PathLike[str] | None, checkpoint: Any, timeout_s: float) -> tuple[Run, Run, str | None]:
    """The run that is restored; the run to look in; and the name of `checkpoint` there, `None` for the newest. Local.

    A checkpoint that is not called by its name alone may be anywhere. Then a `run` is only what metrics are of, and
    outside of Ray none need be given: that of the directory the checkpoint is in does as well.

    Raises:
        OSError, ValueError: its storage can't be reached, or is of an unknown kind; or there is no run to look in.
    """
    if checkpoint is None or layout.parse_name(str(checkpoint)) is not None:
        found = within(ray_train.find_run(run), timeout_s)
        return found, found, None if checkpoint is None else str(checkpoint)
    storage, path = located(checkpoint)
    directory, name = posixpath.split(path.rstrip("/"))
    there = within(DirectoryRun(storage, directory, directory), timeout_s)
    # Not `find_run` for the worker's own: it refuses a worker without a process group, which may well only evaluate.
    found = ray_train.current_run() or there if run is None else ray_train.find_run(run)
    return within(found, timeout_s), there, name


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint to try: the bytes that describe it, or why rank 0 could not read them.

    `to_report` says that the workers that committed it died before they had reported it. It is false for a checkpoint
    that was asked for by name, which need not be the newest of the run.
    """

    name: str
    described: opening.RawCheckpoint | Failure
    to_report: bool = False


def newest_first(run: Run, only: str | None, ranks: Ranks) -> Iterator[Candidate]:
    """Which checkpoints to try, newest first: those of `run`, or only the one named `only`.

    Each step of the iterator is collective: rank 0 asks storage, and all ranks get its answer, the same bytes.

    Raises:
        RankFailed: at any step, on every rank; rank 0 could not find out which checkpoints there are.
    """
    names: Iterator[str] | None = None if only is None else iter([only])
    while True:
        answer: Any = None
        outcome = Outcome()
        with outcome.catch():
            if ranks.rank == 0:
                names = iter(run.candidates()) if names is None else names
                name = next(names, None)
                if name is not None:
                    answer = Candidate(name, _describe(run, name), only is None and _is_to_report(run, name))
        if outcome.error is not None:
            answer = Failure.of(outcome.error)
        received = ranks.broadcast("look for checkpoints", answer)
        if isinstance(received, Failure):
            raise RankFailed("look for checkpoints", {0: received.text}) from outcome.error
        if received is None:
            return
        assert isinstance(received, Candidate)
        yield received


def _is_to_report(run: Run, name: str) -> bool:
    outcome, found = Outcome(), False
    with outcome.catch():
        found = run.never_reported(name)
    if outcome.error is not None:
        logger.warning(
            "%s is not reported now, as whether it was before could not be found out: %s", name, outcome.error
        )
    return found


def _describe(run: Run, name: str) -> opening.RawCheckpoint | Failure:
    outcome = Outcome()
    with outcome.catch():
        return opening.fetch(run.storage, posixpath.join(run.path, name))
    assert outcome.error is not None
    return Failure.of(outcome.error)
