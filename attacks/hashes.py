"""Numbers, and tuples of them, of one hash: what makes Python's dicts and sets compare each with each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count
from typing import Any

import numpy as np

# A number and the same plus this have one hash.
MODULUS = 2**61 - 1

# Of tuples: Objects/tupleobject.c
_PRIME_1, _PRIME_2, _PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
_WORD = 1 << 64


def pairs_of_one_hash(number: int) -> Iterator[tuple[int, int]]:
    """Pairs of a small number and a large one."""
    wanted = _added(_PRIME_5, 0)
    for first in count():
        last = _last(_added(_PRIME_5, first), wanted)
        # A hash itself, and no number that has another one.
        if abs(last) < MODULUS and last != -1:
            yield first, last
            number -= 1
        if number == 0:
            return


@cache
def offsets_of_one_hash(number: int, num_dims: int) -> list[tuple[int, ...]]:
    """Places within a tensor whose dims are 1, but for the last, of 2**57."""
    firsts = np.array([_PRIME_5], dtype=np.uint64)
    for _ in range(num_dims - 1):
        firsts = np.concatenate([_added(firsts, np.uint64(0)), _added(firsts, np.uint64(1))])
    lasts = (firsts[0] - firsts) * np.uint64(pow(_PRIME_2, -1, _WORD))
    chosen = np.flatnonzero(lasts < 1 << 57)[:number]
    assert len(chosen) == number
    return [(*(int(one) >> dim & 1 for dim in range(num_dims - 1)), int(lasts[one])) for one in chosen]


def _added(sum_: Any, number: Any) -> Any:
    """What a tuple's hash is after another small number: of ints of any size, or of arrays of 64 bits."""
    prime_1, prime_2 = (type(number)(prime) for prime in (_PRIME_1, _PRIME_2))
    turned = _word(sum_ + number * prime_2)
    return _word(_word(turned << type(number)(31) | turned >> type(number)(33)) * prime_1)


def _word(value: Any) -> Any:
    return value % _WORD if isinstance(value, int) else value


def _last(sum_: int, wanted: int) -> int:
    """The last number of a tuple that gives it the hash, as one of 64 bits with a sign."""
    last = (wanted - sum_) * pow(_PRIME_2, -1, _WORD) % _WORD
    return last - _WORD if last >= _WORD // 2 else last
