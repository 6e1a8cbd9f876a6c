"""The errors of this package, and nothing else.

    CheckpointError                   everything below
    ├── SaveFailed                    a save was not committed; raised on every rank
    ├── ReportFailed                  the checkpoint is committed, Ray was not told; raised on every rank
    ├── RestoreFailed                 nothing usable could be loaded; raised on every rank
    │   ├── StateMismatch             the state and the checkpoint do not match; nothing was touched
    │   ├── ResizeRefused             a part has no rule for a different number of workers; nothing was touched
    │   ├── NoIntactCheckpoint        the run has checkpoints, and none passed verification
    │   └── NoInitialWeights          the weights the run was to begin from are missing or can't be used
    ├── DamagedCheckpoint             one checkpoint does not hold what was written
    │   ├── UnknownFormat             written by a newer version, or by something else
    │   └── HostileCheckpoint         asks for what our writers never write: paths outside, code, absurd sizes
    ├── UnsupportedState              a value has no safe encoding; refused before anything is written
    ├── StorageError                  a storage operation failed and is not retried any more
    ├── RankFailed                    some rank failed in a phase that all ranks share
    ├── RankTimeout                   a rank did not arrive at a collective before its deadline
    ├── UnevenSteps                   ranks came to one decision, or one save, at different steps
    └── UnmatchedCalls                ranks made different calls at the same time

All errors survive pickling: Ray sends them from worker to driver. `BaseException.__new__` keeps the
positional arguments in `args`, and unpickling calls the class with them; so constructors here take
positional arguments, and leave `args` alone by overriding `__str__` instead of calling
`super().__init__(message)`.
"""

from __future__ import annotations

from ray_stateful.printable import printable

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "HostileCheckpoint",
    "NoInitialWeights",
    "NoIntactCheckpoint",
    "RankFailed",
    "RankTimeout",
    "ReportFailed",
    "ResizeRefused",
    "RestoreFailed",
    "SaveFailed",
    "StateMismatch",
    "StorageError",
    "UnevenSteps",
    "UnknownFormat",
    "UnmatchedCalls",
    "UnsupportedState",
]


def _per_rank(causes: dict[int, str]) -> str:
    return printable("\n".join(f"  rank {rank}: {cause}" for rank, cause in sorted(causes.items())))


class CheckpointError(Exception):
    """Base of every error this package raises on purpose."""


class SaveFailed(CheckpointError):
    """Some rank could not do its part, so the checkpoint was not committed.

    Raised on every rank, also where writing succeeded: a rank that went on alone would
    wait in `ray.train.report` for peers that never arrive.
    """

    def __init__(self, path: str, phase: str, causes: dict[int, str]) -> None:
        self.path, self.phase, self.causes = path, phase, causes

    def __str__(self) -> str:
        return (
            f"checkpoint {self.path!r} was not committed; {len(self.causes)} rank(s) failed to {self.phase}:\n"
            f"{_per_rank(self.causes)}"
        )


class ReportFailed(CheckpointError):
    """`ray.train.report` raised after the checkpoint was committed.

    The checkpoint is whole, but Ray's report counter is out of step: a further report from this worker group
    would wait for ever, so the run refuses it. Let the error end the workers and Ray restart them.
    """

    def __init__(self, path: str, causes: dict[int, str]) -> None:
        self.path, self.causes = path, causes

    def __str__(self) -> str:
        return (
            f"checkpoint {self.path!r} is committed, but could not be reported to Ray Train:\n"
            f"{_per_rank(self.causes)}\n"
            "let this error end the training function: a worker group that failed to report cannot report again"
        )


class RestoreFailed(CheckpointError):
    """Nothing was restored. Raised on every rank."""


class StateMismatch(RestoreFailed):
    """The state's keys, shapes or dtypes are not those of the checkpoint.

    Raised on every rank before anything is loaded; lists every mismatch.
    """

    def __init__(self, path: str, problems: tuple[str, ...]) -> None:
        self.path, self.problems = path, problems

    def __str__(self) -> str:
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        count = len(self.problems)
        found = f"the state does not match checkpoint {self.path!r} in {count} place(s); nothing was loaded"
        advice = (
            "build the state as it was saved; leave a part out of the state to go on without it; "
            "ModelState(strict=False) loads what fits"
        )
        return printable(f"{found}:\n{lines}\n{advice}")


