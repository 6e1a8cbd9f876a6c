"""Saving and restoring a state: the one place where the order of steps is written.

Both are collective: every rank calls them, with the same names in its state. A failure on one rank is raised on all
of them, and every wait has a deadline.

Saving
  1. (all)     agree that this is the same step on every rank
  2. (all)     collect the state dicts; a background save copies the local shards to host buffers, and training goes on
  3. (rank 0)  names the directory, with a new attempt id; in the same collective each rank says what its plan depends
     on, and whether it refuses the save, for which it has prepared its report beforehand
  4. (all, rank 0, all)  local plan, global plan, final plan; or the last save's, if all ranks have the same structure
  5. (all)     stream the items to files, with checksums computed on the way
  6. (all)     gather outcomes: one rank's failure is every rank's `SaveFailed`, and rank 0 deletes what was written
  7. (rank 0)  proves that the chunks cover every tensor, writes metadata and index, and last the manifest: the commit
  8. (all)     share the outcome of 7, as they did that of 5; then every rank reports, or none does

Restoring
  1. (rank 0)  lists candidates, newest first; reads manifest and index of one, and broadcasts them
  2. (all)     match the state against the index, before anything is loaded
  3. (all)     read this rank's shards, and for other ranks bytes that several of them want; each block is checked
     before it is copied
  4. (all)     share outcomes: one rank's damaged byte makes all ranks take the next candidate
  5. (all)     hand the values to each part; random streams last
  6. (all)     report the checkpoint, if its writers died before they had
  If there is no candidate: 2 to 5 for the models alone, from the initial weights, if any were given (`initial.py`)
"""

from __future__ import annotations

import functools
import logging
import os
import posixpath
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from ray_stateful import candidates, collector, meters, parts, ray_train, reporting, restoring
from ray_stateful import initial as initial_weights
from ray_stateful.candidates import Candidate, Rejected
from ray_stateful.errors import NoIntactCheckpoint, SaveFailed, UnevenSteps
from ray_stateful.format.checksums import digest_number
from ray_stateful.format.layout import MAX_STEP, CheckpointName
from ray_stateful.plain_metrics import plain_metrics
from ray_stateful.ranks import DEFAULT_TIMEOUT_S, Failure, Outcome, Ranks, current_rank
from ray_stateful.ray_meters import Sample
from ray_stateful.report import ResumeReport, SaveReport
from ray_stateful.runs import Run
from ray_stateful.stopwatch import Stopwatch
from ray_stateful.storage import commit
from ray_stateful.storage.assignment import deal, leave, left_out, without
from ray_stateful.storage.commit import Description, places_digest, repeated
from ray_stateful.storage.plan_cache import PlanCache, agree, entries_digest, structure_digest
from ray_stateful.storage.planner import BalancedSavePlanner
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.staging import Staging
from ray_stateful.storage.structure import meshes_of
from ray_stateful.storage.uris import below
from ray_stateful.storage.writer import DEFAULT_NUM_FILES, CheckpointWriter, check_num_files

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ELSEWHERE = "its run is elsewhere than rank 0's: give every rank the same, in Ray Train's local mode by a name"


