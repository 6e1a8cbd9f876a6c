"""Whether a state fits a checkpoint, decided before either is touched. Pure; no I/O, no collectives."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ray_stateful.format.dtypes import dtype_name
from ray_stateful.format.rows import StoredChunk
from ray_stateful.states.part import StrictPart
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.staging import local_tensors
from ray_stateful.storage.structure import is_tensor

_CASTABLE = frozenset({"bfloat16", "float16", "float32", "float64"})


@dataclass(frozen=True, slots=True)
class Match:
    """How a strict part fits a checkpoint.

    `problems` forbid loading, `notes` go to the resume report. `sources` are the keys of this rank to load, each
    with the key of the checkpoint it is read from; `absent` are those to leave out. `trees` are the keys of containers
    that are taken whole. `is_partial` says that something of this state, or of the checkpoint, is not loaded.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    sources: Mapping[str, str]
    absent: frozenset[str]
    trees: tuple[str, ...]
    is_partial: bool


def match_strict(
    name: str,
    part: StrictPart,
    flat: Mapping[str, Any],
    everyones_keys: frozenset[str],
    opened: OpenCheckpoint,
    *,
    may_cast: bool = False,
) -> Match:
    """Compare a strict part with what a checkpoint has of it.

    Args:
        flat: This rank's flat state dict of the part, keys with the part's name.
        everyones_keys: The keys of all ranks together.
        may_cast: A floating-point tensor may have a different dtype in the checkpoint: a note, not a problem.
    """
    prefix = f"{name}."
    stored = {key for key, chunks in opened.chunks.items() if chunks[0].path[0] == name}
    # Whoever loads a tree, a scheduler for example, compares its contents: only trees with entries here count.
    here = [tree for tree, row in opened.trees.items() if row.path[0] == name]
    in_order = sorted(everyones_keys) if here else []
    trees = {tree for tree in here if _has_entry_below(in_order, f"{tree}.")}
    lengths = sorted({len(tree) for tree in trees})
    loose = {
        key for key in everyones_keys | stored if not any(key[n : n + 1] == "." and key[:n] in trees for n in lengths)
    }
    missing, unexpected = (everyones_keys & loose) - stored, (stored & loose) - everyones_keys
    judged = part.reconcile(_without(prefix, missing), _without(prefix, unexpected))
    instead = {prefix + key: prefix + source for key, source in judged.instead.items()}
    sources = {key: instead.get(key, key) for key in flat if key in loose and (key in stored or key in instead)}
    problems, notes, is_partial = list(judged.problems), list(judged.notes), judged.is_partial
    problems += [
        f"{key.removeprefix(prefix)}: a tensor here, but part of a value that is no tensor in the checkpoint"
        for key in flat
        if key not in loose and is_tensor(flat[key])
    ]
    casts: Counter[str] = Counter()
    for key, source in list(sources.items()):
        chunk = opened.chunks[source][0]
        cast = _cast(flat[key], chunk) if may_cast else None
        if cast is not None:
            casts[cast] += 1
        difference = _difference(flat[key], chunk, cast is not None)
        if difference is None:
            continue
        if "_extra_state" in key.split("."):
            # Transformer Engine's: its size, and whether it is there at all, may differ at any time.
            notes.append(f"{key.removeprefix(prefix)} is left alone: {difference}")
            del sources[key]
            is_partial = True
        else:
            problems.append(f"{key.removeprefix(prefix)}: {difference}")
    for key, other in _two_in_one(sources, flat, opened):
        kept = other.removeprefix(prefix)
        problems.append(f"{key.removeprefix(prefix)}: the same tensor as {kept} here, and not in the checkpoint")
    notes += [f"cast from {cast}: {number} tensors" for cast, number in sorted(casts.items())]
    return Match(
        problems=tuple(f"{name}.{problem}" for problem in problems),
        notes=tuple(notes),
        sources=sources,
        absent=frozenset(key for key in flat if key in loose and key not in sources),
        trees=tuple(tree for tree in here if tree in trees),
        is_partial=is_partial,
    )


def _has_entry_below(keys: Sequence[str], prefix: str) -> bool:
    """Whether any of `keys`, which are sorted, begins with `prefix`."""
    at = bisect_left(keys, prefix)
    return at < len(keys) and keys[at].startswith(prefix)


def _without(prefix: str, keys: Set[str]) -> frozenset[str]:
    return frozenset(key.removeprefix(prefix) for key in keys)


def _two_in_one(
    sources: Mapping[str, str], flat: Mapping[str, Any], opened: OpenCheckpoint
) -> Iterator[tuple[str, str]]:
    """Keys that are one tensor here (tied weights) and two different ones in the checkpoint: either could be loaded.

    Known from the checksums: not for a checkpoint that has none, nor for tensors that were cut differently.
    """
    first: dict[tuple[Any, ...], str] = {}
    for key, _, tensor in local_tensors({key: flat[key] for key in sorted(sources)}):
        # The result of a collective that nobody has waited for has no memory of its own to compare.
        if tensor.numel() == 0 or tensor.data_ptr() == 0:
            continue
        # A complex tensor and its conjugate have one memory, and different values.
        seen_as = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        other = first.setdefault((tensor.data_ptr(), *seen_as), key)
        if other != key and _differ(opened.chunks[sources[other]], opened.chunks[sources[key]]):
            yield key, other


def _differ(one: Sequence[StoredChunk], other: Sequence[StoredChunk]) -> bool:
    """Whether two tensors have a chunk of the same box with different checksums."""
    contents = {chunk.box: bytes(chunk.checksums) for chunk in one}
    return any(contents.get(chunk.box, bytes(chunk.checksums)) != bytes(chunk.checksums) for chunk in other)


def _cast(value: Any, chunk: StoredChunk) -> str | None:
    """The dtypes a tensor has to be cast from and to, as text; `None` if it need not be cast, or must not.

    Integers and 8-bit floats must not: they mean nothing without a scale, of which a cast does not know.
    """
    here = dtype_name(value.dtype) if is_tensor(value) else chunk.dtype
    castable = here in _CASTABLE and chunk.dtype in _CASTABLE and here != chunk.dtype
    return f"{chunk.dtype} to {here}" if castable else None


def _difference(value: Any, chunk: StoredChunk, is_cast: bool) -> str | None:
    if not is_tensor(value):
        return None if chunk.dtype is None else f"a {type(value).__name__} here, a tensor in the checkpoint"
    if chunk.dtype is None:
        return "a tensor here, but no tensor in the checkpoint"
    shape, dtype = tuple(value.size()), dtype_name(value.dtype)
    if shape != chunk.shape:
        return f"shape {shape} here, {chunk.shape} in the checkpoint"
    if dtype != chunk.dtype and not is_cast:
        return (
            f"dtype {dtype} here, {chunk.dtype} in the checkpoint: cast the model first, "
            "a restore that changes values would not be exact"
        )
    return None
