"""When to save: every so many steps or seconds, at the end, before a planned change of the workers, and on request.

How a save works is described in `ray_stateful.checkpoint`. This module only decides when, for all ranks together: at
each step boundary every rank says what it would like, in one small collective on a CPU group, and all of them do what
any of them asked for.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

from typing_extensions import Self

from ray_stateful import orphans, parts, ray_train, save_requests
from ray_stateful.background import BackgroundSaver
from ray_stateful.checkpoint import Saving
from ray_stateful.checkpoint import restore as _restore
from ray_stateful.decisions import Decision, Reason, decide
from ray_stateful.errors import SaveFailed
from ray_stateful.format.layout import parse_name
from ray_stateful.plain_metrics import plain_metrics
from ray_stateful.preemption import PreemptionWatch
from ray_stateful.ranks import DEFAULT_TIMEOUT_S, Outcome, Ranks, current_rank, world
from ray_stateful.report import ResumeReport, SaveReport
from ray_stateful.runs import Run
from ray_stateful.storage.plan_cache import PlanCache
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.writer import DEFAULT_NUM_FILES, check_num_files

logger = logging.getLogger(__name__)

# Numbers the Checkpointers of this process, to name their background groups.
_numbers = itertools.count()


class Checkpointer:
    """Counts the steps of a training loop, and saves and restores its state.

    Use it as a context manager: a clean exit saves the last step.

    Args:
        state: Name to part, as for `ray_stateful.save`.
        every_n_steps: Save whenever the number of completed steps is a multiple of this.
        every_s: Save when, on any rank, this many seconds have passed since the last save was made, or was begun in the
            background, or failed.
        at_end: Save the last step when the `with` block ends without an exception. If false, it is still saved if a
            save is due by then: one that was requested, or postponed because another was in flight.
        background: Write while training goes on. Training stands still only for one copy of the local shards to host
            memory, in buffers that are kept for the next save. At most one save is in flight: one that falls due
            meanwhile is begun when that has ended. What can't wait (a resize, a preemption, the end) is saved in the
            foreground, after the one in flight.
        orphans_after_s: Rank 0 deletes, once and in a thread of its own, directories of this run that were last changed
            more than this many seconds ago, were never committed, and are not known to Ray; see `ray_stateful.orphans`.
            `None` leaves them.
        soft_fail: How many saves in a row may fail while training goes on. The failure after those is raised.
        run: Where to save: a directory or URI. By default the Ray Train run this worker belongs to.
        num_files: Files each rank writes at a time.
        limits: How much each rank reads at a time.
        timeout_s: How long this rank waits for the others in any one step of a save or restore.

    `step_count` is the number of optimizer steps completed in the history of the run. `restore`, `step`, `save` and the
    end of the `with` block raise `RuntimeError` if the default process group has changed since this was made.

    Raises:
        ValueError: a setting makes no sense; or there is no run to save to.
        RankTimeout: a rank did not arrive to make the process groups of the collectives.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        every_n_steps: int | None = None,
        every_s: float | None = None,
        at_end: bool = True,
        background: bool = False,
        orphans_after_s: float | None = orphans.DEFAULT_AGE_S,
        soft_fail: int = 0,
        run: Run | str | None = None,
        num_files: int = DEFAULT_NUM_FILES,
        limits: ReadLimits | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        optional = (
            ("every_n_steps", every_n_steps, 1),
            ("every_s", every_s, 0),
            ("orphans_after_s", orphans_after_s, 0),
        )
        for name, value, least in (("soft_fail", soft_fail, 0), *(one for one in optional if one[1] is not None)):
            # Not `value < least`, which is false for a NaN, too.
            if value is None or not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        check_num_files(num_files)
        self.state = state
        self.step_count = 0
        self._every_n_steps, self._every_s, self._at_end = every_n_steps, every_s, at_end
        self._orphans_after_s = orphans_after_s if current_rank() == 0 else None
        self._soft_fail = soft_fail
        self._run = ray_train.find_run(run)
        self._num_files, self._limits, self._timeout_s = num_files, limits, timeout_s
        self._world = world()
        self._ranks = Ranks.of_world(timeout_s)
        # Each saver has its own group: in a shared one, the collectives of two threads could meet in any order.
        own = f"background {next(_numbers)}"
        self._background = BackgroundSaver(Ranks.of_world(timeout_s, own), timeout_s) if background else None
        self._plans = PlanCache()
        self._postponed = False
        # The newest request, the newest before the last save was begun, and the newest that a finished save serves.
        # Each is a new object: assigning it needs no lock, which a signal handler could find held by its own thread.
        self._request: object | None = None
        self._taken: object | None = None
        self._served: object | None = None
        self._saved_step: int | None = None
        self._tried_at_s = time.monotonic()
        self._save_s: float | None = None
        self._num_failed = 0
        self._preemptions = PreemptionWatch()
        self._has_restored = False
        self._metrics: Mapping[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Save the last step, unless it is saved or the body raised: then nobody knows where the other ranks are."""
        try:
            if kind is None:
                self._end()
            elif self._background is not None:
                self._background.leave()
        finally:
            # Not sooner: ranks look for requests as often as they agree, and a resize may well wait for the last save.
            save_requests.stop_listening()

    def _end(self) -> None:
        self._check_world()
        # Once before the wait, which a rank that trains on would not be in; and once after it: if the save in flight
        # has failed, and is forgiven, a request that it was to serve still needs one.
        self._agree(Reason.END)
        self.wait()
        decision = self._agree(Reason.END | self._request_wish())
        is_due = self._at_end or self._postponed or bool(decision.reasons & Reason.REQUEST)
        # A run that trained nothing has nothing to save.
        if is_due and self.step_count not in (0, self._saved_step):
            # Not softly: there is no later save that could make up for it.
            self.save(self._metrics)

    def restore(
        self, *, checkpoint: Any = None, verify: Literal["touched", "full"] = "touched", initial: Any = None
    ) -> ResumeReport | None:
        """Load the newest intact checkpoint of this run, if there is one, and go on counting from its step.

        If there is none, the models begin from the weights at `initial`, at step 0. Collective. Arguments and errors
        are those of `ray_stateful.restore`. A background save in flight is waited for first, as by `wait`.
        """
        self._check_world()
        self.wait()
        report = _restore(
            self.state,
            checkpoint=checkpoint,
            verify=verify,
            initial=initial,
            run=self._run,
            limits=self._limits,
            timeout_s=self._timeout_s,
        )
        # Initial weights are not a saved step of this run.
        if report is not None and not report.initial:
            self.step_count = self._saved_step = report.step
        self._tried_at_s, self._has_restored = time.monotonic(), True
        return report

    def step(self, metrics: Mapping[str, Any] | None = None) -> SaveReport | None:
        """Count an optimizer step, and save and report it with `metrics` if that is due.

        Collective: every rank calls it after every optimizer step.

        Returns:
            The report of the save made now, or of a background save that has ended; `None` if there is none.

        Raises:
            UnsupportedState: some rank's state is not valid, or has different parts; on every rank, at the first step.
            ValueError: the first metrics are not plain values, on the ranks that gave them; on the others it is
                `UnsupportedState`.
            UnevenSteps: ranks have counted different numbers of steps, or some are at the end; on every rank.
            UnmatchedCalls: some rank made a different call; on every rank.
            SaveFailed: on every rank, at the failure that follows `soft_fail` failed saves in a row.
            ReportFailed, RankTimeout: as `ray_stateful.save`; not forgiven by `soft_fail`.
            RankFailed: as `wait`.
        """
        self._check_world()
        self.step_count += 1
        # The first are checked here: the first save, which would refuse them, may come hours later.
        first = metrics if self._metrics is None else None
        self._metrics = metrics
        for name in sorted(self.state):
            on_step = getattr(self.state[name], "on_step", None)
            if on_step is not None:
                on_step(step=self.step_count)
        decision = self._agree(self._wishes(), first)
        report = None
        if self._background is not None and self._background.busy and decision.written:
            report = self._softly(self._finish)
        if not decision.save and not self._postponed:
            return report
        if self._background is None or decision.urgent:
            report = self._softly(lambda: self.save(metrics))
            if report is not None and decision.reasons & Reason.PREEMPTION:
                self._preemptions.saved()
        elif self._background.busy:
            self._postponed = True
        else:
            self._begin(self._background, metrics)
        if decision.resize:
            # What was trained from here on would be thrown away with this worker group.
            is_counted = isinstance(self._run, ray_train.RayRun)
            save_requests.hold(decision.resize, None if report is None else report.name, is_counted=is_counted)
        return report

    def save(self, metrics: Mapping[str, Any] | None = None) -> SaveReport:
        """Save now. Collective. Raises what `ray_stateful.save` raises."""
        self._check_world()
        self.wait()
        self._postponed, self._taken = False, self._request
        saving = self._saving(metrics)
        saving.agree_on_step(self._ranks)
        saving.collect()
        saving.write(self._ranks)
        report = self._saved(saving.report(self._ranks))
        self._tried_at_s = time.monotonic()
        return report

    def wait(self) -> None:
        """Wait for the background save in flight, if there is one, and report it. Collective.

        Raises:
            SaveFailed: on every rank, if `soft_fail` does not forgive it.
            ReportFailed: on every rank; the checkpoint is committed.
            RankTimeout: on the ranks where the save has not ended in time.
            RankFailed: on the ranks that had done their part of it, if another rank ran into its deadline.
            UnmatchedCalls: some rank made a different call; on every rank.
        """
        if self._background is not None and self._background.busy:
            self._background.wait()
            self._softly(self._finish)

    def request_save(self) -> None:
        """Ask for a save at the next step boundary: from any thread or signal handler, on one or more ranks.

        If that save fails, and `soft_fail` forgives it, another is made at the next boundary.
        """
        self._request = object()

    @property
    def _is_in_flight(self) -> bool:
        return self._background is not None and self._background.busy

    def _check_world(self) -> None:
        # Made before the group, it would stay a world of one for good: each rank would commit a checkpoint of its own.
        if world() is not self._world:
            made = "without a process group" if self._world is None else "in a process group"
            now = "without one" if world() is None else "in one" if self._world is None else "in a different one"
            raise RuntimeError(
                f"this Checkpointer was made {made}, but this process is now {now}; make it after"
                " init_process_group(), and call destroy_process_group() after its `with` block"
            )

    def _wishes(self) -> Reason:
        """Why this rank, from what it knows itself, would like to save now."""
        reasons = self._request_wish()
        if self._every_n_steps is not None and self.step_count % self._every_n_steps == 0:
            reasons |= Reason.STEPS
        if self._every_s is not None and time.monotonic() - self._tried_at_s >= self._every_s:
            reasons |= Reason.SECONDS
        if self._preemptions.is_due(step=self.step_count, last_save_s=self._save_s, num_saves=1 + self._is_in_flight):
            reasons |= Reason.PREEMPTION
        return reasons

    def _request_wish(self) -> Reason:
        """`REQUEST` if the newest request still needs a save: none that is done or in flight was begun after it."""
        if self._request is self._served or (self._is_in_flight and self._request is self._taken):
            return Reason(0)
        return Reason.REQUEST

    def _agree(self, mine: Reason, metrics: Mapping[str, Any] | None = None) -> Decision:
        """Tell the others what this rank would like, or that its state or `metrics` are not valid.

        The decision is the same on all ranks.
        """
        written = self._background is not None and self._background.written
        wish = [self.step_count, int(mine), save_requests.save_requested(), int(written)]
        outcome = Outcome()
        with outcome.catch():
            parts.check(self.state)
            if metrics is not None:
                plain_metrics(metrics)
        everyone = parts.share_names(self._ranks, "decide whether to save", self.state, outcome, wish)
        decision = decide([row[:-1] for row in everyone])
        # A save in the background does not compare names again: what it collects, all ranks must have.
        parts.refuse_different(self.state, [names for *_, names in everyone])
        return decision

    def _saving(self, metrics: Mapping[str, Any] | None) -> Saving:
        return Saving(
            self.state,
            metrics,
            step=self.step_count,
            samples=self._samples(),
            run=self._run,
            num_files=self._num_files,
            plans=self._plans,
        )

    def _begin(self, background: BackgroundSaver, metrics: Mapping[str, Any] | None) -> None:
        self._postponed, self._taken = False, self._request
        background.begin(self._saving(metrics))
        # The interval counts from here, whatever the save takes: `_saved` must not set this again. If the save takes
        # longer than the interval, the next one is due meanwhile, and is begun as soon as this one has ended.
        self._tried_at_s = time.monotonic()

    def _finish(self) -> SaveReport:
        assert self._background is not None
        return self._saved(self._background.finish(self._ranks))

    def _saved(self, report: SaveReport) -> SaveReport:
        # Ray resumes what was reported last, which is this; and to ask its run for candidates says that it goes on.
        is_first = self._saved_step is None and not self._has_restored and self._ranks.rank == 0
        if is_first and not isinstance(self._run, ray_train.RayRun):
            threading.Thread(target=self._warn_if_passed, args=(report.step,), name="newest", daemon=True).start()
        self._saved_step, self._save_s = report.step, report.seconds
        self._num_failed, self._served = 0, self._taken
        if self._orphans_after_s is not None:
            # After a save and not before: now there is a newest checkpoint, and storage is known to answer.
            after_s, self._orphans_after_s = self._orphans_after_s, None
            threading.Thread(target=orphans.collect, args=(self._run, after_s), name="orphans", daemon=True).start()
        return report

    def _softly(self, save: Callable[[], SaveReport]) -> SaveReport | None:
        try:
            return save()
        except SaveFailed as error:
            self._num_failed += 1
            # The interval counts from a failure too: at the very next step storage will hardly be any better.
            self._tried_at_s = time.monotonic()
            if self._num_failed > self._soft_fail:
                raise
            # Every rank counts alike: SaveFailed is raised on all of them.
            logger.error(
                "save %d in a row failed, and training goes on; failure %d in a row will end it: %s",
                self._num_failed,
                self._soft_fail + 1,
                error,
                extra={"ray_stateful": {"event": "save_failed", "step": self.step_count, "why": str(error)}},
            )
            return None

    def _samples(self) -> int:
        counts = [int(part.samples) for part in self.state.values() if hasattr(part, "samples")]
        return max(counts, default=0)

    def _warn_if_passed(self, step: int) -> None:
        """Say so if the run had a later step than the one that was saved first: a `restore` was forgotten.

        The next resume takes the later step, and all that was trained since is lost.
        """
        outcome, newest = Outcome(), None
        with outcome.catch():
            newest = next(iter(self._run.candidates()), None)
        parsed = None if newest is None else parse_name(newest)
        # Training goes on meanwhile: later steps up to the present one may be its own.
        if parsed is not None and parsed.step > self.step_count:
            logger.warning(
                "run %s has %s, and step %d was saved without a restore: the next resume takes the former. Call "
                "restore() before you train, or give the run another name",
                self._run.uri,
                newest,
                step,
            )
