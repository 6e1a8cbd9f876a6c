"""Kills a saving process at every I/O call it makes, and resumes from what is left: `python -m tests.soak.kill_points`.

A run is a chain of lives. Each life resumes from the newest committed checkpoint, compares every bit of what it got
with what that step holds, saves the next step in peace, and begins to save the one after: at the given point of that
save the process gets SIGKILL. No exception is raised, no handler runs, and no buffer is flushed. The next life shows
what became of it.

There are two kinds of points. At a storage call: before it, after it, or with half of its bytes passed on. At a system
call: `strace` kills the process as it enters the n-th one of a name. In both, n counts up until a save comes through
alive, so that no call is left out.

This process makes no threads and saves nothing itself: it has imported torch, and each life is forked from it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ray_stateful import Checkpointer, checkpoint
from ray_stateful.errors import CheckpointError
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.base import Sink, Storage
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.uris import resolve
from tests import servers
from tests.soak import damage

# How long a life may take, and how long one rank waits for another that is dead.
LIFE_S = 120.0
RANKS_S = 20.0

# A listing of hundreds of abandoned directories would be all that is measured.
LIVES_PER_RUN = 12

MOMENTS = ("before", "halfway through", "after")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way of saving, and where it is killed.

    Attributes:
        where: "disk" or "S3".
        system_call: Its name; without one, points are at storage calls.
        world_size: Ranks that save together.
        victim: The rank that is killed.
    """

    where: str
    background: bool
    system_call: str = ""
    world_size: int = 1
    victim: int = 0

    def __str__(self) -> str:
        who = f"rank {self.victim} of {self.world_size}" if self.world_size > 1 else "1 rank"
        how = "background" if self.background else "sync"
        return f"{self.where:4}  {how:10}  {who:11}  {self.system_call or 'storage calls'}"


@dataclass(frozen=True, slots=True)
class Point:
    """The n-th call, from 1; of a storage call also the moment."""

    nth: int
    moment: str = ""

    @classmethod
    def all(cls, variant: Variant, first: int, stride: int) -> Iterator[Point]:
        """Without end, `stride` apart."""
        every = (cls(n) for n in itertools.count(1))
        if not variant.system_call:
            every = (cls(n, moment) for n in itertools.count(1) for moment in MOMENTS)
        return itertools.islice(every, first, None, stride)


# Nothing is armed: such a life only looks at what the last kill left.
NOWHERE = Point(1 << 30, "before")


