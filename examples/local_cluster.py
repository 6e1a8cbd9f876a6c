"""A Ray cluster on this machine, of its own, to which machines can be added while it works.

Its machines are Ray nodes that share this host: each has as many logical CPUs as it takes workers, whatever the host
has.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from types import TracebackType
from typing import Any

_ENVIRONMENT = {
    # Each worker has one logical CPU. Also for processes that are not Ray's: more threads than cores slow everything.
    "OMP_NUM_THREADS": "1",
    # A dead worker is noticed after half a second, not two: the demo kills one to show what comes after.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nobody looks at the metrics, and no machine of this cluster is announced to go away.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class LocalCluster:
    """A cluster with room for `num_workers`. `environment` is for processes that are to use it.

    Leaves other clusters of this host alone, and is not found by them: it keeps its files, and the note of its address
    that `ray.init` looks for, in a directory of its own.
    """

    def __init__(self, num_workers: int) -> None:
        # Short, as sockets below it have names of 107 bytes at most.
        self._directory = tempfile.mkdtemp(prefix="rs_")
        os.environ |= {**_ENVIRONMENT, "RAY_TMPDIR": self._directory}
        # Only now: Ray reads these when it is imported.
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        # Ray takes port 8265 also without a dashboard, and complains where another Ray has it. None: any that is free.
        head = {"num_cpus": num_workers, "include_dashboard": False, "dashboard_port": None}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.environment = {**os.environ, "RAY_ADDRESS": self._cluster.address, "PYTHONUNBUFFERED": "1"}

    def add_machine(self) -> None:
        """One more machine, with room for one worker, for the next worker group to use."""
        self._cluster.add_node(num_cpus=1)
        # Ray Train counts what it may use through an actor that looks at the cluster every 20 s: have it look now.
        ray = self._ray
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            ray.get(coordinator.get_reserved_resources.remote("demo", recompute=True))
        finally:
            ray.shutdown()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._directory, ignore_errors=True)  # a process of Ray's may be writing its last log line
