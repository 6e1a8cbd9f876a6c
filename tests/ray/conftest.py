"""One local Ray cluster for all tests of this directory, on free ports, and a way to run a training function on it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray import cloudpickle
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_ENVIRONMENT = {
    # Ray Train looks at its workers this often; the default of 2 s is what a short run would spend its time on.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    # Resources that are not here now do not come later, unless a test brings them.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray announces a change of this default with a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

# Ray Train makes a `DataContext` for every run, and that sets settings of its own which Ray Data has deprecated.
_RAY_WARNS_ITSELF = "ignore::DeprecationWarning:ray.data.context"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(_RAY_WARNS_ITSELF))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head node with CPUs; tests add nodes, and remove what they added. Never `AutoscalingCluster`: it ends every
    Ray on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        # Without a port to look for, Ray takes a free one; its default is another Ray's on the same machine.
        head = {"num_cpus": 16, "include_dashboard": False, "dashboard_port": None}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=bool(os.environ.get("RAY_TEST_LOGS")), logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def drain(cluster: Cluster) -> Callable[[str, float], None]:
    """`drain(node_id, seconds)`: announce that a node will be taken away by then, as a cloud does it."""

    def announce(node_id: str, seconds: float) -> None:
        accepted, why = GcsClient(address=cluster.address).drain_node(
            node_id,
            autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            "the test takes it away",
            int((time.time() + seconds) * 1000),
        )
        assert accepted, why

    return announce


@pytest.fixture
def fit(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., ray.train.Result]:
    """`fit(function, config, num_workers=2, **run_config)`: a run called "run" stored under `tmp_path`."""
    # Workers can't import test modules: what a training function refers to travels with it.
    cloudpickle.register_pickle_by_value(sys.modules[request.module.__name__])

    def run(
        function: Callable[[dict[str, Any]], Any],
        config: dict[str, Any] | None = None,
        num_workers: int | tuple[int, int] = 2,
        scaling: dict[str, Any] | None = None,
        trainer: type[DataParallelTrainer] = DataParallelTrainer,
        **run_config: Any,
    ) -> ray.train.Result:
        return trainer(
            function,
            train_loop_config={"tmp_path": str(tmp_path), **(config or {})},
            scaling_config=ray.train.ScalingConfig(num_workers=num_workers, **(scaling or {})),
            run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path), **run_config),
        ).fit()

    return run
