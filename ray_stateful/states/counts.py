"""Whether what was saved as counts can be counted on from: a checkpoint may hold anything under their names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What fits into 64 bits with a sign: more is no count of anything.
MAX_COUNT = 2**63 - 1


def count_problems(saved: Mapping[str, Any], least: Mapping[str, int]) -> tuple[str, ...]:
    """What keeps entries of `saved` from being counts of at least `least`, one line each."""
    found = []
    for name, lowest in least.items():
        value = saved.get(name)
        if type(value) is not int or not lowest <= value <= MAX_COUNT:
            words = f"a {type(value).__name__}" if type(value) is not int else f"{value:.6g}"
            found.append(f"{name} is {words} in the checkpoint, and no count from {lowest} on: it is not one of ours")
    return tuple(found)
