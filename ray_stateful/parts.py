"""Turns the parts of a state into one state dict, and what was read from a checkpoint into values for the parts.

A part is filled in one of three ways (see `ray_stateful.states.part`): a strict part gives the tensors to fill; a
rank part has an entry of its own for each rank; any other gets back what was saved, whole. The names of the parts must
be the same on all ranks, which compare them before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ray_stateful.errors import UnsupportedState
from ray_stateful.format import layout, values
from ray_stateful.format.checksums import digest_number
from ray_stateful.format.manifest import MAX_TEXT_LENGTH
from ray_stateful.format.rows import KeyPath, StoredChunk, tree_row
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.states.part import RankPart, StrictPart
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.structure import ByKey, put

State = Mapping[str, Any]


def check(state: State) -> None:
    """Refuse what is not a state.

    Raises:
        UnsupportedState: the state is no dict, or empty, an entry lacks `state_dict` or `load_state_dict`, or its name
            would make keys ambiguous.
    """
    if not isinstance(state, Mapping):
        raise UnsupportedState("the state", f"an object of type {type(state).__name__}", "give a dict of name to part")
    if not state:
        raise UnsupportedState("the state", "an empty dict", "name at least one part")
    for name, part in state.items():
        check_name(name)
        if not isinstance(part, Stateful):
            raise UnsupportedState(
                name,
                f"an object of type {type(part).__name__}, which has no state_dict() and load_state_dict(),",
                "wrap it in an object that has them, as Progress() is for counters of your own",
            )


def check_name(name: Any) -> None:
    """Refuse what can't be the name of a part: `UnsupportedState`."""
    if not isinstance(name, str) or not name or "." in name or name.startswith("$") or not _is_text(name):
        raise UnsupportedState(ascii(name), "a part of this name", "use a name without dots")
    if len(name) > MAX_TEXT_LENGTH:
        found = f"a part whose name has {len(name):,} characters"
        raise UnsupportedState(f"{name[:40]!a}...", found, f"use a name of {MAX_TEXT_LENGTH:,} at most")


def collect(state: State, rank: int, outcome: Outcome) -> dict[str, Any]:
    """The state dict to save or to fill.

    All parts are asked, in the order of their names, even if one of them raises: some call collectives, so every rank
    must ask the same parts in the same order. The first error is kept in `outcome`.
    """
    collected: dict[str, Any] = {}
    for name in sorted(state):
        with outcome.catch():
            collected[name] = _of_part(state[name], rank)
    return collected


def check_saving(state: State) -> None:
    """Refuse what was collected and must not be saved, though it may be loaded into: `UnsupportedState`. Local."""
    for name in sorted(state):
        _refuse_sharded(name, state[name])
        ask = getattr(state[name], "check_saving", None)
        if ask is not None:
            ask()


