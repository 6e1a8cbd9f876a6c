"""Initial weights: what the models of a run begin from while it has no checkpoint of its own. All else starts fresh.

The steps are those of a restore, over the models alone: opened once on rank 0, matched before anything is touched,
each rank reading the bytes of its own shards.
"""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_stateful import meters, parts, restoring
from ray_stateful.candidates import Rejected
from ray_stateful.errors import DamagedCheckpoint, NoInitialWeights, StateMismatch
from ray_stateful.format.checksums import digest_number
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.report import PartReport, ResumeReport
from ray_stateful.runs import DirectoryRun, Run
from ray_stateful.stateful_wrappers import ModelState
from ray_stateful.storage import weights
from ray_stateful.storage.credentials import without_credentials
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.uris import located


def check(state: parts.State, checkpoint: Any) -> None:
    """Refuse a call in which initial weights make no sense.

    Raises:
        ValueError: there is no model in `state`; or a checkpoint is named, so that the weights would never be used.
    """
    if checkpoint is not None:
        raise ValueError(
            f"both checkpoint ({str(checkpoint)!r}) and initial are given; initial is for a run without a checkpoint, "
            "and is not used where one is named, so leave one of them out"
        )
    if not _models(state):
        raise ValueError(
            f"initial is given, but the state has no ModelState to load the weights into (it has {', '.join(state)}); "
            "wrap the model in one"
        )


def digest(source: Any) -> int:
    """63 bits that identify a checkpoint or weights, to be compared between ranks; 0 for `None`."""
    return 0 if source is None else digest_number(_place(source).encode()) | 1


def refuse_different(argument: str, source: Any, digests: Sequence[int]) -> None:
    """Refuse a `source` that differs between ranks: they would wait for each other in different collectives.

    Args:
        argument: What the caller calls `source`.

    Raises:
        ValueError: on every rank.
    """
    others = sorted(rank for rank, other in enumerate(digests) if other != digests[0])
    if others:
        mine = None if source is None else _place(source)
        raise ValueError(
            f"{argument} (here {mine!r}) is not the same on ranks {others} as on rank 0; give all ranks the same"
        )


def load(
    state: parts.State, source: Any, run: Run, ranks: Ranks, limits: ReadLimits | None, verify: str
) -> ResumeReport:
    """Give the models of `state` their initial weights. Collective.

    Args:
        source: Where they are, as for `ray_stateful.restore`.
        run: The run that begins from them.
        verify: As for `ray_stateful.restore`; weights without checksums are loaded unverified, and the report says so.

    Raises:
        StateMismatch: on every rank, before anything is loaded; lists all that does not fit.
        NoInitialWeights: on every rank; there are no weights, or they can't be opened, or are damaged.
        RankFailed: on every rank; some rank could not read the tensors, for a reason other than damage.
    """
    began = time.monotonic()
    place, models = _place(source), _models(state)
    theirs, opened = _open(source, place, ranks)
    if not weights.has_parts(opened):
        if len(models) > 1:
            problem = f"weights of one model, and the state has {len(models)} ({', '.join(sorted(models))}): "
            raise StateMismatch(place, (problem + "begin from a checkpoint with parts of these names",))
        opened = weights.below(opened, next(iter(models)))
    views = {name: model.while_initial() for name, model in models.items()}
    if opened.manifest is None:
        verify = "touched"
    try:
        report = restoring.restore_opened(views, theirs, opened, ranks, limits, verify, {}, set(), initial=True)
    except Rejected as error:
        raise NoInitialWeights(place, str(error)) from error
    finally:
        # The retries of this storage. `checkpoint.restore` counts those of the run's own storage, a different one.
        meters.tell(run, theirs.storage, ranks.rank, [])
    fresh = [PartReport(name=name, outcome="fresh", details=("as built",)) for name in state if name not in models]
    return replace(
        report,
        checkpoint=place,
        step=0,
        samples=0,
        parts=tuple(sorted((*report.parts, *fresh), key=lambda part: part.name)),
        seconds=time.monotonic() - began,
        # Dropped: they are about other parts of that checkpoint, which nobody asked for.
        notes=(),
        initial=True,
    )


def _models(state: parts.State) -> Mapping[str, ModelState]:
    return {name: part for name, part in state.items() if isinstance(part, ModelState)}


def _place(source: Any) -> str:
    """Where `source` is, as text that is the same on every rank; the text of a filesystem object would not be."""
    if hasattr(source, "filesystem") and hasattr(source, "path"):
        return str(source.path)
    return without_credentials(os.fspath(source))


def _open(source: Any, place: str, ranks: Ranks) -> tuple[Run, OpenCheckpoint]:
    """Read headers once, on rank 0, and decode the same bytes on every rank. Later each rank uses storage itself."""
    raw: Any = None
    outcome = Outcome()
    with outcome.catch():
        storage, path = located(source)
        storage = storage.within(ranks.timeout_s)
        raw = weights.fetch(storage, path) if ranks.rank == 0 else None
    failures = ranks.failures("open the initial weights", outcome)
    if failures:
        why = "; ".join(f"rank {rank}: {failure.text}" for rank, failure in sorted(failures.items()))
        raise NoInitialWeights(place, why) from outcome.error
    raw = ranks.broadcast("share the headers", raw)
    try:
        opened = weights.parse(raw)
    except DamagedCheckpoint as error:
        raise NoInitialWeights(place, str(error)) from error
    return DirectoryRun(storage, posixpath.dirname(opened.path), place), opened
