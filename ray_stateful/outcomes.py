"""What becomes of each part: predicted before anything is loaded, completed afterwards. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ray_stateful.filling import EveryRank, Filled
from ray_stateful.report import PartReport, size
from ray_stateful.states.part import World
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.reading import ReadStatistics

# The outcome of a part that starts from initial weights instead of resuming where it was saved.
INITIAL = "initial"

_AS_SAVED = ("exact", "changed", "partial")


def foresee(
    filled: Mapping[str, Filled], world: World, opened: OpenCheckpoint, initial: bool = False
) -> dict[str, PartReport]:
    """Predict the outcome of each part from how it was matched. Refusals have been raised before this is called."""
    return {name: _foreseen(name, part, world, opened, initial) for name, part in filled.items()}


def complete(
    foreseen: PartReport,
    filled: Filled,
    how: str,
    described: str,
    read: ReadStatistics,
    opened: OpenCheckpoint,
    *,
    is_partial: bool,
    is_changed: bool,
) -> PartReport:
    """Add to `foreseen` what only loading, and the other ranks, could tell.

    Args:
        is_partial, is_changed: Whether that is so on any rank.
        how: What the part's `resize` returned, in a few words; empty if it was not called.
        described: What the part's `describe` returned; empty if `how` is not.
        read: What all ranks together read for the part.
    """
    said = described.split("; ")
    details = [how] if how else []
    # A loaded part may say again what it said when it was asked beforehand: report that once.
    details += [one for one in foreseen.details if one not in said]
    if _is_sharded(filled, opened) or foreseen.outcome == INITIAL:
        amplification = read.bytes_read / max(1, read.bytes_wanted)
        details.append(f"read {size(read.bytes_read)}, {amplification:.2f}x of what this world needs")
        details.append("verified" if opened.manifest else "unverified")
    if described:
        details.append(described)
    details += [note for note in filled.notes if note not in said]
    outcome = foreseen.outcome
    if outcome in _AS_SAVED:
        outcome = _word(is_partial, is_changed)
        if outcome != foreseen.outcome:
            details.append("on other ranks")
    return replace(foreseen, outcome=outcome, details=tuple(details))


def _foreseen(name: str, filled: Filled, world: World, opened: OpenCheckpoint, initial: bool) -> PartReport:
    if isinstance(filled.value, EveryRank):
        outcome = filled.part.resized_as
    else:
        outcome = INITIAL if initial else _word(filled.is_partial, bool(filled.changes))
    resharded = world.resized and _is_sharded(filled, opened)
    details = (f"resharded {world.saved_world_size} -> {world.world_size}",) if resharded else ()
    return PartReport(name=name, outcome=outcome, details=(*details, *filled.changes))


def _word(is_partial: bool, is_changed: bool) -> str:
    return "partial" if is_partial else "changed" if is_changed else "exact"


def _is_sharded(filled: Filled, opened: OpenCheckpoint) -> bool:
    firsts = [opened.chunks[source][0] for source in filled.sources.values()]
    return any(chunk.box.sizes != chunk.shape for chunk in firsts)
