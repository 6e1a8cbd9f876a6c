"""The steps of a restore from one checkpoint; `checkpoint.restore` says in which order."""

from __future__ import annotations

import logging
import posixpath
import time
from collections.abc import Mapping, Set
from dataclasses import astuple, replace
from typing import Any

from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from ray_stateful import joint_reads, matching, parts
from ray_stateful.candidates import Candidate, Rejected, agree
from ray_stateful.errors import DamagedCheckpoint, ResizeRefused, StateMismatch
from ray_stateful.filling import EveryRank, Filled, fill, fill_rank_part, fill_strict, problem_of_kind
from ray_stateful.format import layout
from ray_stateful.format.checksums import digest_number
from ray_stateful.outcomes import complete, foresee
from ray_stateful.ranks import Failure, Outcome, Ranks
from ray_stateful.report import ResumeReport
from ray_stateful.runs import Run
from ray_stateful.states.part import RankPart, StrictPart, World
from ray_stateful.storage import opening, verifying
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.ranges import ReadLimits
from ray_stateful.storage.reading import ReadStatistics
from ray_stateful.storage.structure import copy_containers, is_tensor, refuse_interleaved, refuse_wrapper

logger = logging.getLogger(__name__)


def restore_one(
    state: parts.State,
    run: Run,
    candidate: Candidate,
    ranks: Ranks,
    limits: ReadLimits | None,
    verify: str,
    rejected: Mapping[str, str],
    touched: set[str],
) -> ResumeReport:
    """Restore from one checkpoint.

    Args:
        rejected: Newer checkpoints that could not be used, for the report.
        touched: Keys that an earlier attempt began to load; keys of this one are added.

    Raises:
        Rejected: on every rank; the checkpoint is damaged.
        StateMismatch, ResizeRefused: on every rank, before anything of this checkpoint is loaded.
    """
    began = time.monotonic()
    opened = _open(candidate)
    report = restore_opened(state, run, opened, ranks, limits, verify, rejected, touched)
    return replace(report, checkpoint=candidate.name, seconds=time.monotonic() - began)


def restore_opened(
    state: parts.State,
    run: Run,
    opened: OpenCheckpoint,
    ranks: Ranks,
    limits: ReadLimits | None,
    verify: str,
    rejected: Mapping[str, str],
    touched: set[str],
    *,
    initial: bool = False,
) -> ResumeReport:
    """Restore from a checkpoint that is open already; with `initial`, begin from it, do not resume. Times nothing."""
    if verify == "full":
        _verify_all(run, opened, ranks)
    world = World(
        saved_world_size=opened.manifest.world_size if opened.manifest else ranks.world_size,
        world_size=ranks.world_size,
        rank=ranks.rank,
        step=opened.manifest.step if opened.manifest else 0,
    )
    filled = _match(state, run, opened, world, ranks, initial, touched)
    touched |= _filled_in_place(filled)

    foreseen = foresee(filled, world, opened, initial)
    if ranks.rank == 0:
        logger.info("restoring %s: %s", opened.name, "; ".join(str(part).strip() for part in foreseen.values()))

    statistics, outcome = joint_reads.fill(run, opened, filled, limits, ranks), Outcome()

    how: dict[str, str] = {}
    for part in parts.loading_order(state):
        # All parts are loaded, even if one raises: some call collectives.
        with outcome.catch():
            if part in filled:
                how[part] = _load(state[part], filled[part].value, world)
    described: dict[str, str] = {}
    for part, said in how.items():
        # Before ranks agree: `describe` may fail on this rank alone, and the others would go on to train.
        with outcome.catch():
            described[part] = "" if said else _describe(state[part])
    names = sorted(filled)
    mine = [number for name in names for number in _numbers(filled[name], statistics[name])]
    sums = [sum(numbers) for numbers in zip(*ranks.raise_if_any_failed("load the state", outcome, mine), strict=True)]
    of_part = {name: sums[5 * n : 5 * n + 5] for n, name in enumerate(names)}
    total = {name: ReadStatistics(*numbers[:3]) for name, numbers in of_part.items()}
    ignored = sorted(parts.saved_parts(opened) - filled.keys())
    return ResumeReport(
        checkpoint=opened.name,
        step=world.step,
        samples=opened.manifest.samples if opened.manifest else 0,
        saved_world_size=world.saved_world_size,
        world_size=world.world_size,
        verified=opened.manifest is not None,
        parts=tuple(
            complete(
                foreseen[name],
                filled[name],
                how[name],
                described[name],
                total[name],
                opened,
                is_partial=of_part[name][3] > 0,
                is_changed=of_part[name][4] > 0,
            )
            for name in names
        ),
        statistics=sum(total.values(), ReadStatistics()),
        rejected=dict(rejected),
        created_s=opened.manifest.created_s if opened.manifest else 0.0,
        notes=tuple(f"{part}: in the checkpoint, not in the state; left alone" for part in ignored),
    )


