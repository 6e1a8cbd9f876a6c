"""Numbers, and tuples of them, of one hash: what makes Python's dicts and sets compare each with each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice, product

# A number and the same plus this have one hash.
MODULUS = 2**61 - 1

# Of tuples: Objects/tupleobject.c
_PRIME_1, _PRIME_2, _PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
_WORD = 1 << 64


def pairs_of_one_hash(number: int) -> Iterator[tuple[int, int]]:
    """Pairs of a small number and a large one."""
    return islice(_of_one_hash((first,) for first in count()), number)


def offsets_of_one_hash(number: int, num_dims: int) -> list[tuple[int, ...]]:
    """Places within a tensor whose dims are 1, but for the last, of 2**57."""
    firsts = product((0, 1), repeat=num_dims - 1)
    found = list(islice((one for one in _of_one_hash(firsts) if 0 <= one[-1] < 1 << 57), number))
    assert len(found) == number
    return found


def _of_one_hash(firsts: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Each of `firsts` with the last number that gives it the hash."""
    wanted = None
    for first in firsts:
        sum_ = _PRIME_5
        for one in first:
            sum_ = _turned(sum_ + hash(one) % _WORD * _PRIME_2) * _PRIME_1 % _WORD
        wanted = wanted or (sum_ + 12345 * _PRIME_2) % _WORD
        last = (wanted - sum_) * pow(_PRIME_2, -1, _WORD) % _WORD
        last -= _WORD if last >= _WORD // 2 else 0
        # A hash itself, and no number that has another one.
        if abs(last) < MODULUS and last != -1:
            yield *first, last


def _turned(value: int) -> int:
    value %= _WORD
    return (value << 31 | value >> 33) % _WORD