def save(
    state: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    *,
    step: int,
    samples: int = 0,
    run: Run | str | None = None,
    num_files: int = DEFAULT_NUM_FILES,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> SaveReport:
    """Save `state` as a new checkpoint of this run, commit it, and report it to Ray Train with `metrics`.

    Args:
        state: Name to part, which is anything with `state_dict` and `load_state_dict`. The same names on every rank.
        metrics: Plain numbers and strings, reported together with the checkpoint.
        step: Optimizer steps completed, the same on every rank.
        samples: Samples trained, for the manifest.
        run: Where to save: a directory or URI. By default the Ray Train run this worker belongs to.
        num_files: Files each rank writes at a time.
        timeout_s: How long this rank waits for the others in any one step.

    Raises:
        UnsupportedState: some rank's state is not valid, or has different parts; on every rank, before anything is
            written.
        ValueError: `step` or `num_files` is out of range, on the ranks that gave it; or there is no run to save to.
        UnevenSteps: on every rank, before anything is written.
        UnmatchedCalls: some rank made a different call; on every rank, before anything is written.
        SaveFailed: on every rank; nothing was committed, and the next save can succeed.
        ReportFailed: on every rank; the checkpoint is committed, but Ray does not know of it.
        RankTimeout: a rank did not arrive in time.
    """
    run = ray_train.find_run(run)
    saving = Saving(state, metrics, step=step, samples=samples, run=run, num_files=num_files)
    ranks = Ranks.of_world(timeout_s)
    saving.agree_on_step(ranks)
    saving.collect()
    saving.write(ranks)
    return saving.report(ranks)


def _counted(step: Callable[[Saving, Ranks], T]) -> Callable[[Saving, Ranks], T]:
    """Count an error in `step`, a piece of a save, as a failure of that save, whoever calls the piece."""

    @functools.wraps(step)
    def counted(self: Saving, ranks: Ranks) -> T:
        try:
            return step(self, ranks)
        except Exception:  # whatever it is: counted, and re-raised
            self._tell(ranks, meters.of_failed_save(self.clock.stop(), self.clock, ranks.rank))
            raise

    return counted


class Saving:
    """One save, in pieces that may run at different times: training need only stand still for `collect`.

    Every rank calls all four, in this order: `agree_on_step` (unless ranks have agreed on the step and on the names of
    the parts), `collect`, `write`, `report`. The training thread must create the object: `clock` counts the phases of
    the thread that created it as time for which training stood still.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None,
        *,
        step: int,
        samples: int,
        run: Run,
        num_files: int = DEFAULT_NUM_FILES,
        plans: PlanCache | None = None,
    ) -> None:
        self._outcome = Outcome()
        # Kept, not raised: if this rank alone raised, the others would wait for it.
        with self._outcome.catch():
            parts.check(state)
            if not hasattr(step, "__index__") or not 0 <= step <= MAX_STEP:
                raise ValueError(
                    f"step is {step}; a checkpoint's name has room for whole numbers from 0 to {MAX_STEP:,}"
                )
            check_num_files(num_files)
        self._state, self._run = state, run
        # Not checked here but by `collect`, whose errors `write` raises on every rank.
        self._metrics: Mapping[str, Any] = {} if metrics is None else metrics
        self._step, self._samples, self._num_files = step, samples, num_files
        self._plans = plans or PlanCache()
        self._planner = BalancedSavePlanner()
        self._began = time.monotonic()
        self.clock = Stopwatch()
        self._name, self._num_bytes, self._created_s, self._prepared = "", 0, 0.0, None
        self._seconds = 0.0

    @_counted
    def agree_on_step(self, ranks: Ranks) -> None:
        """1. Agree on one step: otherwise shards of different steps would be committed as one checkpoint.

        Raises:
            UnevenSteps, UnsupportedState: ranks are at different steps, or have different parts; on every rank.
            ValueError: the step or the number of files is out of range, on the ranks that gave it.
        """
        self.clock.begin("agree")
        everyone = parts.share_names(ranks, "agree on the step", self._state, self._outcome, [self._step])
        if len({step for step, _ in everyone}) > 1:
            raise UnevenSteps({rank: step for rank, (step, _) in enumerate(everyone)})
        parts.refuse_different(self._state, [names for _, names in everyone])

    def collect(self, staging: Staging | None = None) -> None:
        """2. Collect the state dicts of the parts; with `staging`, copy the local shards as well.

        An error is kept, and `write` raises it on every rank.
        """
        self.clock.begin("collect")
        with self._outcome.catch():
            # Now: a metric may be a tensor to which training goes on adding.
            self._metrics = plain_metrics(self._metrics)
        # Parts with one value per rank need the rank. It is the same in every group of all ranks.
        collected = parts.collect(self._state, current_rank(), self._outcome)
        with self._outcome.catch():
            parts.check_saving(self._state)
            self._planner.set_up_planner(collected)
            if staging is not None:
                self._planner.stage(staging)
        self.clock.stop()

    @_counted
    def write(self, ranks: Ranks) -> None:
        """3 to 7, and the first half of 8.

        Raises:
            SaveFailed: on every rank; nothing was committed.
        """
        outcome, planner, run = self._outcome, self._planner, self._run
        self.clock.begin("plan")

        # 3. A name that no other attempt has: shards of two attempts must never share a directory. Whatever this rank
        # can refuse, it refuses before anything is written.
        digests = [0, 0, 0]
        shared: tuple[dict[str, str], dict[str, str]] = {}, {}
        with outcome.catch():
            if outcome.error is None:
                self._prepared = run.prepare_report(dict(self._metrics))
                structure = structure_digest(planner.describe(), ranks.world_size)
                shared = planner.shared_tensors(), planner.shared_values()
                digests = [structure, *map(entries_digest, shared)]
        place = digest_number(run.path.encode())
        failures, rows = ranks.share("compare plans", outcome, [int(secrets.token_hex(3), 16), *digests, place])
        self._name = str(CheckpointName(self._step, f"{rows[0][0]:06x}"))
        path = posixpath.join(run.path, self._name)
        _raise_if_any_failed(path, "plan", failures, outcome)

        # 4.
        description = self._describe(ranks)
        plan, metadata = self._plan(ranks, path, *shared, [row[1:4] for row in rows])
        planner.let_go()

        # 5.
        self.clock.begin("write")
        storage = run.storage.within(ranks.timeout_s) if isinstance(run.storage, RetryingStorage) else run.storage
        writer = CheckpointWriter(path, storage, num_files=self._num_files, description=description)
        writer.set_up_storage_writer(ranks.rank == 0, rank=ranks.rank)
        try:
            self._write_and_commit(ranks, path, writer, plan, metadata)
        except SaveFailed as error:
            # A write that was given up may still add files to the directory: an orphan, to be collected later.
            if ranks.rank == 0 and not writer.may_be_committed:
                commit.discard(storage, path, ranks.timeout_s / 8)
            # Not refused beforehand: one directory may be mounted at several paths. If it is not one, the commit fails.
            others = [rank for rank, row in enumerate(rows) if row[-1] != rows[0][-1]]
            if others and error.phase == "commit":
                raise SaveFailed(path, error.phase, dict.fromkeys(others, _ELSEWHERE) | error.causes) from error
            raise
        self._created_s = time.time()
        # Measured to here: a background save waits for its report until the training thread comes to make it.
        self._seconds = time.monotonic() - self._began
        self.clock.stop()

    def _write_and_commit(
        self, ranks: Ranks, path: str, writer: CheckpointWriter, plan: SavePlan, metadata: Metadata | None
    ) -> None:
        """5 to 7. Raises `SaveFailed` on every rank, once all have finished their work for this save or given up."""
        outcome, planner = self._outcome, self._planner
        written: list[WriteResult] = []
        with outcome.catch():
            if planner.staged is not None:
                planner.staged.wait()
            written = writer.write_data(plan, planner).wait()

        # 6.
        self.clock.begin("wait")
        places = [place for (place,) in _agree(ranks, path, "write", outcome, [places_digest(written)])]

        # 7. Only rank 0 commits, and only with everyone's results in hand.
        self.clock.begin("commit")
        committed, is_repeated = self._plans.committed, self._plans.are_places(places)
        everyone: list[Any] = ranks.gather("gather results", repeated(written) if is_repeated else written)
        with outcome.catch():
            if ranks.rank == 0 and is_repeated:
                assert committed is not None
                writer.commit_again(committed, everyone)
            elif ranks.rank == 0:
                assert metadata is not None
                committed = writer.commit(metadata, everyone)
        sizes = _agree(ranks, path, "commit", outcome, [writer.num_bytes])
        self._plans.keep_commit(places, committed)
        self._num_bytes = sum(size for (size,) in sizes)

    @_counted
    def report(self, ranks: Ranks) -> SaveReport:
        """8. Report on every rank: one that did so alone would wait in ray.train.report for peers that never arrive.

        Raises:
            ReportFailed: on every rank; the checkpoint is committed.
        """
        self.clock.begin("report")
        reporting.report(self._run, self._prepared, self._name, ranks)
        self.clock.stop()
        report = SaveReport(
            name=self._name,
            uri=below(self._run.uri, self._name),
            step=self._step,
            num_bytes=self._num_bytes,
            seconds=self._seconds,
            seconds_by_phase=dict(self.clock.seconds),
            stalled_s=self.clock.stalled_s,
            created_s=self._created_s,
        )
        if ranks.rank == 0:
            logger.info("%s", report, extra={"ray_stateful": report.as_fields()})
        self._tell(ranks, meters.of_save(report, ranks.rank))
        return report

    def tell_stall(self, ranks: Ranks) -> None:
        """Count the seconds that training waited for a background save that has failed."""
        self._tell(ranks, meters.of_stall(self.clock, ranks.rank))

    def _tell(self, ranks: Ranks, samples: list[Sample]) -> None:
        meters.tell(self._run, self._run.storage, ranks.rank, samples)

    def _plan(
        self,
        ranks: Ranks,
        path: str,
        tensors: Mapping[str, str],
        values: Mapping[str, str],
        everyone: Sequence[Sequence[int]],
    ) -> tuple[SavePlan, Metadata | None]:
        """This rank's items, and on rank 0 the metadata of the whole checkpoint.

        Args:
            tensors, values: Entries that other ranks may have too, by key, as the planner describes them.
            everyone: Each rank's digests of its structure, `tensors` and `values`: twenty-four bytes, from which ranks
                know whether all have the structure of the last save and agree on the values. If so, nothing that grows
                with the number of parameters is sent.
        """
        planner = self._planner
        structures, of_tensors, of_values = zip(*everyone, strict=True)
        cached = self._plans.find(structures)
        if cached is not None and agree(of_values):
            return cached.plan, cached.metadata

        plan, metadata = SavePlan([]), None
        with self._outcome.catch():
            # Dealt out, or all ranks would send what all have: twelve of AdamW's fourteen entries per parameter.
            writers = deal(tensors if agree(of_tensors) else {}, values if agree(of_values) else {}, ranks.world_size)
            plan = leave(planner.create_local_plan(), writers, ranks.rank)
        _agree(ranks, path, "plan", self._outcome)
        plans = ranks.gather("gather plans", plan)
        left: list[list[int]] = []
        with self._outcome.catch(), collector.paused():
            if ranks.rank == 0:
                finals, metadata = planner.create_global_plan(plans)
                left = [left_out(*pair) for pair in zip(plans, finals, strict=True)]
        _agree(ranks, path, "plan", self._outcome)
        final = planner.finish_plan(without(plan, ranks.scatter("scatter plans", left)))
        self._plans.keep(structures, final, metadata)
        return final, metadata

    def _describe(self, ranks: Ranks) -> Description:
        return Description(
            world_size=ranks.world_size,
            step=self._step,
            samples=self._samples,
            attempt=self._name.rpartition("_")[2],
            parts=tuple(sorted(self._state)),
            mesh=meshes_of(self._planner.state_dict.values()),
            versions=_versions(),
        )


def restore(
    state: Mapping[str, Any],
    *,
    checkpoint: Any = None,
    verify: Literal["touched", "full"] = "touched",
    initial: Any = None,
    run: Run | str | None = None,
    limits: ReadLimits | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> ResumeReport | None:
    """Load the newest intact checkpoint of this run into `state`, in place, on every rank.

    Each rank reads the bytes of its own shards, whatever number of workers wrote them; where several ranks want small
    pieces of the same chunks, one of them reads the pieces of all.

    Args:
        state: Name to part, as for `save`; tensors keep their placement and dtype.
        checkpoint: The one to load instead of the newest: a `ray.train.Checkpoint`, a URI or path, or the name of a
            checkpoint of this run.
        verify: "touched" checks the bytes that are read, block by block, as they are copied into the state's tensors.
            "full" checks every byte of every file before anything is loaded, and so reads twice.
        initial: Weights to begin from when the run has no checkpoint yet: a `ray.train.Checkpoint`, URI or path that
            leads to safetensors in the Hugging Face layout (one file, or a directory), or to a checkpoint, of this
            package or of stock DCP. Only models load them: all other parts stay as they are, and the run is at step 0.
            Floating-point tensors are cast to the model's dtype. `ModelState(skip_task_head_prefixes=...)` says which
            heads the weights lack.
        run: Where to look: a directory or URI. By default the Ray Train run this worker belongs to. Not needed if
            `checkpoint` is a URI, a path or a `ray.train.Checkpoint`.
        limits: How much is read at a time.
        timeout_s: How long this rank waits for the others in any one step.

    Returns:
        What was restored and how (`report.initial`: from initial weights), or `None` when the run has no checkpoint
        yet, and no initial weights were given.

    Raises:
        UnsupportedState: some rank's state is not valid, or has different parts; on every rank.
        ValueError: `initial` is given together with `checkpoint`, or without a `ModelState` in the state; one of the
            two is not the same on all ranks; or there is no run to look in.
        StateMismatch: on every rank, before anything is loaded; lists every missing, unexpected and misshapen key.
        ResizeRefused: on every rank, before anything is loaded; a part has no rule for this number of workers.
        NoIntactCheckpoint: on every rank; there are checkpoints, and none passed verification. Tensors may hold a
            mixture of checkpoints by then. `initial` is not used in this case.
        NoInitialWeights: on every rank; there is no checkpoint, and `initial` is damaged, or leads to no weights.
        ReportFailed: on every rank; all is restored, but the checkpoint had never been reported, and can't be now.
        RankFailed: on every rank; some rank could not read, for a reason other than damage.
        UnmatchedCalls: some rank made a different call; on every rank.
        RankTimeout: a rank did not arrive in time.
    """
    if verify not in ("touched", "full"):
        raise ValueError(f"verify is {verify!r}; 'touched' checks what is read, 'full' every byte")
    outcome, digests = Outcome(), [0, 0]
    # Kept, not raised: if this rank alone raised, the others would wait for it.
    with outcome.catch():
        parts.check(state)
        if initial is not None:
            initial_weights.check(state, checkpoint)
        run, source, name = candidates.find(run, checkpoint, timeout_s)
        digests = [initial_weights.digest(initial), initial_weights.digest(checkpoint)]
    ranks = Ranks.of_world(timeout_s)
    everyone = parts.share_names(ranks, "compare parts", state, outcome, digests)
    parts.refuse_different(state, [names for _, _, names in everyone])
    initial_weights.refuse_different("initial", initial, [weights for weights, _, _ in everyone])
    initial_weights.refuse_different("checkpoint", checkpoint, [place for _, place, _ in everyone])
    assert not isinstance(run, str | os.PathLike | None)
    to_try = candidates.newest_first(source, name, ranks)
    rejected: dict[str, str] = {}
    try:
        report, is_to_report = _restore_newest(state, source, to_try, ranks, limits, verify, initial, rejected)
    except Exception:  # whatever it is: counted, and re-raised
        meters.tell(run, source.storage, ranks.rank, meters.of_failed_restore(rejected, ranks.rank))
        raise
    if ranks.rank == 0:
        said = f"run {source.uri} has no checkpoint yet: nothing was restored" if report is None else report
        fields = {"event": "nothing_to_restore", "run": source.uri} if report is None else report.as_fields()
        logger.info("%s", said, extra={"ray_stateful": fields})
        if not logger.isEnabledFor(logging.INFO):
            # Ray's workers log at this level; elsewhere nobody would see it.
            print(said, flush=True)
    if report is None:
        return None
    meters.tell(run, source.storage, ranks.rank, meters.of_restore(report, ranks.rank))
    if is_to_report:
        reporting.report_late(run, report, ranks)
    return report


def _restore_newest(
    state: Mapping[str, Any],
    run: Run,
    to_try: Iterable[Candidate],
    ranks: Ranks,
    limits: ReadLimits | None,
    verify: str,
    initial: Any,
    rejected: dict[str, str],
) -> tuple[ResumeReport | None, bool]:
    """Restore the first of `to_try` that is intact; those before it are added to `rejected`, with the reason.

    If there are no candidates, the models begin from `initial`, if that is given.

    Returns:
        The report, `None` if nothing was loaded; and whether the checkpoint is still to be reported.
    """
    touched: set[str] = set()
    for candidate in to_try:
        try:
            report = restoring.restore_one(state, run, candidate, ranks, limits, verify, rejected, touched)
        except Rejected as error:
            rejected[candidate.name] = str(error)
            if ranks.rank == 0:
                fields = {"event": "rejected", "checkpoint": candidate.name, "why": str(error)}
                words = "checkpoint %s can't be used; the next older one is taken, if there is one: %s"
                logger.warning(words, candidate.name, error, extra={"ray_stateful": fields})
        else:
            return report, candidate.to_report
    if rejected:
        raise NoIntactCheckpoint(run.uri, rejected)
    if initial is None:
        return None, False
    return initial_weights.load(state, initial, run, ranks, limits, verify), False


def _agree(ranks: Ranks, path: str, phase: str, outcome: Outcome, facts: Sequence[int] = ()) -> list[list[int]]:
    """Everyone's `facts`, the same number from each rank; an error of any rank is raised on all of them.

    Raises:
        SaveFailed: on every rank.
    """
    failures, everyone = ranks.share(phase, outcome, facts)
    _raise_if_any_failed(path, phase, failures, outcome)
    return everyone


def _raise_if_any_failed(path: str, phase: str, failures: Mapping[int, Failure], outcome: Outcome) -> None:
    if failures:
        raise SaveFailed(path, phase, {rank: failure.text for rank, failure in failures.items()}) from outcome.error


def _versions() -> dict[str, str]:
    loaded = {name: sys.modules.get(name) for name in ("ray", "torch")}
    return {name: str(module.__version__) for name, module in loaded.items() if module is not None}
