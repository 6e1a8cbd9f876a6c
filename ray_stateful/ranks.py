"""The collectives we use, on a CPU group of our own; one rank's failure is raised on every rank.

Every call here is collective: all ranks of the group make it, in the same order. Every wait has the deadline
of the group, and running into it is a `RankTimeout` that names the phase. Only small picklable values pass
through; tensors never do.
"""

from __future__ import annotations

import atexit
import math
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ray_stateful import collector
from ray_stateful.errors import DamagedCheckpoint, RankFailed, RankTimeout, UnmatchedCalls

T = TypeVar("T")

# torch's own default for a process group. Longer than storage takes to give up: see RetryPolicy.within.
DEFAULT_TIMEOUT_S = 1800.0

# Shorter rows of integers are padded to this: gloo ends the process if two ranks send rows of different lengths.
ROW_BYTES = 64

# Seconds that a process with groups waits at its end: see `_let_go`.
_LET_GO_S = 0.2


def current_rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return 0 if world() is None else dist.get_rank()


def world() -> dist.ProcessGroup | None:
    """The default process group; `None` without one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def device_of(group: dist.ProcessGroup | None = None) -> str:
    """The type of the device whose tensors `group` moves; `cpu` if that is one of several, as torch decides it, too.

    The same on every rank of `group`, whatever tensors a rank holds.
    """
    # "cuda:nccl", or "cpu:gloo,cuda:nccl"
    devices = [entry.partition(":")[0] for entry in str(dist.get_backend_config(group)).split(",")]
    return "cpu" if "cpu" in devices else devices[0]


@dataclass(slots=True)
class Outcome:
    """What became of one phase on this rank: nothing, or one error."""

    error: BaseException | None = None

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Keep an error of the body instead of raising it here alone: `raise_if_any_failed` raises it on every rank."""
        try:
            yield
        # CheckpointException derives from BaseException, and would pass `except Exception` on one rank only.
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - kept, and raised on every rank
            # The first one: later errors may be consequences of it.
            self.error = self.error or error


@dataclass(frozen=True, slots=True)
class Failure:
    """What is left of an error that crosses processes: its text, and whether it means `damage` of the checkpoint."""

    text: str
    damage: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(f"{type(error).__name__}: {error}", isinstance(error, DamagedCheckpoint))