def share_names(ranks: Ranks, phase: str, state: State, outcome: Outcome, numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's `numbers` (its step, or others that must agree), and the digest of its parts' names. Collective.

    Raises:
        UnsupportedState: on every rank, if `outcome` holds an error on any; a rank whose own does raises that instead.
    """
    refused = outcome.error is not None
    # Zeros where refused: `numbers` are sent as 64-bit integers, and a refused step may not fit.
    mine = [1, *([0] * len(numbers)), 0] if refused else [0, *numbers, _names_digest(state)]
    everyone = ranks.all_gather_ints(phase, mine)
    if outcome.error is not None:
        raise outcome.error
    others = [rank for rank, (bad, *_) in enumerate(everyone) if bad]
    if others:
        raise UnsupportedState("the state", f"what ranks {others} gave", "their own errors say why")
    return [row[1:] for row in everyone]


def refuse_different(state: State, digests: Sequence[int]) -> None:
    """Refuse ranks whose parts have different names; `digests` has the digest of every rank.

    Raises:
        UnsupportedState: on every rank, as all compare the same digests.
    """
    others = sorted(rank for rank, digest in enumerate(digests) if digest != digests[0])
    if others:
        raise UnsupportedState(
            "the state",
            f"a dict whose part names (here {', '.join(sorted(state))}) differ between rank 0 and ranks {others}",
            "give every rank the same names",
        )


def loading_order(state: State) -> list[str]:
    """Names in the order in which parts are loaded: random streams last, as loading other parts may draw from them."""
    return sorted(state, key=lambda name: (bool(getattr(state[name], "loads_last", False)), name))


def rebuild(
    opened: OpenCheckpoint,
    prefix: KeyPath,
    template: Any,
    places: Mapping[str, torch.Tensor],
    stored: Mapping[str, Any],
) -> tuple[Any, dict[str, torch.Tensor]]:
    """What was saved under `prefix`, with tensors still to be filled.

    Args:
        template: The part's present value. Rebuilt dicts that contain tensors take their key order from it.
        places: The part's present tensors by flat key; one that fits is copied, so that device and sharding are kept.
        stored: The values of entries that are not tensors, by flat key.

    Returns:
        The nested value, and its tensors by flat key.
    """
    rows = [row for row in opened.first_rows() if row.path[: len(prefix)] == prefix]
    tensors = {row.key: _place(row, places.get(row.key)) for row in rows if row.dtype is not None}
    whole = {row.path[len(prefix) :] for row in rows if row.dtype is None}
    return _in_order_of(template, nest(opened, prefix, {**stored, **tensors}), whole, ()), tensors


def nest(opened: OpenCheckpoint, prefix: KeyPath, leaves: Mapping[str, Any]) -> Any:
    """The nested value under `prefix`; that of the whole state, which is a dict, if `prefix` is empty.

    Args:
        leaves: The values of all entries under `prefix`, by flat key.
    """
    nested: Any = None if prefix else {}
    trees = {row.path: row for row in opened.trees.values() if row.path[: len(prefix)] == prefix}
    # Compared as text: DCP's own paths have "1" where the tree has the int.
    below = {tuple(map(str, path)) for path in trees}
    for path, row in trees.items():
        nested = put(nested, path[len(prefix) :], tree_value(opened, row))
    for path, key in sorted(((opened.chunks[key][0].path, key) for key in leaves), key=lambda entry: _order(entry[0])):
        if not _is_below(path, below):
            nested = put(nested, path[len(prefix) :], leaves[key])
    return nested


def tree_value(opened: OpenCheckpoint, row: StoredChunk) -> Any:
    """A container without tensors, as it was saved."""
    return values.decode(row.value or "", f"{opened.path}: {row.key!r}")


def divided(opened: OpenCheckpoint, path: KeyPath, template: Any) -> OpenCheckpoint:
    """`opened` as if each dict that is stored by key now had been when it was saved; it may be a tree there.

    As a tree it would be taken whole, and nobody would see that its entries are not those of `template`, the part's
    present value at `path`.
    """
    if not isinstance(template, ByKey):
        return opened
    row = opened.trees.get(".".join(map(str, path)))
    saved = None if row is None else tree_value(opened, row)
    if row is not None and isinstance(saved, Mapping) and all(isinstance(name, str) for name in saved):
        # Entries that are no containers have a row of their own beside the tree.
        below = [
            tree_row((*path, name), values.encode(child, name))
            for name, child in saved.items()
            if isinstance(child, Mapping | list)
        ]
        others = {key: tree for key, tree in opened.trees.items() if tree is not row}
        opened = replace(opened, trees=others | {tree.key: tree for tree in below})
    for name, child in template.items():
        opened = divided(opened, (*path, name), child)
    return opened


def entries_of(opened: OpenCheckpoint, name: str) -> list[StoredChunk]:
    """One row for each entry that is stored under part `name`, trees included."""
    return [row for row in opened.first_rows() if row.path[0] == name]


def saved_parts(opened: OpenCheckpoint) -> set[str]:
    """The names of the parts in a checkpoint."""
    return {str(row.path[0]) for row in opened.first_rows()}


def _is_text(name: str) -> bool:
    # Names are hashed and stored as UTF-8, which can't encode half of a surrogate pair.
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _names_digest(state: State) -> int:
    """63 bits of the names of the parts, to be compared between ranks."""
    return digest_number("\n".join(sorted(state)).encode())


def _refuse_sharded(name: str, part: Any) -> None:
    """Refuse to save a bare optimizer of sharded parameters: `UnsupportedState`.

    What comes back to a fresh one would not be sharded, and its next step would fail. One that has made a step has
    tensors to be filled, so what was saved of one can be loaded.
    """
    # A class with a state dict of its own, such as torchtitan's OptimizersContainer, sees to that itself.
    is_torchs = isinstance(part, Optimizer) and type(part).state_dict is Optimizer.state_dict
    if is_torchs and any(isinstance(p, DTensor) for group in part.param_groups for p in group["params"]):
        advice = "wrap it: OptimizerState(model, optimizer)"
        raise UnsupportedState(name, f"a bare {type(part).__name__} of sharded parameters", advice)


def _of_part(part: Any, rank: int) -> Any:
    value = part.state_dict()
    if isinstance(part, RankPart):
        return ByKey({layout.rank_key(rank): value})
    if isinstance(part, StrictPart) and part.by_key:
        value = {key: ByKey(child) if key in part.by_key and child else child for key, child in value.items()}
        return ByKey(value) if value else value
    return value


def _in_order_of(template: Any, value: Any, whole: Set[KeyPath], path: KeyPath) -> Any:
    # An index is sorted by key, but a part may depend on the order of its dict. What was saved whole keeps its order.
    if path in whole:
        return value
    if isinstance(value, dict) and isinstance(template, Mapping):
        keys = [*(key for key in template if key in value), *(key for key in value if key not in template)]
        return {key: _in_order_of(template.get(key), value[key], whole, (*path, key)) for key in keys}
    if isinstance(value, list) and isinstance(template, list):
        pairs = zip_longest(template, value)
        return [_in_order_of(like, item, whole, (*path, at)) for at, (like, item) in enumerate(pairs)][: len(value)]
    return value


def _is_below(path: KeyPath, trees: Set[tuple[str, ...]]) -> bool:
    # Each prefix is looked up, not compared with every tree: there may be as many trees as entries.
    text = tuple(map(str, path)) if trees else ()
    return any(text[:length] in trees for length in range(len(text) + 1))


def _order(path: KeyPath) -> list[tuple[bool, Any]]:
    """A sort key that puts the positions of a list in numeric order."""
    return [(isinstance(step, str), step) for step in path]


def _place(chunk: StoredChunk, template: torch.Tensor | None) -> torch.Tensor:
    dtype = getattr(torch, chunk.dtype or "")
    if template is not None and template.dtype == dtype and tuple(template.shape) == chunk.shape:
        # A copy: `template` may be the very tensor the part uses, which only its load_state_dict may change.
        return template.detach().clone()
    return torch.empty(chunk.shape, dtype=dtype, device="cpu")
