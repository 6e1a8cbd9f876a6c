"""What this worker is to Ray Train: the run it belongs to, its reports, its preemption.

`ray` is imported inside functions only. Processes that are no Ray workers import this module too, and would pay
seconds for nothing; inside a worker, ray has long been imported. What runs on Ray's controller is in
`ray_stateful.ray_callbacks`.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import pyarrow.fs

from ray_stateful import ray_scores
from ray_stateful.errors import ReportFailed, StorageError
from ray_stateful.format import layout
from ray_stateful.format.strict_json import check_containers
from ray_stateful.plain_metrics import plain_metrics
from ray_stateful.printable import printable
from ray_stateful.runs import DirectoryRun, Run, committed
from ray_stateful.storage.base import Storage
from ray_stateful.storage.credentials import without_credentials
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.uris import resolve, with_timeouts

logger = logging.getLogger(__name__)

# Ray's own record of the checkpoints that were reported, and that it will delete when there are too many.
SNAPSHOT = "checkpoint_manager_snapshot.json"
MAX_SNAPSHOT_BYTES = 256 << 20
_MIN_CONTAINER_BYTES = 8  # a checkpoint has a few lists and objects, in some 200 bytes

_SCHEMES = {"s3": "s3", "gcs": "gs", "abfs": "abfss", "hdfs": "hdfs"}

# Of this process, not of a run object: a failed report spoils Ray's counter of reports, of which a worker has one.
_failed_report: str | None = None


@dataclass(frozen=True, slots=True)
class RayRun:
    """The run of this Ray Train worker.

    `filesystem` is the very one that Ray stores to: Ray refuses the report of a checkpoint on a different one.
    """

    storage: Storage
    path: str
    uri: str
    filesystem: pyarrow.fs.FileSystem

    def prepare_report(self, metrics: dict[str, Any]) -> dict[str, Any]:
        # Raised here, where it reaches all ranks: in `report`, the others would wait in Ray's barrier for this one.
        if _failed_report is not None:
            raise RuntimeError(
                f"an earlier report of this worker failed, and no later one can be made: {_failed_report}"
            )
        # Converted here, where a refusal costs nothing: a metric that Ray can't store ends its controller, and the run.
        return ray_scores.scored(plain_metrics(metrics))

    def report(self, prepared: dict[str, Any], name: str) -> None:
        """Report checkpoint `name` to Ray Train. It begins with a barrier: all ranks call it, or none does.

        Raises:
            ReportFailed: on the rank whose report fails, and from then on at every call in its process.
        """
        global _failed_report
        import ray.train

        path = posixpath.join(self.path, name)
        if _failed_report is not None:
            raise ReportFailed(path, {_rank(): f"an earlier report of this worker failed: {_failed_report}"})
        checkpoint = ray.train.Checkpoint(path=path, filesystem=self.filesystem)
        try:
            # NO_UPLOAD: the files are in place. Other modes copy them onto themselves, and one then deletes them.
            ray.train.report(
                prepared,
                checkpoint=checkpoint,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
                delete_local_checkpoint_after_upload=False,
            )
        except Exception as error:  # whatever it is, Ray's count of reports is out of step after it
            # Ray has counted this report and not finished it: the next one would wait for its turn for ever.
            _failed_report = f"{type(error).__name__}: {error}"
            raise ReportFailed(path, {_rank(): _failed_report}) from error

    def candidates(self) -> list[str]:
        """What to resume from, newest first.

        First the committed checkpoints that Ray does not know and that are newer than all it knows: the workers died,
        or the report failed, between the commit and the report. Their manifests prove them as whole as any other, and
        resuming from an older one would train the same steps again. Finding them takes one listing of the run's
        directory, which has one name per checkpoint, and a look into each newer one, of which there is usually at most
        one. Then the checkpoint that Ray hands over, and then those that its snapshot lists, the last reported first.

        Unreported checkpoints that are not newer are ignored: an abandoned attempt left them behind.
        """
        reported = self._handed_over()
        try:
            reported += [name for name in self._snapshot_names() if name not in reported]
        except StorageError as error:
            # Ray rewrites the file in place, so that a reader may see half of it.
            logger.warning("resuming without Ray's list of checkpoints: %s", error)
        names = self._unreported(reported) + reported
        if names:
            logger.info(
                "run %s has %d checkpoint(s), and goes on from the newest intact one, because a run of this name has"
                " been here before; to start from scratch, choose another RunConfig(name=...)",
                self.uri,
                len(names),
            )
        return names

    def never_reported(self, name: str) -> bool:
        """Whether Ray does not count `name`: after its commit the workers died, or their report failed.

        Raises:
            StorageError: the snapshot can't be read at this moment. A checkpoint must not be reported twice: with
                `num_to_keep` the second report would make Ray delete it as the older of two.
        """
        # What Ray hands over counts, too: it shows a report of this process at once, the snapshot only some time later.
        return name not in self._handed_over() and name not in self._snapshot_names()

    def tracked(self) -> frozenset[str]:
        """The checkpoints that Ray counts. Ray fails if anybody else deletes one of them.

        Raises:
            StorageError: the snapshot can't be read at this moment; so nothing may be deleted.
        """
        return frozenset(self._snapshot_names())

    def _handed_over(self) -> list[str]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return []
        # Never `as_directory`: it downloads the whole checkpoint to this machine.
        name = posixpath.relpath(checkpoint.path, self.path)
        if not _is_inside(name):
            logger.warning("Ray hands over checkpoint %s, which is not of run %s: ignored", checkpoint.path, self.uri)
            return []
        return [name]

    def _snapshot_names(self) -> list[str]:
        path = posixpath.join(self.path, SNAPSHOT)
        try:
            raw = self.storage.read(path, 0, MAX_SNAPSHOT_BYTES + 1)
        except FileNotFoundError:
            return []
        try:
            if len(raw) > MAX_SNAPSHOT_BYTES:
                raise ValueError(f"more than {MAX_SNAPSHOT_BYTES:,} bytes")
            text = raw.decode()
            check_containers(text, _MIN_CONTAINER_BYTES)
            snapshot = json.loads(text)
            results = [*snapshot["checkpoint_results"], snapshot.get("latest_checkpoint_result")]
            results += snapshot.get("pending_training_results") or []
            # In the order of their reports: the list itself is sorted by score when the run keeps the best ones.
            order = snapshot.get("checkpoint_report_indices") or []
            newest_first = sorted(range(len(order)), key=order.__getitem__, reverse=True)
            results = [results[position] for position in newest_first] + results
            names = [result["checkpoint_dir_name"] for result in results if result is not None]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise StorageError(
                "read", path, f"not Ray's list of checkpoints: {type(error).__name__}: {error}"
            ) from error
        # The file is data from the storage: a name in it must not lead out of the run's directory.
        return list(dict.fromkeys(name for name in names if isinstance(name, str) and _is_inside(name)))

    def _unreported(self, reported: list[str]) -> list[str]:
        known = [layout.parse_name(name) for name in reported]
        if reported and not any(known):
            # No step to compare with: none of the reported checkpoints has a name of ours.
            return []
        newest = max((name.step for name in known if name is not None), default=-1)
        found = filter(None, map(layout.parse_name, self.storage.directories(self.path)))
        return list(committed(self.storage, self.path, (name for name in found if name.step > newest)))


class LocalModeRun(DirectoryRun):
    """The run of Ray Train's local mode (`num_workers=0`), which has no storage: a directory that the user can find.

    Reports reach `Result.metrics` and `Result.checkpoint`, and are forgotten with the process; the directory stays.
    """

    __slots__ = ()

    def prepare_report(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return plain_metrics(metrics)

    def report(self, prepared: dict[str, Any], name: str) -> None:
        import ray.train

        ray.train.report(prepared, checkpoint=ray.train.Checkpoint(posixpath.join(self.path, name)))


def current_run() -> Run | None:
    """The run of the training function that calls this; `None` outside of one.

    Raises:
        RuntimeError: the worker is one of Ray Train V1, which can't report without an upload.
    """
    if "ray.train" not in sys.modules:
        return None
    import ray.train

    try:
        context = _context()
    except (RuntimeError, DeprecationWarning):  # a driver; a trial of Ray Tune
        return None
    try:
        storage = context.get_storage()
    except NotImplementedError:  # what Ray raises in its local mode, which has no storage
        return _local_mode_run(context.get_experiment_name())
    if storage is None:
        return None
    if not hasattr(ray.train, "CheckpointUploadMode"):
        raise RuntimeError("this worker is one of Ray Train V1; set RAY_TRAIN_V2_ENABLED=1 for the driver")
    filesystem, path = storage.storage_filesystem, storage.experiment_fs_path
    return RayRun(RetryingStorage(PyarrowStorage(with_timeouts(filesystem))), path, _uri(filesystem, path), filesystem)


def find_run(run: Run | str | os.PathLike[str] | None) -> Run:
    """`run` itself; the run of a directory or URI; or, for `None`, that of this worker.

    Raises:
        ValueError: `run` is `None`, and this process is not a Ray Train worker; or it is a checkpoint's directory.
        RuntimeError: this is one of several Ray Train workers, without a process group.
    """
    _refuse_lone_workers()
    if run is None:
        found = current_run()
        if found is None:
            raise ValueError(
                "run is None, and this process is not a Ray Train worker; give a directory or URI: run=..."
            )
        return found
    if isinstance(run, str | os.PathLike):
        uri = os.fspath(run)
        storage, path = resolve(uri)
        if layout.parse_name(posixpath.basename(path.rstrip("/"))) is not None:
            shown = without_credentials(uri)
            raise ValueError(f"run is {shown}, which is a checkpoint by its name; its run is the directory it is in")
        return DirectoryRun(storage, path, without_credentials(uri))
    return run


def _context() -> Any:
    import ray.train

    # The first time, Ray may import ray.tune, and with it rich, which draws from the stream that training draws from.
    stream = None if "ray.tune" in sys.modules else random.getstate()
    try:
        return ray.train.get_context()
    finally:
        if stream is not None:
            random.setstate(stream)


def _refuse_lone_workers() -> None:
    """Refuse a Ray Train worker among others that has no process group.

    Raises:
        RuntimeError: each of them would take itself for the whole world, and save a checkpoint of its own.
    """
    if "ray.train" not in sys.modules:
        return
    # Here, as the commands get by without torch.
    from ray_stateful.ranks import world

    try:
        num_workers = _context().get_world_size() if world() is None else 0
    except (RuntimeError, DeprecationWarning):  # a driver; a trial of Ray Tune
        return
    if num_workers > 1:
        raise RuntimeError(
            f"Ray Train runs {num_workers} workers, and this one has no torch process group: use TorchTrainer, or call "
            "torch.distributed.init_process_group() first"
        )


@dataclass(frozen=True, slots=True)
class Preemption:
    """A node of this worker group is about to be taken away.

    `deadline_s` is UNIX time in seconds, `None` if it is not known. `ranks` are those that are lost with the node.
    """

    deadline_s: float | None
    ranks: tuple[int, ...]

    def seconds_left(self) -> float | None:
        return None if self.deadline_s is None else self.deadline_s - time.time()


def preemption(*, may_wait: bool = True) -> Preemption | None:
    """The preemption that is coming, as this rank knows it; `None` if there is none, or outside of a Ray worker.

    One rank may hear of it a few milliseconds before another: before acting on it, the caller makes it one decision of
    all ranks.

    Args:
        may_wait: Whether to call Ray's `get_preemption_info` if this worker can't tell on its own. That is a collective
            of tens of milliseconds; so pass the same on all ranks, and true only every so many steps.
    """
    if "ray.train" not in sys.modules:
        return None
    try:
        info = _preemption_info(may_wait)
    except (RuntimeError, DeprecationWarning):  # a driver; a trial of Ray Tune
        return None
    if info is None:
        return None
    deadline_s = None if info.deadline_ms is None else info.deadline_ms / 1000
    return Preemption(deadline_s, tuple(info.preempted_ranks))


def _preemption_info(may_wait: bool) -> Any:
    import ray.train

    try:
        from ray.train.v2._internal.execution.context import get_train_context

        # What Ray told this worker, without the barrier around it. `get_preemption_info` waits for all ranks; and with
        # `relax_collectives_on_preemption` it leaves the slower ones waiting for good, just when they should save.
        return get_train_context().preemption_context.preemption_info
    except (ImportError, AttributeError, RuntimeError):  # another version of Ray; local mode
        ask = getattr(ray.train, "get_preemption_info", None)
        return ask() if ask is not None and may_wait else None


def _local_mode_run(name: str) -> LocalModeRun:
    from ray.train.constants import DEFAULT_STORAGE_PATH

    path = posixpath.join(DEFAULT_STORAGE_PATH, name)
    logger.warning(
        "Ray Train's local mode (num_workers=0) has no storage, whatever RunConfig says: checkpoints go to %s",
        path,
    )
    return LocalModeRun(RetryingStorage(PyarrowStorage(pyarrow.fs.LocalFileSystem())), path, path)


def _uri(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    scheme = _SCHEMES.get(filesystem.type_name)
    return path if scheme is None else f"{scheme}://{path}"


def _is_inside(name: str) -> bool:
    # A name also goes into logs, where it must not command the terminal.
    return printable(name, keep="") == name and all(part not in ("", ".", "..") for part in name.split("/"))


def _rank() -> int:
    import ray.train

    return int(ray.train.get_context().get_world_rank())
