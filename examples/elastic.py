"""Machines come and go while a model trains: no step is lost to a planned change, and the loss does not notice any.

Starts a Ray cluster of its own on this machine, one logical CPU to each of its machines, and trains the same model
twice: without Ray and without a break; and elastically, with as many workers as there are machines (one to four):

    2 -> 3, 3 -> 4     a machine joins, and Ray resizes the run
    4 -> 3             somebody else wants a machine: Ray resizes the run, and then the machine leaves the cluster
    3 -> 2             a machine is switched off without a word, the worker on it dies, and Ray restarts the run

Prints each resume report as it comes, and how many steps each change cost; draws both losses. Fails when a planned
change cost a step, when the losses are further apart than rounding explains, or when the steps that survived trained
a sample twice in an epoch or left one out. With --no-guard, nobody saves before a resize: compare what that costs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demo import TOLERANCE, DemoFailed, Plan, Screen, Training, workplace
from history import Attempt, data_problems, steps_lost, surviving
from local_cluster import LocalCluster
from plot import draw

# Seconds for a group of workers to end and another to start.
_CHANGE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticPlan(Plan):
    """`steps_each` is how many steps each group of workers trains before the next of the `changes`; at the least."""

    steps_each: int
    changes: tuple[Change, ...]
    guard: bool

    def arguments(self) -> list[str]:
        # Given once more, as the last one counts: look for machines often, and restart more than once if need be.
        changes = ["--resize-after", "1", "--max-failures", "3", *([] if self.guard else ["--no-guard"])]
        return [*Plan.arguments(self), *changes]


class ElasticCluster(LocalCluster):
    """A cluster whose head has no room for workers, and whose machines can be taken away."""

    def __init__(self, num_machines: int) -> None:
        # A group is planned with a machine that has just gone, at times: how long it waits for that one.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
        super().__init__(num_workers=0)
        self._num_added = 0
        with self._driver():
            # Who has asked first is served first, also when it asks for more later. Here, for next to nothing.
            self._want([{"memory": 1}])
        for _ in range(num_machines):
            self.add_machine()

    def add_machine(self) -> None:
        self._num_added += 1
        # Each has a resource of its own by which it can be asked for.
        self._cluster.add_node(num_cpus=1, resources={f"machine_{self._num_added}": 1})
        self._look()

    def take(self) -> None:
        """Somebody else wants room for one worker."""
        with self._driver():
            self._want([{"CPU": 1}])

    def remove_idle(self) -> None:
        """Remove the machine that has no worker any more."""
        with self._driver():
            idle, resources = next((node, free) for node, free in self._machines() if free.get("CPU"))
            # From now on it is this machine that is wanted, so training does not get it, here or gone.
            self._want([{"CPU": 1, name: 1} for name in resources if name.startswith("machine_")])
        self._remove(idle)

    def switch_off_busy(self) -> None:
        """A machine with a worker is gone, without notice."""
        with self._driver():
            busy = next(node for node, free in self._machines() if not free.get("CPU"))
        self._remove(busy)

    def _remove(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)
        # Until it is known to be gone, it is counted on.
        self._cluster.wait_for_nodes()
        self._look()

    @contextmanager
    def _driver(self) -> Iterator[None]:
        """Connected only for as long as it takes: Ray prints all it knows of a machine that dies meanwhile."""
        self._ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            self._ray.shutdown()

    def _machines(self) -> list[tuple[Any, dict[str, float]]]:
        """The machines, and what of each is free."""
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [(node, free.get(node.node_id, {})) for node in self._cluster.worker_nodes]

    def _want(self, resources: list[dict[str, float]]) -> None:
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as autoscaling

        coordinator = autoscaling.get_or_create_autoscaling_coordinator()
        priority = autoscaling.ResourceRequestPriority.HIGH
        self._ray.get(coordinator.request_resources.remote("somebody else", resources, 3600, priority=priority))

    def _look(self) -> None:
        """Have the coordinator count the machines now; by itself it does every 20 s."""
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as autoscaling

        with self._driver():
            coordinator = autoscaling.get_or_create_autoscaling_coordinator()
            self._ray.get(coordinator.get_reserved_resources.remote("demo", recompute=True))


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to the machines, and to how many workers that leads. `planned`: Ray knows before it is so."""

    says: str
    label: str
    workers: int
    planned: bool
    happens: Callable[[ElasticCluster], None]


CHANGES = (
    Change("a third machine joins", "machine joins", 3, True, ElasticCluster.add_machine),
    Change("a fourth machine joins", "machine joins", 4, True, ElasticCluster.add_machine),
    Change("somebody else wants a machine", "machine given up", 3, True, ElasticCluster.take),
    Change("a machine is switched off", "machine lost", 2, False, ElasticCluster.switch_off_busy),
)


# The number of samples makes an epoch end in a batch of two: some workers have no sample in it.
PLAN = ElasticPlan(
    steps=320,
    save_every=20,
    steps_each=45,
    changes=CHANGES,
    num_samples=2002,
    dim=256,
    num_layers=2,
    reference_workers=0,
    pace_s=0.15,
    guard=True,
    kill_at=0,  # these two are for the other demo
    stop_at=0,
)

