"""A run of up to 64 ranks that loses its machines again and again: `python -m tests.soak.many_ranks`.

Each group of ranks restores, trains, and saves in the background every few steps, until it is killed: every second
group as a whole, with SIGKILL to each rank at the same step; of the others one rank is, and the rest have to end by
themselves. The next group has another number of ranks. The last one trains to the end.

Every rank compares what it has restored with what was noted when that step was trained, bit for bit. In the end, the
steps that survived are compared with a run of one rank that nothing happened to: the same samples in every step, each
once per epoch, and the same loss, up to rounding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ray_stateful import Checkpointer
from ray_stateful.testing import run_ranks
from tests.ray.elastic_training import LENGTH, NUM_STEPS, build, data, train_one, train_uninterrupted

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from history import Journal, data_problems, read_attempts, steps_lost, surviving

WORLDS = (64, 48, 56, 64, 8)
SAVE_EVERY = 5
# Steps of a group before it is killed: between two saves, with the last one still being written or just committed.
STEPS_EACH = (13, 16, 12, 17)

LIFE_S = 400.0
# How long a rank waits for others that may not have begun: so many start on few cores.
RANKS_S = 120.0


def live(directory: Path, seed: int, num_steps: int | None, victims: Sequence[int] | None) -> str | None:
    """Train `num_steps` steps and be killed, if this is one of `victims` (`None` if all are), or train to the end.

    Returns:
        The resume report.
    """
    # The ranks that a dead one leaves behind say so, each of them.
    logging.getLogger("ray_stateful").setLevel(logging.CRITICAL)
    # Another seed for each group, the reference's for the first: nothing but the checkpoint makes them alike.
    model, optimizer, batches, state = build(seed)
    inputs, targets = data()
    journal, notes = Journal(directory / "history"), directory / "digests.jsonl"
    with Checkpointer(
        state, every_n_steps=SAVE_EVERY, background=True, run=str(directory / "run"), timeout_s=RANKS_S
    ) as checkpointer:
        report = checkpointer.restore()
        if report is not None:
            # Of the newest group that noted the step: an older one was killed before it was committed.
            noted = [json.loads(line) for line in notes.read_text().splitlines()]
            wanted = [digest for step, digest in noted if step == report.step][-1]
            assert digest_of(model, optimizer) == wanted, f"step {report.step} was restored as it never was"
        journal.began(checkpointer.step_count, report and str(report))
        until = NUM_STEPS if num_steps is None else checkpointer.step_count + num_steps
        while True:
            for batch in batches:
                loss, trained = train_one(model, optimizer, batch, inputs, targets)
                step = checkpointer.step_count + 1
                if step % SAVE_EVERY == 0:
                    digest = digest_of(model, optimizer)
                    if dist.get_rank() == 0:
                        with notes.open("a") as file:
                            file.write(json.dumps([step, digest]) + "\n")
                journal.trained(step, loss, trained)
                checkpointer.step()
                if step == NUM_STEPS:
                    return report and str(report)
                if step == until and (victims is None or dist.get_rank() in victims):
                    os.kill(os.getpid(), signal.SIGKILL)


def digest_of(model: Any, optimizer: Any) -> str:
    """Of every bit of the parameters and of the optimizer's state, the same on every rank. Collective."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        for _, value in [("", parameter), *sorted(optimizer.state[parameter].items())]:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found.update(whole.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def survive(directory: Path) -> None:
    """All groups, one after another.

    Raises:
        AssertionError: what was restored, or how a group ended, is not as it should be.
    """
    for number, num_ranks in enumerate(WORLDS):
        is_last = number == len(WORLDS) - 1
        victims = None if number % 2 == 0 else [num_ranks // 3]
        num_steps = None if is_last else STEPS_EACH[number]
        began = time.monotonic()
        outcomes = run_ranks(
            num_ranks, live, directory, number + 1, num_steps, victims, timeout_s=LIFE_S, collective_timeout_s=RANKS_S
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        wrong = [error for error in errors if isinstance(error, AssertionError)]
        if wrong or (is_last and errors):
            raise (wrong or errors)[0]
        killed = [rank for rank, error in enumerate(outcomes) if isinstance(error, ChildProcessError)]
        expected = [] if is_last else list(range(num_ranks)) if victims is None else victims
        assert killed == expected, f"ranks {killed} of {num_ranks} were killed, not {expected}: {errors[:1]}"
        assert is_last or len(errors) == num_ranks, f"{num_ranks - len(errors)} ranks trained on without rank {victims}"
        group = read_attempts(directory / "history")[-1]
        how = "trained to the end" if is_last else f"{len(killed)} killed"
        print(
            f"{num_ranks} ranks: went on after step {group.began}, trained up to {group.last_step}; {how}; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )


def judge(directory: Path) -> str:
    """Compare what survived with an uninterrupted run of one rank, and say in a line what came out.

    Raises:
        AssertionError: a sample was lost or trained twice, or the losses are further apart than rounding explains.
    """
    (error,) = run_ranks(1, train_uninterrupted, str(directory / "steady"), timeout_s=LIFE_S)
    assert not isinstance(error, BaseException), error
    groups = read_attempts(directory / "history")
    points, reference = surviving(groups), surviving(read_attempts(directory / "steady"))
    assert len(points) == len(reference) == NUM_STEPS
    problems = data_problems(points, reference, LENGTH)
    assert not problems, problems
    # In float64, another number of ranks changes the rounding of a sum and nothing else; AdamW carries it on.
    apart = max(abs(point.loss - other.loss) / other.loss for point, other in zip(points, reference, strict=True))
    assert apart < 1e-9, f"losses are {apart:.1e} apart"
    lost = steps_lost(groups)
    # What was trained since the last save, and the interval before it if that save was still being written.
    assert max(lost) <= 2 * SAVE_EVERY, lost
    worlds, num_samples = ", ".join(str(group.world_size) for group in groups), sum(len(one.samples) for one in points)
    return (
        f"groups of {worlds} ranks; {sum(lost)} steps trained again; {NUM_STEPS} steps with {num_samples:,} samples, "
        f"each once per epoch; losses at most {apart:.1e} apart, relatively"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()  # type: ignore[union-attr]  # there is one
    with tempfile.TemporaryDirectory(prefix="many_ranks_") as directory:
        survive(Path(directory))
        print(judge(Path(directory)))


if __name__ == "__main__":
    sys.exit(main())
