"""What runs on Ray Train's controller: a resize waits until the work it would throw away is saved.

For `RunConfig(callbacks=[ResizeGuard()])`. The driver pickles the callback to the controller, so this package must be
importable there and on the workers.

The callback classes are meant for Ray's own developers, and may differ in other versions. Where one of the hooks is
missing, `ResizeGuard` is a callback that does nothing, and warns about it.
"""

from __future__ import annotations

import logging
import posixpath
import time
import warnings
from typing import Any

import ray
from ray.train import UserCallback

from ray_stateful.save_requests import ask, wait_until_held

# A child of Ray Train's logger: the controller's process sets up no other, so a line logged elsewhere would be lost.
logger = logging.getLogger("ray.train.ray_stateful")

DEFAULT_TIMEOUT_S = 300.0

# Seconds that one look at the workers takes at most. Not shorter: each look is a task on every worker.
_LOOK_S = 0.2
_POLL_S = 2.0
# Seconds from the end of the wait to the end of the worker processes: shutdown hooks get 5 of them.
_TEARDOWN_S = 60.0

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback
except ImportError:
    _MISSING: list[str] = ["ray.train.v2._internal.execution.callback"]
else:
    _HOOKS = {
        ControllerCallback: (
            "before_controller_execute_resize_decision",
            "before_controller_execute_failure_decision",
        ),
        WorkerGroupCallback: (
            "after_worker_group_start",
            "before_worker_group_shutdown",
            "after_worker_group_abort",
        ),
        ReportCallback: ("after_report",),
    }
    _MISSING = [
        f"{callback.__name__}.{name}"
        for callback, names in _HOOKS.items()
        for name in names
        if not hasattr(callback, name)
    ]


class _NotSaved(Exception):
    """Why there is no checkpoint of the step at which the resize came."""


class _Guard:
    """The hooks. None of them raises: an exception in one of them would end the run."""

    def __init__(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        if timeout_s <= 0:
            raise ValueError(
                f"timeout_s is {timeout_s}; it must be above 0: the seconds by which a resize may be delayed"
            )
        self.timeout_s = timeout_s
        self._group: Any = None
        self._failed = False
        self._number = 0
        self._registered: str | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group, self._failed = worker_group, False

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._group = None

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._group = None

    def after_report(self, training_report: Any, metrics: Any) -> None:
        # Ray calls its own checkpoint manager first: by now the checkpoint is registered, and its snapshot written.
        checkpoint = getattr(training_report, "checkpoint", None)
        if checkpoint is not None:
            self._registered = posixpath.basename(str(checkpoint.path))

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._failed = True

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        # Also called before the first start, when there is no group yet, and before a restart, when the group has died.
        if self._group is None or self._failed:
            return
        began = time.monotonic()
        try:
            outcome = self._save(resize_decision, began + self.timeout_s)
        except _NotSaved as reason:
            logger.warning("%s; the steps since the last checkpoint are lost", reason)
        except Exception:  # whatever it is, a resize that costs some steps is better than no run
            logger.warning("saving before a resize failed; steps since the last checkpoint are lost", exc_info=True)
        else:
            logger.info("%s (resize delayed by %.1f s)", outcome, time.monotonic() - began)

    def _save(self, decision: Any, deadline: float) -> str:
        """Have the workers save, and wait until Ray has registered the checkpoint. Returns what happened."""
        group = self._group
        change = f"resize of {len(group)} to {decision.num_workers} workers"
        self._number += 1
        hold_s = self.timeout_s + _TEARDOWN_S
        listening = ray.get(group.execute_async(ask, self._number, change, hold_s), timeout=self.timeout_s)
        if not any(listening):
            raise _NotSaved(f"{change}: no Checkpointer looks for requests to save, or not any more")
        while (left := deadline - time.monotonic()) > 0:
            looks = group.execute_async(wait_until_held, self._number, min(_LOOK_S, left))
            held = ray.get(looks, timeout=left + _LOOK_S)
            # This takes the reports from the workers, and registers them: nobody else does it while we are here.
            status = group.poll_status(timeout=min(_POLL_S, left))
            if status.errors:
                raise _NotSaved(f"{change}: {status.get_error_string()}")
            if all(held):
                saved = {each.saved for each in held}
                if None in saved:
                    raise _NotSaved(f"{change}: the save failed, see the log of the workers")
                if not all(each.is_counted for each in held):
                    return f"{change}: saved {saved.pop()} first, outside of this run, no step is lost"
                if self._registered in saved:
                    return f"{change}: saved {self._registered} first, no step is lost"
            elif status.finished:
                return f"{change}: training ended first"
        raise _NotSaved(f"{change}: no checkpoint in {self.timeout_s:.0f} s")


if _MISSING:

    class ResizeGuard(UserCallback):
        """Does nothing: this version of Ray lacks the hooks. A resize loses the steps since the last checkpoint."""

        def __init__(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
            warnings.warn(
                f"ResizeGuard does nothing with Ray {ray.__version__}, which lacks {', '.join(_MISSING)}: an elastic"
                " resize loses the steps since the last checkpoint",
                stacklevel=2,
            )

else:

    class ResizeGuard(_Guard, ControllerCallback, WorkerGroupCallback, ReportCallback):  # type: ignore[no-redef]
        """Lose no step to an elastic resize: `RunConfig(callbacks=[ResizeGuard()])`.

        Before Ray replaces the worker group by a larger or smaller one, the workers are asked to save at their next
        step boundary and to wait there; the resize goes on when Ray has registered that checkpoint, and the new group
        starts from that very step. The first start, and restarts after a failure, are left alone.

        The controller does nothing else in the meantime, so the wait has a limit. Whatever goes wrong is a warning
        in its log, and the resize goes on as it would have without the guard.

        Args:
            timeout_s: The longest that a resize is put off, in seconds: enough for one step and one save.
        """