class ResizeRefused(RestoreFailed):
    """A part of the state has one value per worker, and no rule for restoring it on a different number of workers.

    Raised on every rank before anything is loaded.
    """

    def __init__(self, part: str, saved_world_size: int, world_size: int, what_to_do: str) -> None:
        self.part, self.saved_world_size, self.world_size = part, saved_world_size, world_size
        self.what_to_do = what_to_do

    def __str__(self) -> str:
        return (
            f"part {self.part!r} was saved by {self.saved_world_size} workers and cannot be restored on "
            f"{self.world_size}; nothing was loaded: {self.what_to_do}"
        )


class NoIntactCheckpoint(RestoreFailed):
    """The run has checkpoints and none could be used. Raised on every rank; never a silent start from scratch."""

    def __init__(self, run: str, rejected: dict[str, str]) -> None:
        self.run, self.rejected = run, rejected

    def __str__(self) -> str:
        lines = printable("\n".join(f"  {name}: {why}" for name, why in self.rejected.items()))
        return (
            f"run {self.run!r} has {len(self.rejected)} checkpoint(s) and none is intact:\n{lines}\n"
            "tensors may hold what was read before the damage was found: build the state anew before you go on; "
            "to start from scratch on purpose, use a different run name"
        )


class NoInitialWeights(RestoreFailed):
    """The run has no checkpoint, and the weights it was to begin from can't be used.

    Raised on every rank; never a silent start from scratch.
    """

    def __init__(self, where: str, why: str) -> None:
        self.where, self.why = where, why

    def __str__(self) -> str:
        return (
            f"initial weights {self.where!r} can't be used: {printable(self.why)}\n"
            "the model may hold a part of them: build the state anew before you go on, and name other weights or none"
        )


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, cut short, or not what was written.

    `restore` then falls back to the next older checkpoint, on all ranks together.
    """

    def __init__(self, path: str, found: str) -> None:
        self.path, self.found = path, found

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.found}")


class UnknownFormat(DamagedCheckpoint):
    """The manifest is of a format this version does not read."""


class HostileCheckpoint(DamagedCheckpoint):
    """The checkpoint asks for something that our writers never write; refused before it is acted on."""


class UnsupportedState(CheckpointError):
    """A value of the state can't be stored as data. Raised before anything is written."""

    def __init__(self, key: str, found: str, what_to_do: str) -> None:
        self.key, self.found, self.what_to_do = key, found, what_to_do

    def __str__(self) -> str:
        return printable(f"{self.key}: {self.found} can't be stored in a checkpoint: {self.what_to_do}")


class StorageError(CheckpointError):
    """A storage operation failed and will not be tried again; the cause is chained."""

    def __init__(self, operation: str, path: str, cause: str) -> None:
        self.operation, self.path, self.cause = operation, path, cause

    def __str__(self) -> str:
        return f"could not {self.operation} {self.path!r}: {self.cause}"


class RankFailed(CheckpointError):
    """Some rank failed in a phase that all ranks share.

    Raised on every rank; for a background save, only on the ranks that had done their part of it.
    """

    def __init__(self, phase: str, causes: dict[int, str]) -> None:
        self.phase, self.causes = phase, causes

    def __str__(self) -> str:
        return f"{len(self.causes)} rank(s) failed to {self.phase}:\n{_per_rank(self.causes)}"


class RankTimeout(CheckpointError):
    """A collective did not complete in time. Raised on the ranks that waited."""

    def __init__(self, phase: str, rank: int, waited_s: float, cause: str) -> None:
        self.phase, self.rank, self.waited_s, self.cause = phase, rank, waited_s, cause

    def __str__(self) -> str:
        return (
            f"rank {self.rank} gave up after {self.waited_s:.1f} s in {self.phase!r}: {self.cause}; some rank has "
            "ended, hangs, or made a different call: its own log says which"
        )


class UnevenSteps(CheckpointError):
    """Ranks came to one decision, or one save, with different step counts. Raised on every rank."""

    def __init__(self, steps: dict[int, int]) -> None:
        self.steps = steps

    def __str__(self) -> str:
        counts = ", ".join(f"rank {rank} at step {step}" for rank, step in sorted(self.steps.items()))
        return f"ranks are at different steps: {counts}; give every rank the same number of batches"


class UnmatchedCalls(CheckpointError):
    """Ranks made different calls where all have to make the same one. Raised on every rank."""

    def __init__(self, phases: dict[int, str]) -> None:
        self.phases = phases

    def __str__(self) -> str:
        found = ", ".join(f"rank {rank} to {phase}" for rank, phase in sorted(self.phases.items()))
        return (
            f"ranks made different calls: {found}; every rank has to call step, save, wait and restore in the same"
            " order, and to reach the end of the `with` block together with the others"
        )
