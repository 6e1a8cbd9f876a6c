"""Lose a worker, go on with three, stop, go on with one: the loss must not notice.

Starts a Ray cluster of its own on this machine, with one logical CPU for each worker, and trains the same model twice:

    uninterrupted   2 workers, from the first step to the last
    elastic         2 workers; a third machine joins; one worker process is killed, and Ray restarts the run on 3;
                    the trainer is stopped, and a new one of the same name goes on with 1

Prints each resume report as it comes and draws both losses. Fails when they are further apart than rounding explains,
or when the steps that survived trained a sample twice in an epoch or left one out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from history import Attempt, data_problems, read_attempts, steps_lost, surviving
from local_cluster import LocalCluster
from plot import bands, draw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent

# How far the two losses may be apart at any step. Another number of workers adds the same numbers in another order:
# over 80 steps of this model that came to 2e-5 nats at most. A single step left out moves the loss by 3e-2, from the
# next one on. In between is more than a factor of a thousand; this is its middle.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When what happens, in steps at the earliest, and the size of what is trained.

    `reference_workers` train the uninterrupted run; 0 is one process without Ray, beside the elastic run. `pace_s` is
    what a step takes at the least, on a machine of any speed: what happens to a run takes Ray seconds.
    """

    steps: int
    save_every: int
    kill_at: int
    stop_at: int
    num_samples: int
    dim: int
    num_layers: int
    reference_workers: int
    pace_s: float

    def arguments(self) -> list[str]:
        # One byte more than the samples have: each is followed by the byte that comes next.
        sizes = {"steps": self.steps, "save-every": self.save_every, "text-bytes": self.num_samples * 64 + 1}
        sizes |= {"seq-len": 64, "dim": self.dim, "num-layers": self.num_layers, "pace": self.pace_s}
        return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


# The number of samples makes an epoch end in a short batch, among the steps that 3 workers train.
FULL = Plan(
    steps=80,
    save_every=10,
    kill_at=34,
    stop_at=64,
    num_samples=852,
    dim=256,
    num_layers=7,
    reference_workers=2,
    pace_s=0.2,
)
# After the stop there are steps to spare: a trainer looks for signals about once a second.
SHORT = Plan(
    steps=48,
    save_every=5,
    kill_at=8,
    stop_at=20,
    num_samples=276,
    dim=256,
    num_layers=2,
    reference_workers=0,
    pace_s=0.1,
)


class DemoFailed(Exception):
    """What the demo shows is not so, or something in it broke."""


