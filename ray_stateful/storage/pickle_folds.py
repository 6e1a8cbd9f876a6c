"""How large a pickle's tuples are once they are unfolded. Pure; reads the instructions and follows none.

A pickle may use an object many times, and so write a tuple of two tuples of two tuples: sixty levels take 300 bytes,
and as a dict key 2**60 steps to hash. torch's own reader, given `weights_only=True`, makes such a key.
"""

from __future__ import annotations

import pickletools
from typing import NamedTuple

MAX_UNFOLDED = 1 << 20
MAX_DEPTH = 200


class _Folded(NamedTuple):
    """What is known of an object: how many objects it is, and how deep they lie in each other."""

    size: int = 1
    depth: int = 1


_LEAF, _MARK = _Folded(), _Folded(0, 0)


def folding_problem(pickled: bytes) -> str | None:
    """Why the tuples of a pickle are not to be hashed; `None` if they are harmless."""
    stack: list[_Folded] = []
    memo: dict[int, _Folded] = {}
    try:
        for code, argument, _ in pickletools.genops(pickled):
            if code.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(str(argument))])
            elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = stack[-1]
            elif code.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif code.name == "MARK":
                stack.append(_MARK)
            else:
                taken = _take(stack, code)
                made = _tuple_of(taken) if code.name.startswith("TUPLE") else _LEAF
                if made.size > MAX_UNFOLDED or made.depth > MAX_DEPTH:
                    return f"a tuple in its pickle unfolds to {made.size:,} objects, {made.depth:,} deep"
                stack += [made] * len(code.stack_after)
    except (IndexError, KeyError, ValueError) as error:
        return f"its pickle can't be read: {type(error).__name__}: {error}"
    return None


def _take(stack: list[_Folded], code: pickletools.OpcodeInfo) -> list[_Folded]:
    """Take what an instruction takes: so many objects, or all that were put there since the last mark."""
    taken: list[_Folded] = []
    if pickletools.markobject in code.stack_before:
        while stack[-1] is not _MARK:
            taken.append(stack.pop())
        stack.pop()
        # What lies below the mark: the container that they go into.
        below = code.stack_before.index(pickletools.markobject)
    else:
        below = len(code.stack_before)
    for _ in range(below):
        taken.append(stack.pop())
    return taken


def _tuple_of(items: list[_Folded]) -> _Folded:
    return _Folded(1 + sum(item.size for item in items), 1 + max((item.depth for item in items), default=0))
