"""The score by which Ray keeps the best checkpoints (`checkpoint_score_attribute`): a finite number in every report.

Without that metric Ray takes minus infinity, and where the lowest is the best (`checkpoint_score_order`) it negates it:
the checkpoint would be the best forever. NaN and infinities are null in Ray's snapshot of a run: the next driver that
loads it multiplies `None` at its first report, and no run of this name can report any more.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def scored(metrics: dict[str, Any]) -> dict[str, Any]:
    """`metrics`; in a run that keeps the best, with a finite score. What has none gets the worst there is.

    Raises:
        ValueError: the metric is neither a number nor `None`.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        config = get_train_context().train_run_context.run_config.checkpoint_config
    except (ImportError, AttributeError, RuntimeError):  # another version of Ray; local mode
        return metrics
    if config is None or config.checkpoint_score_attribute is None:
        return metrics
    worst = sys.float_info.max * (1 if config.checkpoint_score_order == "min" else -1)
    return with_score(metrics, config.checkpoint_score_attribute, worst)


def with_score(metrics: dict[str, Any], name: str, worst: float) -> dict[str, Any]:
    """`metrics` with a finite number at `name`, which is "a/b" for {"a": {"b": ...}}, as Ray flattens them. Pure."""
    found = _replaced(metrics, name, worst)
    return {**metrics, name: worst} if found is None else found


def _replaced(metrics: Mapping[str, Any], name: str, worst: float) -> dict[str, Any] | None:
    if name in metrics:
        return {**metrics, name: _finite(metrics[name], name, worst)}
    for key, value in metrics.items():
        if isinstance(value, Mapping) and name.startswith(f"{key}/"):
            inner = _replaced(value, name[len(key) + 1 :], worst)
            if inner is not None:
                return {**metrics, key: inner}
    return None


def _finite(value: Any, name: str, worst: float) -> float:
    if not isinstance(value, int | float | None):
        raise ValueError(f"metric {name!r} is {value!r}; Ray keeps the best checkpoints by it, so give a number")
    if value is None or value != value:
        return worst
    return max(-sys.float_info.max, min(value, sys.float_info.max))
