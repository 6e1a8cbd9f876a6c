"""The metrics, and what a save or a restore adds to them. Samples are made by pure functions; `tell` passes them on.

`docs/observability.md` is this list for people, and `docs/grafana` draws it; tests compare all three.

Rank 0 speaks for all ranks: its phases end when the slowest rank is there. What only a rank itself knows is tagged with
the rank: one series per rank.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from ray_stateful.ray_meters import RANK, Meter, Sample, emit
from ray_stateful.report import ResumeReport, SaveReport
from ray_stateful.runs import Run
from ray_stateful.stopwatch import Stopwatch
from ray_stateful.storage.base import Storage
from ray_stateful.storage.retries import RetryingStorage

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)

SAVE_SECONDS = Meter(
    name="stateful_save_seconds",
    kind="histogram",
    unit="seconds",
    help="From the beginning of a save to its commit.",
    boundaries=_SECONDS,
)
# A counter, because the sums of Ray's histograms are only approximate.
SAVE_PHASE_SECONDS = Meter(
    name="stateful_save_phase_seconds",
    kind="counter",
    unit="seconds",
    help="Time that committed saves spent, by phase.",
    tags=("phase",),
)
SAVE_STALL_SECONDS = Meter(
    name="stateful_save_stall_seconds",
    kind="counter",
    unit="seconds",
    help="Time that training stood still for saves, failed ones included.",
)
RANK_WRITE_SECONDS = Meter(
    name="stateful_rank_write_seconds",
    kind="gauge",
    unit="seconds",
    help="Time that the last save took this rank to write its own files.",
    tags=(RANK,),
)
WRITTEN_BYTES = Meter(
    name="stateful_written_bytes",
    kind="counter",
    unit="bytes",
    help="Bytes of committed checkpoints, of all ranks.",
)
SAVE_BYTES_PER_SECOND = Meter(
    name="stateful_save_bytes_per_second",
    kind="gauge",
    unit="bytes per second",
    help="Bytes of the last checkpoint over the time until the slowest rank had written its files.",
)
LAST_COMMIT_TIMESTAMP = Meter(
    name="stateful_last_commit_timestamp_seconds",
    kind="gauge",
    unit="seconds since 1970",
    help="When the newest checkpoint was committed that was saved or restored; its age is time() minus this.",
)
LAST_COMMIT_STEP = Meter(
    name="stateful_last_commit_step",
    kind="gauge",
    unit="step",
    help="Optimizer steps completed in the newest checkpoint that was saved or restored.",
)
FAILED_SAVES = Meter(
    name="stateful_failed_saves",
    kind="counter",
    unit="saves",
    help="Saves that failed, by the phase they failed in.",
    tags=("phase",),
)
STORAGE_RETRIES = Meter(
    name="stateful_storage_retries",
    kind="counter",
    unit="retries",
    help="Storage operations that failed in passing and were tried again, by operation.",
    tags=(RANK, "operation"),
)
RESTORE_SECONDS = Meter(
    name="stateful_restore_seconds",
    kind="histogram",
    unit="seconds",
    help="From opening the checkpoint that was restored to the end of loading it.",
    boundaries=_SECONDS,
)
READ_BYTES = Meter(
    name="stateful_read_bytes",
    kind="counter",
    unit="bytes",
    help="Bytes of tensors that restores read from storage, on all ranks.",
)
RESTORE_BYTES_PER_SECOND = Meter(
    name="stateful_restore_bytes_per_second",
    kind="gauge",
    unit="bytes per second",
    help="Bytes that the last restore read, on all ranks, over its time.",
)
READ_AMPLIFICATION = Meter(
    name="stateful_read_amplification_ratio",
    kind="gauge",
    unit="ratio",
    help="Bytes that the last restore read over those of them that were needed.",
)
REJECTED_CHECKPOINTS = Meter(
    name="stateful_rejected_checkpoints",
    kind="counter",
    unit="checkpoints",
    help="Checkpoints that restores could not use, so that an older one was taken, or none.",
)
LOST_STEPS = Meter(
    name="stateful_lost_steps",
    kind="counter",
    unit="steps",
    help="Steps between the checkpoints that were restored and the newer ones that could not be used.",
)
FAILED_RESTORES = Meter(
    name="stateful_failed_restores",
    kind="counter",
    unit="restores",
    help="Restores that ended with an error.",
)

METERS = (
    SAVE_SECONDS,
    SAVE_PHASE_SECONDS,
    SAVE_STALL_SECONDS,
    RANK_WRITE_SECONDS,
    WRITTEN_BYTES,
    SAVE_BYTES_PER_SECOND,
    LAST_COMMIT_TIMESTAMP,
    LAST_COMMIT_STEP,
    FAILED_SAVES,
    STORAGE_RETRIES,
    RESTORE_SECONDS,
    READ_BYTES,
    RESTORE_BYTES_PER_SECOND,
    READ_AMPLIFICATION,
    REJECTED_CHECKPOINTS,
    LOST_STEPS,
    FAILED_RESTORES,
)


def of_save(report: SaveReport, rank: int) -> list[Sample]:
    """What a committed save adds, on this rank."""
    phases = report.seconds_by_phase
    samples = [Sample(RANK_WRITE_SECONDS, phases.get("write", 0.0), {RANK: str(rank)})]
    if rank != 0:
        return samples
    samples += [Sample(SAVE_PHASE_SECONDS, took_s, {"phase": phase}) for phase, took_s in phases.items()]
    written_s = phases.get("write", 0.0) + phases.get("wait", 0.0)
    if written_s > 0:
        samples.append(Sample(SAVE_BYTES_PER_SECOND, report.num_bytes / written_s))
    return [
        *samples,
        Sample(SAVE_SECONDS, report.seconds),
        Sample(SAVE_STALL_SECONDS, report.stalled_s),
        Sample(WRITTEN_BYTES, report.num_bytes),
        Sample(LAST_COMMIT_TIMESTAMP, report.created_s),
        Sample(LAST_COMMIT_STEP, report.step),
    ]


def of_failed_save(phase: str, clock: Stopwatch, rank: int) -> list[Sample]:
    """What a save that failed in `phase` adds, on this rank."""
    if rank != 0:
        return []
    return [Sample(FAILED_SAVES, 1, {"phase": phase}), *of_stall(clock, rank)]


def of_stall(clock: Stopwatch, rank: int) -> list[Sample]:
    """How long training stood still for a failed save since the last call: it may go on waiting after the failure."""
    return [] if rank != 0 else [Sample(SAVE_STALL_SECONDS, clock.take_stalled_s())]


def of_restore(report: ResumeReport, rank: int) -> list[Sample]:
    """What a restore adds, on this rank."""
    if rank != 0:
        return []
    read = report.statistics
    samples = [
        Sample(RESTORE_SECONDS, report.seconds),
        Sample(READ_BYTES, read.bytes_read),
        Sample(REJECTED_CHECKPOINTS, len(report.rejected)),
        Sample(LOST_STEPS, report.steps_lost),
    ]
    if not report.initial:
        samples.append(Sample(LAST_COMMIT_STEP, report.step))
    if report.seconds > 0:
        samples.append(Sample(RESTORE_BYTES_PER_SECOND, read.bytes_read / report.seconds))
    if read.bytes_wanted > 0:
        samples.append(Sample(READ_AMPLIFICATION, read.bytes_read / read.bytes_wanted))
    if report.created_s > 0 and not report.initial:
        samples.append(Sample(LAST_COMMIT_TIMESTAMP, report.created_s))
    return samples


def of_failed_restore(rejected: Mapping[str, str], rank: int) -> list[Sample]:
    """What a restore that ended with an error adds, on this rank."""
    return [] if rank != 0 else [Sample(FAILED_RESTORES, 1), Sample(REJECTED_CHECKPOINTS, len(rejected))]


def of_retries(storage: Storage, rank: int) -> list[Sample]:
    """The retries of `storage` since this was last called."""
    retries = storage.take_retries() if isinstance(storage, RetryingStorage) else {}
    return [
        Sample(STORAGE_RETRIES, number, {RANK: str(rank), "operation": operation})
        for operation, number in sorted(retries.items())
    ]


def tell(run: Run, storage: Storage, rank: int, samples: list[Sample]) -> None:
    """Pass `samples` of `run` on to Ray, together with the retries of `storage`. Local, and never raises."""
    emit([*samples, *of_retries(storage, rank)], posixpath.basename(run.path.rstrip("/")))
