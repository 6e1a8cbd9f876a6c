"""Checks that saved counts are valid counts: a checkpoint may hold anything under their names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

# The largest signed 64-bit integer: a larger number is no count of anything.
MAX_COUNT = 2**63 - 1


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy; `7.0` is, and `True` is not."""
    if isinstance(value, bool):
        return False
    return isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())


def count_problems(saved: Mapping[str, Any], least: Mapping[str, int]) -> tuple[str, ...]:
    """Why entries of `saved` are not counts of at least `least`, one line each; empty if all are."""
    if not isinstance(saved, Mapping):
        return (f"a {type(saved).__name__} is in the checkpoint, and no dict of counts: it is not one of ours",)
    found = []
    for name, lowest in least.items():
        value: Any = saved.get(name)
        if not is_whole(value) or not lowest <= int(value) <= MAX_COUNT:
            # Without the number itself: one from a file may have thousands of digits.
            words = "out of bounds" if is_whole(value) else f"a {type(value).__name__}"
            found.append(f"{name} is {words} in the checkpoint, and no count from {lowest} on: it is not one of ours")
    return tuple(found)