class KillingStorage:
    """`inner`; once armed, SIGKILL to this very process at one of the calls that write."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self._point: Point | None = None
        self._last_words: Callable[[tuple[str, str, str]], object] = print
        self._count = 0
        self._lock = threading.Lock()

    def arm(self, point: Point, last_words: Callable[[tuple[str, str, str]], object]) -> None:
        """From here on, count; `last_words` is told what is being done when the time has come."""
        self._count, self._last_words, self._point = 0, last_words, point

    def open_sink(self, path: str) -> Sink:
        moment = self.begin("open", path)
        sink = self.inner.open_sink(path)
        self.end("open", path, moment)
        return _KillingSink(self, path, sink)

    def write(self, path: str, data: Any) -> None:
        moment = self.begin("write", path)
        if moment == "halfway through":
            with self.inner.open_sink(path) as sink:
                sink.write(_half(data))
                self.kill("write", path, moment)
        self.inner.write(path, data)
        self.end("write", path, moment)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.inner.read(path, offset, length)

    def sizes(self, path: str) -> Any:
        return self.inner.sizes(path)

    def directories(self, path: str) -> list[str]:
        return self.inner.directories(path)

    def delete(self, path: str) -> None:
        self.inner.delete(path)

    def begin(self, call: str, path: str) -> str:
        """Count a call; returns the moment in it at which the process ends, if it does."""
        with self._lock:
            self._count += 1
            point = self._point
            moment = point.moment if point is not None and self._count == point.nth else ""
        if moment == "before":
            self.kill(call, path, moment)
        return moment

    def end(self, call: str, path: str, moment: str) -> None:
        # Of a call without bytes there is no half: its end is as good.
        if moment:
            self.kill(call, path, moment)

    def kill(self, call: str, path: str, moment: str) -> NoReturn:
        self._last_words((call, path, moment))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("SIGKILL can't be survived")


class _KillingSink:
    def __init__(self, storage: KillingStorage, path: str, inner: Sink) -> None:
        self._storage, self._path, self._inner = storage, path, inner

    def write(self, data: Any) -> None:
        moment = self._storage.begin("append to", self._path)
        if moment == "halfway through":
            self._inner.write(_half(data))
            self._storage.kill("append to", self._path, moment)
        self._inner.write(data)
        self._storage.end("append to", self._path, moment)

    def __enter__(self) -> _KillingSink:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        moment = self._storage.begin("publish", self._path)
        self._inner.__exit__(kind, error, trace)
        self._storage.end("publish", self._path, moment)


def _half(data: Any) -> memoryview:
    view = memoryview(data)
    return view[: view.nbytes // 2]


def state_of(step: int) -> dict[str, Any]:
    """What step `step` holds; on several ranks, two of its tensors in shards."""
    return _sharded(damage.state_of(step))


def fresh_state() -> dict[str, Any]:
    return _sharded(damage.fresh_state())


def _sharded(state: dict[str, Any]) -> dict[str, Any]:
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        tensors = state["model"].tensors
        for key in ("large", "narrow"):
            tensors[key] = distribute_tensor(tensors[key], mesh, [Shard(0)])
    return state


def snapshot(state: dict[str, Any]) -> bytes:
    """What this rank holds, exactly."""
    tensors = state["model"].tensors
    local = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in tensors.items()}
    return damage.snapshot({**state, "model": damage.Model(local)})


def live(variant: Variant, point: Point, rank: int, rendezvous: str, uri: str, parent: Connection) -> None:
    """One life. Tells the parent what it resumed from; then waits to be told to go on, into the save that kills it."""
    if variant.world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=variant.world_size,
            timeout=timedelta(seconds=RANKS_S),
        )
    resolved, path = resolve(uri)
    storage = KillingStorage(resolved.inner)
    run = DirectoryRun(RetryingStorage(storage, resolved.policy), path, uri)
    newest = next(iter(run.candidates()), None)
    state = fresh_state()
    with contextlib.redirect_stdout(io.StringIO()):
        report = checkpoint.restore(state, run=run, timeout_s=RANKS_S)
    step = 0
    if report is not None:
        assert (report.checkpoint, report.rejected) == (newest, {}), f"{newest} is committed; resumed {report}"
        assert snapshot(state) == snapshot(state_of(report.step)), f"wrong values were loaded from {newest}"
        step = report.step
    assert report is not None or newest is None, f"{newest} is committed, and was not found"
    checkpoint.save(state_of(step + 1), step=step + 1, run=run, timeout_s=RANKS_S)
    doomed = state_of(step + 2)
    saver = None
    if variant.background:
        saver = Checkpointer(doomed, every_n_steps=1, background=True, run=run, orphans_after_s=None, timeout_s=RANKS_S)
        saver.step_count = step + 1
    parent.send(("resumed", step))
    parent.recv()
    if rank == variant.victim and not variant.system_call:
        storage.arm(point, lambda words: parent.send(("killed", *words)))
    try:
        if saver is None:
            checkpoint.save(doomed, step=step + 2, run=run, timeout_s=RANKS_S)
        else:
            saver.step()
            # Training goes on in the tensors that are being saved.
            for tensor in doomed["model"].tensors.values():
                tensor.copy_(torch.ones_like(tensor))
            saver.wait()
    except CheckpointError as error:
        parent.send(("failed", type(error).__name__))
    else:
        parent.send(("saved",))


@dataclass(slots=True)
class Process:
    """A forked life, and the connection to it."""

    pid: int
    connection: Connection

    @classmethod
    def fork(cls, function: Callable[[Connection], None]) -> Process:
        ours, theirs = Pipe()
        pid = os.fork()
        if pid:
            theirs.close()
            return cls(pid, ours)
        try:
            ours.close()
            torch.set_num_threads(1)
            function(theirs)
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent, whatever happened in it
            theirs.send(("error", traceback.format_exc()))
        os._exit(0)

    def hear(self, deadline: float) -> tuple[Any, ...]:
        """The next message; ("dead",) when there will be none."""
        if not self.connection.poll(max(0.0, deadline - time.monotonic())):
            self.end()
            raise AssertionError(f"process {self.pid} hangs")
        try:
            message: tuple[Any, ...] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return ("dead",)
        assert message[0] != "error", message[1]
        return message

    def end(self) -> int:
        """Kill it if it still lives; returns the signal that ended it, 0 if none did."""
        with contextlib.suppress(ProcessLookupError):
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.connection.close()
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@contextlib.contextmanager
def traced(pid: int, system_call: str, nth: int) -> Iterator[None]:
    """Process `pid` is killed as one of its threads enters its `nth` call of a name, from here on."""
    inject = f"inject={system_call}:signal=KILL:when={nth}"
    tracer = subprocess.Popen(
        ["strace", "-f", "-o", "/dev/null", "-p", str(pid), "-e", f"trace={system_call}", "-e", inject],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr is not None
    try:
        said = tracer.stderr.readline()
        assert "attached" in said, f"strace: {said}"
        yield
    finally:
        # Not asked to end: under some sandboxes' kernels strace waits for ever for threads that SIGKILL ended with the
        # rest of their process, and does not listen meanwhile.
        tracer.kill()
        tracer.wait()
        tracer.stderr.close()


def import_what_lives_import(scratch: str) -> None:
    """Import here, once, what each life would import again: pandas, by way of pyarrow, takes most of a second."""

    def list_modules(parent: Connection) -> None:
        before = set(sys.modules)
        dist.init_process_group("gloo", init_method=f"file://{scratch}-rendezvous", rank=0, world_size=1)
        checkpoint.save(state_of(1), step=1, run=scratch)
        with contextlib.redirect_stdout(io.StringIO()):
            checkpoint.restore(fresh_state(), run=scratch)
        parent.send(("imported", sorted(set(sys.modules) - before)))

    process = Process.fork(list_modules)
    for name in process.hear(time.monotonic() + LIFE_S)[1]:
        # Some are made by other modules, and have no name to import them by.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    process.end()


@dataclass(slots=True)
class Figures:
    """What a variant came to.

    Attributes:
        calls: How often each kind of storage call was the last.
        from_killed: Lives that resumed from the very save that was killed: its commit was already made.
        survivor_s: The longest that a rank went on after another was killed.
        last_survived: Whether the save of the last life was not killed.
    """

    points: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    from_killed: int = 0
    survivor_s: float = 0.0
    last_survived: bool = False
    seconds: float = 0.0


def examine(variant: Variant, base: str, rendezvous: str, first: int = 0, stride: int = 1) -> Figures:
    """Kill at every point of a variant, or at each `stride`-th.

    Raises:
        AssertionError: after some kill a run did not resume from the newest committed checkpoint, bit for bit, or a
            surviving rank hung.
    """
    figures, began = Figures(), time.monotonic()
    points = Point.all(variant, first, stride)
    # A save that comes through alive is beyond the last call; of system calls, which are counted by thread, its
    # threads may have shared them out unusually.
    enough_alive = 2 if variant.system_call else 1
    num_alive = 0
    for number in itertools.count():
        uri, before = base.format(number), None
        for point in itertools.islice(points, LIVES_PER_RUN):
            before = _one_life(variant, point, uri, rendezvous, before, figures)
            num_alive = num_alive + 1 if figures.last_survived else 0
            if num_alive == enough_alive:
                break
        _one_life(variant, NOWHERE, uri, rendezvous, before, figures)
        if num_alive == enough_alive:
            figures.seconds = time.monotonic() - began
            return figures
    raise AssertionError("there are always more points")


def _one_life(
    variant: Variant,
    point: Point,
    uri: str,
    rendezvous: str,
    before: tuple[int, bool | None, str] | None,
    figures: Figures,
) -> tuple[int, bool | None, str]:
    """Live, check what the life before left, and die.

    Args:
        before: Of the life before: the step that it saved in peace; whether the next one was committed, `None` if
            that is not known; and how it ended.

    Returns:
        The same, of this life.
    """
    how = "at the start" if before is None else before[2]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(rendezvous)
    ranks = [
        Process.fork(lambda parent, rank=rank: live(variant, point, rank, rendezvous, uri, parent))
        for rank in range(variant.world_size)
    ]
    deadline = time.monotonic() + LIFE_S
    try:
        heard = [rank.hear(deadline) for rank in ranks]
        assert all(message[0] == "resumed" for message in heard), heard
        step = int(heard[0][1])
        if before is not None:
            safe, committed, _ = before
            expected = {None: (safe, safe + 1), True: (safe + 1,), False: (safe,)}[committed]
            assert step in expected, f"resumed step {step}, and not {expected}"
            figures.from_killed += step == safe + 1 and not figures.last_survived
        victim = ranks[variant.victim]
        with contextlib.ExitStack() as stack:
            if variant.system_call and point is not NOWHERE:
                stack.enter_context(traced(victim.pid, variant.system_call, point.nth))
            for rank in ranks:
                rank.connection.send("go on")
            message = victim.hear(deadline)
        killed_at, committed, ended = time.monotonic(), None, f"{variant}, {point}: {message}"
        if message[0] == "killed":
            _, call, path, moment = message
            # Exactly one call commits, and only when it is over.
            committed = path.endswith("manifest.json") and moment == "after"
            figures.calls[call] += 1
            assert victim.hear(deadline) == ("dead",)
        if message[0] in ("killed", "dead"):
            figures.points += 1
            for rank in ranks:
                if rank is not victim:
                    assert rank.hear(deadline)[0] == "failed", "a rank outlived another one, and saw no error"
                    figures.survivor_s = max(figures.survivor_s, time.monotonic() - killed_at)
        else:
            assert message == ("saved",), message
            committed = True
    except AssertionError as error:
        raise AssertionError(f"after a save that ended so: {how}; now {variant}, {point}: {error}") from error
    finally:
        signals = [rank.end() for rank in ranks]
    figures.last_survived = message[0] == "saved"
    assert figures.last_survived or signals[variant.victim] == signal.SIGKILL, ended
    return step + 1, committed, ended


DISK_CALLS = ("mkdir", "openat", "write", "fsync", "close", "rename")
SERVER_CALLS = ("connect", "sendto", "recvfrom", "close")


def variants() -> list[Variant]:
    """All of them; without `strace`, those that do not need it."""
    found = [Variant(where=where, background=background) for where in ("disk", "S3") for background in (False, True)]
    for where, background, victim in (
        ("disk", False, 0),
        ("disk", False, 1),
        ("disk", True, 0),
        ("disk", True, 1),
        ("S3", False, 0),
        ("S3", False, 1),
    ):
        found.append(Variant(where=where, background=background, world_size=2, victim=victim))
    if shutil.which("strace") is not None:
        for background in (False, True):
            found += [Variant(where="disk", background=background, system_call=name) for name in DISK_CALLS]
            found += [Variant(where="S3", background=background, system_call=name) for name in SERVER_CALLS]
    return found


SHORT_STRIDE = 19


def is_short(variant: Variant) -> bool:
    """Whether it is one of those that are examined every time the tests run."""
    if variant.system_call:
        return variant.where == "disk" and variant.system_call == "write"
    return variant.world_size == 1 or (variant.where == "disk" and not variant.background)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]  # there is one
    parser.add_argument("--stride", type=int, default=1, help="examine each so manieth point of a variant")
    parser.add_argument("--short", action="store_true", help="some points of some variants, in seconds")
    parser.add_argument("--only", default="", help="variants whose line contains this")
    given = parser.parse_args()
    logging.getLogger("ray_stateful").setLevel(logging.CRITICAL)
    os.environ.update({**servers.S3_ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"})
    stride = SHORT_STRIDE if given.short else given.stride
    chosen = [v for v in variants() if given.only in str(v) and (not given.short or is_short(v))]
    if shutil.which("strace") is None:
        print("strace is not installed: points at system calls are left out")
    points = 0
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="kill-points-"))
        server = stack.enter_context(servers.s3_server())
        server.make_bucket("kills")
        import_what_lives_import(f"{scratch}/imports")
        began = time.monotonic()
        for number, variant in enumerate(chosen):
            name = f"{number}-{{}}"
            base = f"{scratch}/{name}" if variant.where == "disk" else server.uri(f"kills/{name}")
            # Another first point for each: a stride would leave the same calls out in all of them.
            first = number * 7 % stride
            figures = examine(variant, base, f"{scratch}/rendezvous", first, stride)
            points += figures.points
            waited = f"; the other rank ended within {figures.survivor_s:.1f} s" if variant.world_size > 1 else ""
            print(
                f"{figures.points:5}  {variant}: {figures.from_killed} resumed from the save that was killed{waited}; "
                f"{figures.seconds:.0f} s",
                flush=True,
            )
    print(f"{points:,} kills in {time.monotonic() - began:.0f} s, each resumed bit for bit from the newest commit")


if __name__ == "__main__":
    sys.exit(main())
