"""Saves and restores through a storage server that fails now and then, and one that is down.

`python -m tests.soak.storage_faults` prints the figures. Between two ranks and an S3 server stands a proxy that lets
requests go wrong by chance: throttled, failed, reset, stalled, answered late, answered by half, or done and not
answered at all. At a rate, every save and restore must succeed, and every bit must be right. When nothing gets
through, a save is a clear error in bounded time, training goes on as far as it was allowed to, and the last good
checkpoint is as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import time
from dataclasses import dataclass

import torch

from ray_stateful import Checkpointer, checkpoint
from ray_stateful.errors import SaveFailed
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import run_ranks
from tests import servers
from tests.proxy import KINDS, ProxyFaults, proxy
from tests.soak.kill_points import fresh_state, snapshot, state_of

NUM_RANKS = 2
RATES = (0.05, 0.2)

# As it is by default, but for the pauses and the budget, which a test need not wait for.
PATIENT = RetryPolicy(budget_s=60.0, attempt_s=20.0, first_pause_s=0.02, longest_pause_s=0.5)
IMPATIENT = RetryPolicy(budget_s=0.5, attempt_s=1.5, publish_s=1.5, first_pause_s=0.02, longest_pause_s=0.2)

# What a save may take while storage is down: the budget, one last try, and the client library's own retries.
OUTAGE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """Figures of one rate, over all ranks."""

    rate: float
    num_saves: int
    num_restores: int
    num_requests: int
    num_faults: int
    num_retries: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.rate:4.0%} of requests: {self.num_faults:,} of {self.num_requests:,} went wrong; "
            f"{self.num_saves} saves and {self.num_restores} restores succeeded, bit for bit, with "
            f"{self.num_retries:,} retries; {self.seconds:.0f} s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """What a rank saw of a storage that is down: the longest failing save, and how the last error read."""

    kind: str
    longest_s: float
    error: str

    def __str__(self) -> str:
        said = " ".join(self.error.split())
        return f"100% {self.kind}: each save failed within {self.longest_s:.1f} s: {said[:300]}"


def run_at(uri: str, policy: RetryPolicy) -> DirectoryRun:
    """The run at `uri`, with a policy of its own."""
    resolved, path = resolve(uri)
    return DirectoryRun(RetryingStorage(resolved.inner, policy), path, uri)


def save_and_restore(uri: str, num_rounds: int) -> int:
    """On each rank; returns how often this one tried again."""
    logging.getLogger("ray_stateful").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    run = run_at(uri, PATIENT)
    for step in range(1, num_rounds + 1):
        checkpoint.save(state_of(step), step=step, run=run, timeout_s=120)
        fresh = fresh_state()
        with contextlib.redirect_stdout(io.StringIO()):
            report = checkpoint.restore(fresh, run=run, timeout_s=120)
        assert report is not None, "nothing was restored"
        assert (report.step, report.rejected) == (step, {}), f"step {step} was saved, and restored is {report}"
        assert snapshot(fresh) == snapshot(state_of(step)), f"wrong values at step {step}"
    assert isinstance(run.storage, RetryingStorage)
    return run.storage.retries.total()


def now_and_then(server: servers.S3Server, rate: float, num_rounds: int, seed: int = 0) -> Worked:
    """Save and restore while requests go wrong at `rate`."""
    began = time.monotonic()
    with proxy(server.port, ProxyFaults(rate=rate, kinds=KINDS, seed=seed, slow_s=0.1, stall_s=0.5)) as between:
        uri = server.uri(f"faults/{rate}-{seed}", between.port)
        outcomes = run_ranks(NUM_RANKS, save_and_restore, uri, num_rounds, timeout_s=60 + 20 * num_rounds)
        return Worked(
            rate=rate,
            num_saves=num_rounds,
            num_restores=num_rounds,
            num_requests=between.count(),
            num_faults=between.num_faults(),
            num_retries=sum(_returned(outcomes)),
            seconds=time.monotonic() - began,
        )


def train_through_an_outage(healthy: str, down: str, kind: str, background: bool) -> Outage:
    """On each rank: a good save; then a failing one that is forgiven, and one that is not; then a good one."""
    logging.getLogger("ray_stateful").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    checkpoint.save(state_of(1), step=1, run=run_at(healthy, PATIENT), timeout_s=60)
    checkpointer = Checkpointer(
        state_of(2),
        every_n_steps=1,
        background=background,
        soft_fail=1,
        at_end=False,
        orphans_after_s=None,
        run=run_at(down, IMPATIENT),
        timeout_s=60,
    )
    checkpointer.step_count = 1
    longest_s, error = 0.0, None
    for num_failed in (1, 2):
        began = time.monotonic()
        try:
            checkpointer.step()
            checkpointer.wait()
        except SaveFailed as failed:
            error = failed
        longest_s = max(longest_s, time.monotonic() - began)
        assert (error is not None) == (num_failed == 2), f"save {num_failed} in a row failed: {error}"
    assert longest_s < OUTAGE_S, f"a save of a storage that is down took {longest_s:.0f} s"

    with contextlib.redirect_stdout(io.StringIO()):
        fresh = fresh_state()
        report = checkpoint.restore(fresh, run=run_at(healthy, PATIENT), verify="full", timeout_s=60)
        assert report is not None, "the last good checkpoint is gone"
        assert (report.step, report.rejected) == (1, {}), f"the last good one is step 1; restored is {report}"
        assert snapshot(fresh) == snapshot(state_of(1)), "the last good checkpoint is not as it was"
    checkpoint.save(state_of(5), step=5, run=run_at(healthy, PATIENT), timeout_s=60)
    return Outage(kind=kind, longest_s=longest_s, error=str(error))


def down(server: servers.S3Server, kind: str, background: bool = False) -> Outage:
    """Train while every request goes wrong in the same way."""
    with proxy(server.port, ProxyFaults(rate=1.0, kinds=(kind,), stall_s=600.0, slow_s=600.0)) as between:
        path = f"faults/down-{kind}-{background}"
        arguments = server.uri(path), server.uri(path, between.port), kind, background
        outcomes = run_ranks(NUM_RANKS, train_through_an_outage, *arguments, timeout_s=240)
    return max(_returned(outcomes), key=lambda outage: outage.longest_s)


def _returned(outcomes: list) -> list:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]  # there is one
    parser.add_argument("--rounds", type=int, default=40, help="saves, each with a restore, at each rate")
    given = parser.parse_args()
    os.environ.update(servers.S3_ENVIRONMENT)
    with servers.s3_server() as server:
        server.make_bucket("faults")
        for rate in RATES:
            print(now_and_then(server, rate, given.rounds), flush=True)
        for kind in ("503", "500", "reset", "stall", "slow_first_byte"):
            print(down(server, kind), flush=True)
        print("in the background:", down(server, "503", background=True), flush=True)


if __name__ == "__main__":
    sys.exit(main())