class Screen:
    """One bar over the steps of both runs, and what happens printed above it."""

    def __init__(self, num_steps: int) -> None:
        columns = (TextColumn("{task.description:<24}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(highlight=False, soft_wrap=True))
        self._task = self.progress.add_task("starting", total=num_steps)
        self._steps: dict[str, int] = {}
        self._reported: set[int] = set()

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False)

    def show(self, title: str, attempts: Sequence[Attempt]) -> None:
        """Move the bar to where the run stands, backwards too, and print resume reports not printed before."""
        for attempt in attempts:
            if attempt.report and attempt.attempt not in self._reported:
                self._reported.add(attempt.attempt)
                self.say(attempt.report)
        latest = attempts[-1] if attempts else None
        self._steps[title] = latest.last_step if latest else 0
        who = f"{title}, {_workers(latest.world_size)}" if latest else f"{title}, starting"
        self.progress.update(self._task, description=who, completed=sum(self._steps.values()))


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


@dataclass
class Training:
    """One run: a process of `train_fsdp.py` at a time, and the notes that its workers leave."""

    name: str
    work: Path
    plan: Plan
    screen: Screen
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self, num_workers: str) -> None:
        command = [sys.executable, str(HERE / "train_fsdp.py"), "--name", self.name, "--num-workers", num_workers]
        # One failure is planned, and another is not to be covered up by another restart. Nor is a resize that Ray
        # decides on by itself to come between.
        command += ["--max-failures", "1", "--resize-after", "3600", "--num-to-keep", "2"]
        command += ["--history", str(self._history), "--storage-path", str(self.work)]
        command += self.plan.arguments()
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C is for the demo, which then ends what it has started.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def wait_until(self, what: str, happened: Callable[[Attempt], bool], timeout_s: float = 120.0) -> Attempt:
        """Wait until `happened` is true of the latest group of workers. The process must live until then.

        `timeout_s` is for how long nothing may happen: a machine that others use too takes many times as long for all
        steps, and is not stuck.
        """
        assert self.process is not None
        stood: tuple[int, int] | None = None
        while True:
            # Asked before the notes are read: those of a process that has ended are complete.
            ended = self.process.poll() is not None
            attempts = self.attempts()
            self.screen.show(self.name, attempts)
            stands = (len(attempts), attempts[-1].last_step if attempts else 0)
            if stands != stood:
                stood, deadline = stands, time.monotonic() + timeout_s
            if attempts and happened(attempts[-1]):
                return attempts[-1]
            if ended or time.monotonic() > deadline:
                how = "ended" if ended else f"stood still for {timeout_s:.0f} s"
                raise DemoFailed(f"the {self.name} run {how} before {what}:\n{self._last_words()}")
            time.sleep(0.05)  # files have no news to wait for

    def wait_until_done(self) -> None:
        assert self.process is not None
        self.wait_until("its last step", lambda attempt: attempt.last_step >= self.plan.steps)
        if self.process.wait(timeout=60.0) != 0:
            raise DemoFailed(f"the {self.name} run failed at its end:\n{self._last_words()}")

    def stop(self) -> None:
        """End the trainer as Ctrl-C does: Ray takes the workers down without a word to them."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60.0)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def attempts(self) -> list[Attempt]:
        return read_attempts(self._history)

    @property
    def _history(self) -> Path:
        return self.work / f"{self.name}.history"

    @property
    def _log(self) -> Path:
        return self.work / f"{self.name}.log"

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])


def run_elastic(training: Training, cluster: LocalCluster, plan: Plan, screen: Screen) -> None:
    training.start("2:3")
    training.wait_until("its first step", lambda attempt: attempt.last_step > 0)
    cluster.add_machine()
    screen.say("a third machine has joined")
    first = training.wait_until(f"step {plan.kill_at}", lambda attempt: attempt.last_step >= plan.kill_at)
    os.kill(first.pids[1], signal.SIGKILL)
    screen.say(f"killed worker 1 (pid {first.pids[1]}) after step {first.last_step}")

    second = training.wait_until("a restart", lambda attempt: attempt.attempt != first.attempt)
    second = training.wait_until(f"step {plan.stop_at}", lambda attempt: attempt.last_step >= plan.stop_at)
    training.stop()
    screen.say(f"stopped the trainer after step {second.last_step}; a new one starts with 1 worker")

    training.start("1")
    training.wait_until("a new trainer's workers", lambda attempt: attempt.attempt != second.attempt)
    training.wait_until_done()


def judge(plan: Plan, elastic: Sequence[Attempt], reference: Sequence[Attempt], picture: Path) -> str:
    """Draw both runs, and say in two lines what they show.

    Raises:
        DemoFailed: they do not show it.
    """
    try:
        points, wanted = surviving(elastic), surviving(reference)
    except ValueError as error:
        raise DemoFailed(str(error)) from error
    # Of the steps too: a group that came when all was done has trained none.
    for worlds in ([attempt.world_size for attempt in elastic], [world_size for _, _, world_size in bands(points)]):
        if worlds != [2, 3, 1]:
            raise DemoFailed(f"the elastic run was trained by {worlds} workers in turn, not by [2, 3, 1]")
    for name, of_run in (("elastic", points), ("uninterrupted", wanted)):
        if len(of_run) != plan.steps:
            raise DemoFailed(f"the {name} run has {len(of_run)} steps, not {plan.steps}")

    lost = steps_lost(elastic)
    went_back = [(attempt.began or 0, num) for attempt, num in zip(elastic[1:], lost, strict=True)]
    what = ["worker killed", "stopped, new trainer"]
    interruptions = [(step, step + num, text) for (step, num), text in zip(went_back, what, strict=True)]
    draw(picture, points, wanted, interruptions=interruptions, tolerance=TOLERANCE)

    problems = data_problems(points, wanted, plan.num_samples)
    apart = max(abs(point.loss - other.loss) for point, other in zip(points, wanted, strict=True))
    if not apart <= TOLERANCE:
        problems.append(f"the losses are {apart:.1e} apart, more than the {TOLERANCE:.0e} that rounding explains")
    if problems:
        raise DemoFailed("\n".join(problems))
    num_samples = sum(len(point.samples) for point in points)
    return (
        f"The loss of 2 -> 3 -> 1 workers is at most {apart:.1e} from the uninterrupted run's in {plan.steps} steps "
        f"(tolerance {TOLERANCE:.0e}); {num_samples:,} samples were trained, each once per epoch.\n"
        f"Steps trained again: {lost[0]} after the kill, {lost[1]} after the stop, of a save every {plan.save_every}. "
        f"Picture: {picture}"
    )


def demonstrate(plan: Plan, picture: Path, work: Path) -> None:
    screen = Screen(2 * plan.steps)
    with screen.progress, LocalCluster(num_workers=2) as cluster:
        reference = Training("uninterrupted", work, plan, screen, cluster.environment)
        elastic = Training("elastic", work, plan, screen, cluster.environment)
        try:
            reference.start(str(plan.reference_workers))
            if plan.reference_workers:
                reference.wait_until_done()
            run_elastic(elastic, cluster, plan, screen)
            if not plan.reference_workers:
                reference.wait_until_done()
        finally:
            reference.end()
            elastic.end()
    screen.say(judge(plan, elastic.attempts(), reference.attempts(), picture))


@contextmanager
def workplace(prefix: str, keep: bool) -> Iterator[Path]:
    """A directory for a demonstration, removed at its end unless `keep`. A failure ends the process with one line."""
    work = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield work
    except DemoFailed as error:
        sys.exit(f"the demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    finally:
        if keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to draw (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints, notes and logs, and say where they are")
    options = parser.parse_args()

    with workplace("ray_stateful_demo_", options.keep) as work:
        demonstrate(SHORT if options.short else FULL, options.picture, work)


if __name__ == "__main__":
    main()