def _numbers(filled: Filled, read: ReadStatistics) -> list[int]:
    """The numbers that are added up over all ranks for the report of a part."""
    return [*astuple(read), int(filled.is_partial), int(bool(filled.changes))]


def _open(candidate: Candidate) -> OpenCheckpoint:
    """Decode the checkpoint, on every rank from the same bytes."""
    if isinstance(candidate.described, Failure):
        agree("open", {0: candidate.described})
    assert isinstance(candidate.described, opening.RawCheckpoint)
    try:
        return opening.parse(candidate.described)
    except DamagedCheckpoint as error:
        raise Rejected(str(error)) from error


def _match(
    state: parts.State,
    run: Run,
    opened: OpenCheckpoint,
    world: World,
    ranks: Ranks,
    initial: bool,
    touched: Set[str],
) -> dict[str, Filled]:
    outcome = Outcome()
    template = parts.collect(state, ranks.rank, outcome)
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    with outcome.catch():
        # A copy: a part may return dicts that it uses itself, and in those it is given torch's planner replaces values
        # that it does not know (bytes, sets, numpy values) by None.
        template = copy_containers(template)
        _refuse_without_memory(template)
        planner.set_up_planner(template)
        for key, value in planner.state_dict.items():
            if is_tensor(value):
                refuse_wrapper(key, value)
                refuse_interleaved(key, value)
    everyones_keys = _keys_of_strict_parts(state, planner.mappings, outcome, ranks)
    flat = planner.state_dict
    saved = parts.saved_parts(opened)
    problems = [
        f"{name}: the checkpoint has no such part; it has {', '.join(sorted(saved))}" for name in set(state) - saved
    ]
    filled: dict[str, Filled] = {}
    refusals: list[ResizeRefused] = []
    for name in sorted(set(state) & saved):
        part, mine = state[name], {key: value for key, value in flat.items() if planner.mappings[key][0] == name}
        # Errors are caught part by part: a strict part may call a collective, and an error in one part must not keep
        # this rank from the next.
        with outcome.catch():
            try:
                if isinstance(part, StrictPart):
                    keys = frozenset(key for key, first in everyones_keys.items() if first == name)
                    seen = parts.divided(opened, (name,), template[name])
                    match = matching.match_strict(name, part, mine, keys, seen, may_cast=initial)
                    problems += match.problems
                    if not match.problems:
                        filled[name] = fill_strict(part, template[name], mine, planner.mappings, match, run, seen)
                elif problem := problem_of_kind(name, part, (planner.mappings[key] for key in mine), opened):
                    problems.append(problem)
                elif isinstance(part, RankPart):
                    own = template[name][layout.rank_key(ranks.rank)]
                    filled[name] = fill_rank_part(name, part, own, mine, world, run, opened)
                else:
                    filled[name] = fill(part, (name,), template[name], mine, run, opened)
            except ResizeRefused as error:
                refusals.append(error)
            if name in filled:
                resized = isinstance(filled[name].value, EveryRank)
                unfit = _asked(part, "check_resized" if resized else "check_saved", filled[name].value)
                problems += [f"{name}: {problem}" for problem in unfit]
                if not unfit and not resized:
                    filled[name] = replace(filled[name], changes=_asked(part, "changed_from", filled[name].value))
    _agree_on_problems(opened, problems, refusals, touched - _filled_in_place(filled), outcome, ranks)
    return filled


def _filled_in_place(filled: Mapping[str, Filled]) -> set[str]:
    """The keys of tensors that are read into the state itself.

    Other parts than strict ones are handed new tensors, and none before all is read: of a checkpoint that is rejected
    they have nothing, and it may have been written by a different number of ranks, each with keys of its own.
    """
    return {key for part in filled.values() if isinstance(part.part, StrictPart) for key in part.tensors}


