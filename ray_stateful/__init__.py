"""Elastic, verified, cloud-native checkpoints for Ray Train.

Three levels, each usable without the one above: `ModelState` and `OptimizerState` with plain
`torch.distributed.checkpoint`; `save` and `restore`; `Checkpointer`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_stateful.checkpoint import restore, save
    from ray_stateful.checkpointer import Checkpointer
    from ray_stateful.ray_callbacks import ResizeGuard
    from ray_stateful.report import ResumeReport, SaveReport
    from ray_stateful.stateful_wrappers import ModelState, OptimizerState
    from ray_stateful.states.batches import GlobalBatchSampler
    from ray_stateful.states.gradients import accumulate
    from ray_stateful.states.loader import LoaderState
    from ray_stateful.states.progress import Progress
    from ray_stateful.states.random import RandomState

# Imported on first use: the command line must do without torch, and a training process without Ray's controller.
_MODULES = {
    "Checkpointer": "checkpointer",
    "GlobalBatchSampler": "states.batches",
    "LoaderState": "states.loader",
    "ModelState": "stateful_wrappers",
    "OptimizerState": "stateful_wrappers",
    "Progress": "states.progress",
    "RandomState": "states.random",
    "ResizeGuard": "ray_callbacks",
    "ResumeReport": "report",
    "SaveReport": "report",
    "accumulate": "states.gradients",
    "restore": "checkpoint",
    "save": "checkpoint",
}

__all__ = [
    "Checkpointer",
    "GlobalBatchSampler",
    "LoaderState",
    "ModelState",
    "OptimizerState",
    "Progress",
    "RandomState",
    "ResizeGuard",
    "ResumeReport",
    "SaveReport",
    "accumulate",
    "restore",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