@dataclass(frozen=True, slots=True)
class Ranks:
    """The workers that save and restore together.

    `group` is a gloo process group, or `None` for a world of one without `torch.distributed`.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S

    @classmethod
    def of_world(cls, timeout_s: float = DEFAULT_TIMEOUT_S, purpose: str = "checkpoint") -> Ranks:
        """The ranks of the default process group, over a gloo group of our own: one per `purpose` and `timeout_s`.

        Collective on the first call for these two. TorchTrainer on GPUs makes a plain NCCL group, which has no
        object collectives on the CPU; and a background save would deadlock on a group shared with training.

        Raises:
            ValueError: `timeout_s` is no finite number above 0.
            RankTimeout: a rank did not arrive to make the group.
        """
        # torch takes 0, and a world of one takes anything; both would fail only when something is waited for.
        if timeout_s is None or not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s}; it must be a finite number of seconds above 0")
        over = world()
        if over is None:
            return cls(timeout_s=timeout_s)
        made = _groups.get((purpose, timeout_s))
        if made is None or made.over is not over:
            timeout = timedelta(seconds=timeout_s)
            alone = cls(dist.get_rank(), dist.get_world_size(), None, timeout_s)
            group = alone.within_deadline(
                f"make a group for {purpose}", lambda: dist.new_group(backend="gloo", timeout=timeout)
            )
            made = _groups[(purpose, timeout_s)] = _Made(over, group)
        return cls(dist.get_rank(), dist.get_world_size(), made.group, timeout_s)

    def broadcast(self, phase: str, value: T | None) -> T:
        """Rank 0's `value`, on every rank."""
        if self.group is None:
            return value  # type: ignore[return-value]  # a world of one is rank 0
        box = [value]
        self.within_deadline(phase, lambda: dist.broadcast_object_list(box, src=0, group=self.group))
        return box[0]  # type: ignore[return-value]  # rank 0 gave a T

    def gather(self, phase: str, value: T) -> list[T]:
        """Everyone's `value` in rank order on rank 0; an empty list on the others."""
        if self.group is None:
            return [value]
        into: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        # Pickled here, not by torch: what hundreds of ranks send is unpickled after the wait, the collector paused.
        sent = pickle.dumps(value)
        self.within_deadline(phase, lambda: dist.gather_object(sent, into, dst=0, group=self.group))
        with collector.paused():
            return [pickle.loads(of_rank) for of_rank in into or []]  # noqa: S301 - sent by ranks of this very job

    def all_gather(self, phase: str, value: T) -> list[T]:
        """Everyone's `value` in rank order, on every rank."""
        if self.group is None:
            return [value]
        into: list[Any] = [None] * self.world_size
        self.within_deadline(phase, lambda: dist.all_gather_object(into, value, group=self.group))
        return into

    def scatter(self, phase: str, values: list[T]) -> T:
        """This rank's entry of rank 0's `values`, one per rank; `values` is not read on the others."""
        if self.group is None:
            return values[0]
        into: list[Any] = [None]
        given = values if self.rank == 0 else None
        self.within_deadline(phase, lambda: dist.scatter_object_list(into, given, src=0, group=self.group))
        return into[0]  # type: ignore[no-any-return]  # rank 0 gave Ts

    def all_gather_ints(self, phase: str, values: list[int]) -> list[list[int]]:
        """Everyone's `values`, the same number of 64-bit integers per rank: one small collective, no pickling.

        Raises:
            UnmatchedCalls: on every rank, if some of them are in a different phase. Every save, restore and step begins
                by gathering a few integers, so calls that do not match are detected there.
        """
        if self.group is None:
            return [list(values)]
        # The device is named wherever host memory is meant: torch.set_default_device() may have changed the default.
        row = [zlib.crc32(phase.encode()), *values]
        mine = torch.tensor(row + [0] * (ROW_BYTES // 8 - len(row)), dtype=torch.int64, device="cpu")
        into = [torch.empty_like(mine) for _ in range(self.world_size)]
        self.within_deadline(phase, lambda: dist.all_gather(into, mine, group=self.group))
        rows = [found.tolist() for found in into]
        if any(found[0] != row[0] for found in rows):
            raise UnmatchedCalls(dict(enumerate(self.all_gather("compare calls", phase))))
        return [found[1 : len(row)] for found in rows]

    def failures(self, phase: str, outcome: Outcome) -> dict[int, Failure]:
        """What went wrong on every rank that failed; empty when all succeeded. The same on every rank."""
        return self.share(phase, outcome)[0]

    def share(
        self, phase: str, outcome: Outcome, facts: Sequence[int] = ()
    ) -> tuple[dict[int, Failure], list[list[int]]]:
        """What went wrong on every rank that failed, and everyone's `facts`: the same number of 64-bit integers each.

        One small collective if all ranks succeeded; a second one gathers the causes if any rank failed.
        """
        mine = None if outcome.error is None else Failure.of(outcome.error)
        rows = self.all_gather_ints(phase, [int(mine is not None), *facts])
        everyone = self.all_gather(phase, mine) if any(failed for failed, *_ in rows) else []
        failures = {rank: failure for rank, failure in enumerate(everyone) if failure is not None}
        return failures, [row[1:] for row in rows]

    def raise_if_any_failed(self, phase: str, outcome: Outcome, facts: Sequence[int] = ()) -> list[list[int]]:
        """Everyone's `facts`, as `share` returns them.

        Raises:
            RankFailed: on every rank, if `outcome` holds an error on any of them.
        """
        failures, everyone = self.share(phase, outcome, facts)
        if failures:
            causes = {rank: failure.text for rank, failure in failures.items()}
            raise RankFailed(phase, causes) from outcome.error
        return everyone

    def within_deadline(self, phase: str, collective: Callable[[], T]) -> T:
        """Make a collective call on this group, or on one made with the same deadline.

        Raises:
            RankTimeout: the call failed because a peer left or is late; names `phase`.
        """
        began = time.monotonic()
        try:
            return collective()
        except (RuntimeError, ValueError) as error:
            # Gloo reports a peer that left ("Connection closed by peer") and one that is late ("Timed out
            # waiting") alike: both are a RuntimeError, and differ only in its text.
            raise RankTimeout(phase, self.rank, time.monotonic() - began, str(error)) from error


def on_host(group: dist.ProcessGroup, timeout_s: float = DEFAULT_TIMEOUT_S) -> dist.ProcessGroup:
    """A group of the ranks of `group` that moves host memory: `group` itself, or one of our own that is made once.

    An object collective on an NCCL-only group puts all that it pickles on the device. For such a group the first call
    is collective over the world: every rank is in one, and all of them are made together. Having each made by its own
    ranks alone (`use_local_synchronization`) does not work: torch derives the name under which ranks meet from the
    number of groups that a rank is in, which differs if some ranks share one more, as the ends of a pipeline do.
    """
    if device_of(group) == "cpu":
        return group
    key = (f"ranks of {group.group_name}", timeout_s)
    made = _groups.get(key)
    if made is None or made.over is not group:
        everyone, phase = Ranks.of_world(timeout_s), "make groups in host memory"
        mine = sorted(dist.get_process_group_ranks(group))
        found: dist.ProcessGroup | None = None
        # In the same order on every rank, members or not: `new_group` is collective over the world.
        for members in sorted({tuple(members) for members in everyone.all_gather(phase, mine)}):
            make = partial(dist.new_group, list(members), backend="gloo", timeout=timedelta(seconds=timeout_s))
            new = everyone.within_deadline(phase, make)
            found = new if list(members) == mine else found
        made = _groups[key] = _Made(group, found)
    assert made.group is not None
    return made.group


@dataclass(frozen=True, slots=True)
class _Made:
    over: dist.ProcessGroup | None
    group: dist.ProcessGroup | None = field(repr=False)


# Keyed by purpose and deadline; an entry of an earlier default group is replaced, as its sockets are gone.
_groups: dict[tuple[str, float], _Made] = {}


def _let_go() -> None:
    """Give gloo's threads time to drop the tensors of the last collective, for which they need the interpreter.

    If the interpreter is already shutting down, it terminates such a thread, and SIGABRT ends the process: its exit
    code, whether of an error or of an orderly end, would be lost.
    """
    if _groups:
        # A fixed time, as there is no event to wait for: gloo does not tell when its threads are done.
        time.sleep(_LET_GO_S)


atexit.register(_let_go)
