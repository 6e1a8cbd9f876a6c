"""Emits figures as Ray metrics: from a Ray process to the metrics endpoint of its node, where Prometheus finds them.

Which figures there are is defined in `ray_stateful.meters`. In a process that is not connected to Ray, nothing is
emitted, and ray is not imported.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

logger = logging.getLogger(__name__)

# Tag keys of Ray Train's own metrics, so that a dashboard can join ours with them and filter both together.
RUN = "ray_train_run_name"
RANK = "ray_train_worker_world_rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """One metric.

    `name` is what Ray is given, `exported` what Ray exports it as. `tags` are the tag keys besides the run's name.
    `boundaries` are the upper ends of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One value for a meter: the increment of a counter, the new value of a gauge, an observation for a histogram."""

    meter: Meter
    value: float
    tags: Mapping[str, str] = field(default_factory=dict)


_made: dict[str, Any] = {}
_lock = threading.Lock()
_has_failed = False


def emit(samples: Iterable[Sample], run_name: str) -> None:
    """Give `samples` to Ray. Never raises: a lost figure is no reason to lose a checkpoint."""
    global _has_failed
    if "ray" not in sys.modules:
        return
    try:
        import ray

        if ray.is_initialized():
            for sample in samples:
                _give(sample, {RUN: run_name, **sample.tags})
    except Exception:  # whatever it is, the save goes on
        if not _has_failed:
            # Logged once: whatever the cause, it will be the same at every save.
            logger.warning("metrics of this worker are incomplete (logged only once)", exc_info=True)
        _has_failed = True


def _give(sample: Sample, tags: dict[str, str]) -> None:
    # A background save emits from its own thread.
    with _lock:
        if sample.meter.name not in _made:
            _made[sample.meter.name] = _make(sample.meter)
        metric = _made[sample.meter.name]
    if sample.meter.kind == "gauge":
        metric.set(sample.value, tags)
    elif sample.meter.kind == "histogram":
        metric.observe(sample.value, tags)
    elif sample.value > 0:  # Ray refuses an increment of nothing
        metric.inc(sample.value, tags)


def _make(meter: Meter) -> Any:
    from ray.util import metrics

    keys = (RUN, *meter.tags)
    if meter.kind == "histogram":
        return metrics.Histogram(meter.name, meter.help, boundaries=list(meter.boundaries), tag_keys=keys)
    kind = metrics.Counter if meter.kind == "counter" else metrics.Gauge
    return kind(meter.name, meter.help, tag_keys=keys)