# Three groups of workers instead of five, in little more than a minute.
SHORT = replace(PLAN, steps=80, steps_each=12, changes=(CHANGES[0], CHANGES[-1]), num_samples=402, dim=64)


def run_elastic(training: Training, cluster: ElasticCluster, plan: ElasticPlan, screen: Screen) -> None:
    training.start("1:4")
    group = training.wait_until("its first step", lambda attempt: attempt.last_step > 0)
    for change in plan.changes:
        until = (group.began or 0) + plan.steps_each
        group = training.wait_until(f"step {until}", lambda attempt, until=until: attempt.last_step >= until)
        change.happens(cluster)
        screen.say(f"after step {group.last_step}: {change.says}")
        before = group.attempt
        group = training.wait_until(
            f"going on with {change.workers} workers",
            lambda attempt, before=before: attempt.attempt != before and attempt.last_step > (attempt.began or 0),
            _CHANGE_S,
        )
        if change.happens is ElasticCluster.take:
            cluster.remove_idle()
            screen.say("the machine that nobody uses any more leaves")
    training.wait_until_done()


def judge(plan: ElasticPlan, elastic: Sequence[Attempt], reference: Sequence[Attempt], picture: Path) -> str:
    """Draw both runs, and say in some lines what they show.

    Raises:
        DemoFailed: they do not show it.
    """
    worlds, lost = [attempt.world_size for attempt in elastic], steps_lost(elastic)
    wanted_worlds = [2, *(change.workers for change in plan.changes)]
    if worlds != wanted_worlds:
        raise DemoFailed(f"the elastic run was trained by {worlds} workers in turn, not by {wanted_worlds}")
    points, wanted = surviving(elastic), surviving(reference)
    for name, of_run in (("elastic", points), ("uninterrupted", wanted)):
        if len(of_run) != plan.steps:
            raise DemoFailed(f"the {name} run has {len(of_run)} steps, not {plan.steps}")

    told = list(zip(elastic, elastic[1:], plan.changes, lost, strict=False))
    marks = [(after.began or 0, (after.began or 0) + num, change.label) for _, after, change, num in told]
    draw(picture, points, wanted, interruptions=marks, tolerance=TOLERANCE)
    lines = [
        f"{before.world_size} -> {after.world_size} workers, {change.label}: had trained step {before.last_step}, "
        f"went on after step {after.began}: {num} step{'' if num == 1 else 's'} lost"
        for before, after, change, num in told
    ]

    problems = data_problems(points, wanted, plan.num_samples)
    apart = max(abs(point.loss - other.loss) for point, other in zip(points, wanted, strict=True))
    if not apart <= TOLERANCE:
        problems.append(f"the losses are {apart:.1e} apart, more than the {TOLERANCE:.0e} that rounding explains")
    planned = [num for _, _, change, num in told if change.planned]
    if plan.guard and any(planned):
        problems.append(f"planned changes cost {planned} steps, and the guard is there so that they cost none")
    if problems:
        raise DemoFailed("\n".join([*lines, *problems]))
    guard = "with ResizeGuard" if plan.guard else "without ResizeGuard"
    return "\n".join(
        [
            *lines,
            f"{sum(planned)} steps lost to {len(planned)} planned change{'' if len(planned) == 1 else 's'}, {guard}; "
            f"a save is made every {plan.save_every} steps.",
            f"The loss is at most {apart:.1e} from the uninterrupted run's in {plan.steps} steps (tolerance "
            f"{TOLERANCE:.0e}); {sum(len(point.samples) for point in points):,} samples were trained, each once per "
            f"epoch. Picture: {picture}",
        ]
    )


def demonstrate(plan: ElasticPlan, picture: Path, work: Path) -> None:
    screen = Screen(2 * plan.steps)
    with screen.progress, ElasticCluster(num_machines=2) as cluster:
        reference = Training("uninterrupted", work, plan, screen, cluster.environment)
        elastic = Training("elastic", work, plan, screen, cluster.environment)
        try:
            # Beside the elastic run, which waits for its workers to start most of the time.
            reference.start(str(plan.reference_workers))
            run_elastic(elastic, cluster, plan, screen)
            reference.wait_until_done()
        finally:
            reference.end()
            elastic.end()
    screen.say(judge(plan, elastic.attempts(), reference.attempts(), picture))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--picture", type=Path, default=Path("elastic.png"), help="where to draw (default: %(default)s)"
    )
    parser.add_argument("--short", action="store_true", help="one machine joins, and one is switched off; fewer steps")
    parser.add_argument("--no-guard", action="store_true", help="do not save before Ray resizes the run")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints, notes and logs, and say where they are")
    options = parser.parse_args()

    plan = replace(SHORT if options.short else PLAN, guard=not options.no_guard)
    with workplace("ray_stateful_elastic_", options.keep) as work:
        demonstrate(plan, options.picture, work)


if __name__ == "__main__":
    main()
