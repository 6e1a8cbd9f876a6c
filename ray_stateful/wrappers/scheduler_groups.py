"""Puts the lists of a scheduler that have an entry per group of its optimizer in the order of the groups here. Pure.

Their entries are stored by group number, but parameters by name: with the groups in a different order, or one of them
divided, each learning rate would go to whichever group has its number. The rates that are stored with every parameter
tell which entry belongs to which group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_stateful.wrappers.optimizer_keys import equal

# Listed by name, as length does not tell: there may be the same number of milestones, or of inner schedulers.
_BY_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas")
# Lists that tell which group an entry belongs to: its value is that of this hyperparameter of the group.
_RATES = {"base_lrs": "initial_lr", "_last_lr": "lr"}


def regrouped(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], groups: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    """The saved state `theirs`, with its lists in the order of the groups here; unchanged if they have that order.

    Args:
        ours: The state of the scheduler here; a group whose parameters are all new takes its entries from it.
        groups: The saved hyperparameters of each group here; empty if all of its parameters are new, `None` if it has
            no parameters.

    Raises:
        ValueError: it is ambiguous which entry belongs to which group.
    """
    lists = {name: theirs[name] for name in _BY_GROUP if isinstance(theirs.get(name), (list, tuple))}
    lengths = {len(values) for values in lists.values()}
    if len(lengths) != 1:
        return dict(theirs)
    (num_saved,) = lengths
    if any(isinstance(ours.get(name), (list, tuple)) and len(ours[name]) == num_saved for name in lists):
        # Groups that were added after the scheduler was made, here as there, have no entries.
        groups = groups[:num_saved]
    told = _told(lists, groups)
    found = [_entries(num_saved, told, saved) for saved in groups]
    # Hyperparameters are saved with parameters, so nothing is known of a group without any. Among as many groups as
    # were saved it is taken for the one in its place, or the very code that saved would be refused.
    in_place = [groups[number] is None or number in of for number, of in enumerate(found)]
    if num_saved == len(groups) and all(in_place):
        return dict(theirs)
    arranged = {
        name: [_entry(values, of, ours.get(name, ()), number) for number, of in enumerate(found)]
        for name, values in lists.items()
    }
    return {**theirs, **arranged}


def _told(
    lists: Mapping[str, Sequence[Any]], groups: Sequence[Mapping[str, Any] | None]
) -> list[tuple[str, dict[float, set[int]]]]:
    """The rates that can tell groups apart, each with the numbers of the entries that have a given value."""
    told: list[tuple[str, dict[float, set[int]]]] = []
    for name, rate in _RATES.items():
        numbers: dict[float, set[int]] = {}
        for number, value in enumerate(lists.get(name, ())):
            numbers.setdefault(float(value), set()).add(number)
        wanted = [saved.get(rate) for saved in groups if saved]
        # A rate that was set by hand, or by a different scheduler of the same optimizer, tells nothing.
        if all(value is not None and float(value) in numbers for value in wanted):
            told.append((rate, numbers))
    return told


def _entries(
    num_saved: int, told: Sequence[tuple[str, Mapping[float, set[int]]]], saved: Mapping[str, Any] | None
) -> set[int]:
    """The numbers of the entries that may belong to a group; none if the group is new or has no parameters."""
    if not saved:
        return set()
    found = set(range(num_saved))
    for rate, numbers in told:
        found = found & numbers[float(saved[rate])] or found
    return found


def _entry(values: Sequence[Any], found: set[int], ours: Sequence[Any], number: int) -> Any:
    candidates = [values[entry] for entry in sorted(found)] or list(ours[number : number + 1])
    if not candidates or any(not equal(candidates[0], other) for other in candidates):
        raise ValueError(
            "stores its lists by group number, and the groups here differ from the saved ones: group the parameters as "
            "they were when saved, or leave the scheduler out of OptimizerState"
        )
    return candidates[0]
