"""What each part will be handed: its value as it was saved, with the tensors that are still to be read.

One function for each kind of part. Nothing here touches a part, or reads tensor bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ray_stateful import parts
from ray_stateful.errors import DamagedCheckpoint
from ray_stateful.format import layout
from ray_stateful.format.rows import IntKey, KeyPath, StoredChunk
from ray_stateful.matching import Match
from ray_stateful.runs import Run
from ray_stateful.states.part import RankPart, StrictPart, World
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.reader import value_of
from ray_stateful.storage.structure import copy_containers, put, remove


@dataclass(frozen=True, slots=True)
class Filled:
    """What will be handed to one part: its value, and the tensors in it that storage fills.

    `tensors` and `sources` have the same keys: the tensor to fill, and the key of the checkpoint it is read from.
    `changes` is what the part says will differ from what was saved. `is_partial`: not all of the part is loaded.
    """

    part: Any
    value: Any
    tensors: Mapping[str, Any]
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    is_partial: bool = False


class EveryRank(dict[int, Any]):
    """The values of all ranks that saved a rank part, for the part to make one from at a different world size."""


def fill_strict(
    part: StrictPart,
    template: Any,
    flat: Mapping[str, Any],
    mappings: Mapping[str, KeyPath],
    match: Match,
    run: Run,
    opened: OpenCheckpoint,
) -> Filled:
    """A strict part: its own tensors are filled in place; all else is replaced by what was saved."""
    value, tensors = copy_containers(template), {}
    for row in (opened.trees[tree] for tree in match.trees):
        value = put(value, row.path[1:], parts.tree_value(opened, row))
    for key in match.absent:
        remove(value, _path_in(template, mappings[key][1:]))
    for key, source in match.sources.items():
        chunk = opened.chunks[source][0]
        if chunk.dtype is None:
            value = put(value, _path_in(template, mappings[key][1:]), value_of(run.storage, opened.path, chunk))
        else:
            tensors[key] = flat[key]
    sources = {key: match.sources[key] for key in tensors}
    return Filled(part, value, tensors, sources, match.notes, is_partial=match.is_partial)


def fill(
    part: Any, prefix: KeyPath, template: Any, flat: Mapping[str, Any], run: Run, opened: OpenCheckpoint
) -> Filled:
    """Any other part: what was saved under `prefix`, with its structure, in the key order of `template`.

    Args:
        template: The part's present value.
    """
    templates = {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}
    stored = {
        key: value_of(run.storage, opened.path, chunks[0])
        for key, chunks in opened.chunks.items()
        if chunks[0].dtype is None and chunks[0].path[: len(prefix)] == prefix
    }
    value, tensors = parts.rebuild(opened, prefix, template, templates, stored)
    return Filled(part, value, tensors, {key: key for key in tensors})


def fill_rank_part(
    name: str, part: RankPart, template: Any, flat: Mapping[str, Any], world: World, run: Run, opened: OpenCheckpoint
) -> Filled:
    """A rank part: this rank's value, or at a different world size those of all ranks.

    Args:
        template: This rank's present value.

    Raises:
        ResizeRefused: the part has no rule for this world size.
        DamagedCheckpoint: some rank's value is missing.
    """
    steps = {str(row.path[1]) for row in parts.entries_of(opened, name) if len(row.path) > 1}
    saved = sorted(int(step.removeprefix("rank_")) for step in steps if layout.is_rank_key(step))
    if opened.manifest is None:
        # A foreign checkpoint does not say by how many ranks it was written; this part does.
        world = replace(world, saved_world_size=len(saved))
    # The manifest's number is whatever a stranger wrote there: only compared, never used to make a list of ranks.
    if not len(steps) == len(saved) == world.saved_world_size or saved != list(range(len(saved))):
        raise DamagedCheckpoint(opened.path, f"{name!r} has entries {sorted(steps)[:8]}, not one for each rank")
    if not world.resized:
        return fill(part, (name, layout.rank_key(world.rank)), template, flat, run, opened)
    part.check_resize(name, world)
    of_ranks = _of_ranks(name, opened)
    everyone = {
        rank: fill(part, (name, layout.rank_key(rank)), template, {}, run, of_ranks[layout.rank_key(rank)])
        for rank in saved
    }
    return Filled(
        part,
        EveryRank({rank: one.value for rank, one in everyone.items()}),
        {key: tensor for one in everyone.values() for key, tensor in one.tensors.items()},
        {key: key for one in everyone.values() for key in one.tensors},
    )


def problem_of_kind(name: str, part: Any, paths: Iterable[KeyPath], opened: OpenCheckpoint) -> str | None:
    """The problem of a part that was saved once for all ranks and is a rank part now, or the reverse; else `None`.

    Args:
        paths: Paths of the part's present entries. A part that names its own entries as rank parts do is accepted.
    """
    of_ranks = [layout.is_of_one_rank(row.path) for row in parts.entries_of(opened, name)]
    if isinstance(part, RankPart):
        found = None if any(of_ranks) else ("one value for all ranks", "one for each rank")
    else:
        here = list(paths)
        # A part that is still empty takes whatever was saved.
        is_ours = not here or not all(of_ranks) or any(map(layout.is_of_one_rank, here))
        found = None if is_ours else ("one value for each rank", "one for all ranks")
    if found is None:
        return None
    return (
        f"{name}: the checkpoint has {found[0]}, but the state's part (a {type(part).__name__}) has {found[1]}: use "
        "the kind of part that it was saved from, or leave it out of this restore"
    )


def _path_in(nested: Any, path: KeyPath) -> KeyPath:
    """`path` with the keys that `nested` has: in DCP's paths every key of a dict is a string."""
    found: list[str | int] = []
    for step in path:
        if isinstance(nested, Mapping) and step not in nested:
            step = IntKey(step) if _is_int_key(nested, step) else next(key for key in nested if str(key) == step)
        found.append(step)
        nested = nested[step]
    return tuple(found)


def _is_int_key(nested: Mapping[Any, Any], step: str | int) -> bool:
    try:
        return int(step) in nested
    except ValueError:
        return False


def _of_ranks(name: str, opened: OpenCheckpoint) -> dict[str, OpenCheckpoint]:
    """Each rank's entries of a part, by the rank's step in their paths.

    Made in one pass: going through all entries once per rank takes time that grows with the square of their number.
    """
    chunks: dict[str, dict[str, tuple[StoredChunk, ...]]] = defaultdict(dict)
    trees: dict[str, dict[str, StoredChunk]] = defaultdict(dict)
    for key, of_key in opened.chunks.items():
        if of_key[0].path[0] == name and len(of_key[0].path) > 1:
            chunks[str(of_key[0].path[1])][key] = of_key
    for key, row in opened.trees.items():
        if row.path[0] == name and len(row.path) > 1:
            trees[str(row.path[1])][key] = row
    return {step: replace(opened, chunks=chunks[step], trees=trees[step]) for step in chunks.keys() | trees.keys()}
