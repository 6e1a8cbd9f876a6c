"""Reports a checkpoint to whoever counts the run's checkpoints: all ranks report it, or none does."""

from __future__ import annotations

import logging
import posixpath
from typing import Any

from ray_stateful.errors import ReportFailed
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.report import ResumeReport
from ray_stateful.runs import Run

logger = logging.getLogger(__name__)


def report(run: Run, prepared: Any, name: str, ranks: Ranks) -> None:
    """Report a checkpoint. Collective; raises `ReportFailed` on every rank."""
    outcome = Outcome()
    with outcome.catch():
        run.report(prepared, name)
    failures = ranks.failures("report", outcome)
    if failures:
        path = posixpath.join(run.path, name)
        raise ReportFailed(path, {rank: failure.text for rank, failure in failures.items()}) from outcome.error


def report_late(run: Run, restored: ResumeReport, ranks: Ranks) -> None:
    """Report the restored checkpoint, because the workers that committed it died before they could. Collective.

    Otherwise `Result.checkpoint` would be an older one, and nobody would ever delete this one.
    """
    outcome, prepared = Outcome(), None
    with outcome.catch():
        # Its metrics were lost with the workers that had them.
        prepared = run.prepare_report({"step": restored.step})
    failures = ranks.failures("prepare a report", outcome)
    if not failures:
        report(run, prepared, restored.checkpoint, ranks)
    if ranks.rank == 0:
        why = "; ".join(f"rank {rank}: {failure.text}" for rank, failure in sorted(failures.items()))
        logger.info(
            "%s was committed but never reported: %s",
            restored.checkpoint,
            f"reporting it now failed: {why}" if why else "it has been reported now",
        )