def _refuse_without_memory(template: Mapping[str, Any]) -> None:
    """Refuse meta tensors: the planner would replace them, and what is read into its own would not reach the model."""
    for name, value in template.items():
        for key, tensor in value.items() if isinstance(value, Mapping) else ():
            # A ShardedTensor answers for its only shard, and raises on a rank that has none.
            if not isinstance(tensor, ShardedTensor) and getattr(tensor, "is_meta", False):
                raise ValueError(
                    f"{name}.{key} is on the meta device, where nothing can be loaded into it: give the model memory "
                    "first, with model.to_empty(device=...)"
                )


def _agree_on_problems(
    opened: OpenCheckpoint,
    problems: list[str],
    refusals: list[ResizeRefused],
    left_over: Set[str],
    outcome: Outcome,
    ranks: Ranks,
) -> None:
    """Raise every rank's problems on every rank, all in one error, before anything of this checkpoint is loaded.

    Args:
        left_over: Keys that were loaded from a checkpoint since rejected, and that this one would not overwrite.
    """
    # Usually there are none, and one small collective is enough to know that.
    failures, counts = ranks.share("match the state", outcome, [len(problems) + len(refusals) + len(left_over)])
    agree("match", failures)
    if not any(number for (number,) in counts):
        return
    everyone = ranks.all_gather("gather what does not fit", (problems, refusals, left_over))
    every_problem = sorted({problem for found, _, _ in everyone for problem in found})
    refused = {error.part: error for _, found, _ in everyone for error in found}
    if every_problem or len(refused) > 1:
        raise StateMismatch(opened.path, (*every_problem, *map(str, refused.values())))
    for error in refused.values():
        raise error
    first = min(key for _, _, keys in everyone for key in keys)
    raise Rejected(f"has no entry {first!r}, which was loaded from a newer, damaged checkpoint")


def _keys_of_strict_parts(
    state: parts.State, mappings: Mapping[str, tuple[str | int, ...]], outcome: Outcome, ranks: Ranks
) -> dict[str, str]:
    """Every key that a strict part has on any rank, mapped to the name of the part.

    Raises:
        RankFailed: on every rank, if `outcome` holds an error on any of them.
    """
    strict = {name for name, part in state.items() if isinstance(part, StrictPart)}
    mine = {key: str(path[0]) for key, path in mappings.items() if path[0] in strict}
    # With data parallelism all ranks have the same keys.
    digest = digest_number("\n".join(sorted(mine)).encode())
    digests = ranks.raise_if_any_failed("collect the state", outcome, [digest])
    if all(other == digests[0] for other in digests):
        return mine
    return {key: part for of_rank in ranks.all_gather("gather keys", mine) for key, part in of_rank.items()}


def _asked(part: Any, method: str, saved: Any) -> tuple[str, ...]:
    """What `method` of a part returns for `saved`; empty if the part has no such method."""
    ask = getattr(part, method, None)
    return () if ask is None else tuple(ask(saved))


def _describe(part: Any) -> str:
    describe = getattr(part, "describe", None)
    return "" if describe is None else str(describe())


def _load(part: Any, value: Any, world: World) -> str:
    """Hand a part its value. Returns what its `resize` returned; an empty string if that was not called."""
    if isinstance(value, EveryRank):
        # A foreign checkpoint does not say by how many ranks it was written; this part does.
        return str(part.resize(value, replace(world, saved_world_size=len(value))))
    part.load_state_dict(value)
    return ""


def _verify_all(run: Run, opened: OpenCheckpoint, ranks: Ranks) -> None:
    """Check every byte of every file; the files are divided among the ranks. Collective."""
    outcome = Outcome()
    with outcome.catch():
        if opened.manifest is None:
            raise DamagedCheckpoint(opened.path, "has no checksums to verify; it was not written by this package")
        for number, (name, file) in enumerate(sorted(opened.manifest.files.items())):
            if number % ranks.world_size == ranks.rank:
                verifying.verify_file(run.storage, posixpath.join(opened.path, name), file)
    agree("verify", ranks.failures("verify", outcome))
