"""A machine is announced to be taken away: the run saves before the deadline, and goes on without it.

Starts a Ray cluster of its own on this machine, with two machines of one logical CPU, and trains the same model twice:
without Ray and without a break; and with a worker on each machine, one of which is drained, as a cloud does it with a
spot instance, a node pool with its nodes, or `ray drain-node` by hand:

    Ray tells the workers which of them will be gone, and when; `Checkpointer` looks at every step, and saves
    the machine goes as soon as that checkpoint is whole, which is allowed at any time up to the deadline
    Ray restarts the run on what is left, from that checkpoint

No other save is due in all that time. Fails when none was there before the deadline, when the run went on from
anything else, when the losses are further apart than rounding explains, or when the steps that survived trained a
sample twice in an epoch or left one out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import TOLERANCE, DemoFailed, Plan, Screen, Training, workplace
from elastic import ElasticCluster
from history import Attempt, data_problems, steps_lost, surviving

from ray_stateful.format import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionPlan(Plan):
    """`announce_at` is in steps; `notice_s` is how long before the machine goes it is announced."""

    announce_at: int
    notice_s: float


PLAN = PreemptionPlan(
    steps=72,
    save_every=10_000,  # never: what is saved before the end is saved because a machine goes
    announce_at=8,
    notice_s=60.0,
    num_samples=404,
    dim=256,
    num_layers=2,
    reference_workers=0,
    pace_s=0.15,
    kill_at=0,  # these two are for the other demo
    stop_at=0,
)


class PreemptibleCluster(ElasticCluster):
    """A cluster that is told of a machine's end before it comes."""

    def __init__(self, num_machines: int) -> None:
        super().__init__(num_machines)
        # Ray Train looks for drained machines, for the run's own processes: every 5 s if nothing is said.
        self.environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"
        self.environment["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.2"
        self._leaving = next(iter(self._cluster.worker_nodes))

    def announce(self, notice_s: float) -> float:
        """Drain a machine; when it will be gone, as UNIX time in seconds."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline_s = time.time() + notice_s
        accepted, why = GcsClient(address=self._cluster.address).drain_node(
            self._leaving.node_id,
            DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            "the cloud wants it back",
            int(deadline_s * 1000),
        )
        if not accepted:
            raise DemoFailed(f"Ray does not drain the machine: {why}")
        return deadline_s

    def take_away(self) -> None:
        self._remove(self._leaving)


def committed(run: Path) -> dict[int, str]:
    """Step to name of the whole checkpoints under `run`."""
    found = [layout.parse_name(path.parent.name) for path in run.glob(f"checkpoint_s*/{layout.MANIFEST}")]
    return {name.step: str(name) for name in found if name is not None}


def run_preempted(training: Training, cluster: PreemptibleCluster, plan: PreemptionPlan, screen: Screen) -> int:
    """Train through a preemption; the step that was saved because of it."""
    run = training.work / training.name
    training.start("1:2")
    first = training.wait_until(f"step {plan.announce_at}", lambda attempt: attempt.last_step >= plan.announce_at)
    deadline_s = cluster.announce(plan.notice_s)
    screen.say(f"after step {first.last_step}: a machine will be gone in {plan.notice_s:.0f} s")

    training.wait_until("a save", lambda _: bool(committed(run)), timeout_s=plan.notice_s)
    left_s = deadline_s - time.time()
    ((step, name),) = committed(run).items()
    screen.say(f"saved {name} (step {step}), {left_s:.1f} s before the deadline")
    if left_s <= 0:
        raise DemoFailed("the checkpoint came after the deadline")

    cluster.take_away()
    screen.say("the machine is gone")
    training.wait_until("a restart", lambda attempt: attempt.attempt != first.attempt)
    training.wait_until_done()
    return step


def judge(plan: PreemptionPlan, saved: int, preempted: Sequence[Attempt], reference: Sequence[Attempt]) -> str:
    """Say in two lines what the runs show.

    Raises:
        DemoFailed: they do not show it.
    """
    worlds = [(attempt.world_size, attempt.began) for attempt in preempted]
    if worlds != [(2, 0), (1, saved)]:
        raise DemoFailed(f"(workers, after step) were {worlds}, not {[(2, 0), (1, saved)]}")
    points, wanted = surviving(preempted), surviving(reference)
    for name, of_run in (("preempted", points), ("uninterrupted", wanted)):
        if len(of_run) != plan.steps:
            raise DemoFailed(f"the {name} run has {len(of_run)} steps, not {plan.steps}")
    problems = data_problems(points, wanted, plan.num_samples)
    apart = max(abs(point.loss - other.loss) for point, other in zip(points, wanted, strict=True))
    if not apart <= TOLERANCE:
        problems.append(f"the losses are {apart:.1e} apart, more than the {TOLERANCE:.0e} that rounding explains")
    if problems:
        raise DemoFailed("\n".join(problems))
    (lost,) = steps_lost(preempted)
    return (
        f"2 workers trained {preempted[0].last_step} steps; 1 went on after step {saved}, which was saved for the "
        f"preemption. Trained again: {lost} steps, which came between that save and the machine's end.\n"
        f"The loss is at most {apart:.1e} from the uninterrupted run's in {plan.steps} steps (tolerance "
        f"{TOLERANCE:.0e}); {sum(len(point.samples) for point in points):,} samples were trained, each once per epoch."
    )


def demonstrate(plan: PreemptionPlan, work: Path) -> None:
    screen = Screen(2 * plan.steps)
    with screen.progress, PreemptibleCluster(num_machines=2) as cluster:
        reference = Training("uninterrupted", work, plan, screen, cluster.environment)
        preempted = Training("preempted", work, plan, screen, cluster.environment)
        try:
            # Beside the other run, which waits for its workers to start most of the time.
            reference.start(str(plan.reference_workers))
            saved = run_preempted(preempted, cluster, plan, screen)
            reference.wait_until_done()
        finally:
            reference.end()
            preempted.end()
    screen.say(judge(plan, saved, preempted.attempts(), reference.attempts()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep checkpoints, notes and logs, and say where they are")
    options = parser.parse_args()

    with workplace("ray_stateful_preemption_", options.keep) as work:
        demonstrate(PLAN, work)


if __name__ == "__main__":
    main()
