"""The order of an epoch, without a list of it: a keyed permutation, computed only at the positions asked for.

Pure: the sample at a position is a function of (length, seed, epoch, position), in integer arithmetic that is the same
on every platform and in every version. Memory and the cost of a look-up do not grow with the length.

A Feistel network permutes the integers of `bits` bits, `bits` being the fewest that hold every position; results
past the end are sent through again until they are within it ("cycle walking", J. Black and P. Rogaway, "Ciphers
with Arbitrary Finite Domains", 2002), which is still a permutation and takes less than two rounds on average.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

MAX_LENGTH = 2**62

# More than the four that make a good cipher of large halves: a dataset of ten samples has halves of two bits, and
# fewer rounds visibly prefer some of its orders.
_NUM_ROUNDS = 10

# The finaliser of splitmix64 (S. Vigna, public domain): every bit of the input reaches every bit of the output.
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


class Permutation:
    """A permutation of `range(length)`, a different one for each (seed, epoch)."""

    def __init__(self, length: int, *, seed: int, epoch: int) -> None:
        if not 0 <= length <= MAX_LENGTH:
            raise ValueError(f"length={length} can't be permuted: it must be within 0 and {MAX_LENGTH}")
        self._length = length
        bits = max(length - 1, 0).bit_length()
        self._right_bits = np.uint64(bits // 2)
        self._left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._right_mask = np.uint64((1 << (bits // 2)) - 1)
        self._keys = _round_keys(seed, epoch)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        return int(self.take(range(position, position + 1))[0])

    def take(self, positions: range) -> npt.NDArray[np.int64]:
        """The samples at `positions`, in their order.

        Raises:
            IndexError: a position is negative, or past the end.
        """
        if positions and not all(0 <= end < self._length for end in (positions[0], positions[-1])):
            raise IndexError(f"positions {positions} are not all within the {self._length} of the epoch")
        values = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64).astype(np.uint64)
        values = self._network(values)
        outside = np.flatnonzero(values >= self._length)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self._length]
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._right_bits, values & self._right_mask
        # The halves change in turn and keep their widths, so an odd number of bits needs no larger domain.
        for left_key, right_key in self._keys:
            left = left ^ (_mix(right ^ left_key) & self._left_mask)
            right = right ^ (_mix(left ^ right_key) & self._right_mask)
        joined: npt.NDArray[np.uint64] = (left << self._right_bits) | right
        return joined


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLY_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLY_2
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _round_keys(seed: int, epoch: int) -> list[tuple[np.uint64, np.uint64]]:
    # Text, not fixed-size integers: a seed may be any Python int. This wording fixes the order: if it changed, a run
    # that was saved by an earlier version would go on in a different order.
    name = f"ray_stateful permutation 1|seed {seed}|epoch {epoch}".encode()
    words = np.frombuffer(hashlib.shake_128(name).digest(8 * _NUM_ROUNDS), dtype="<u8").astype(np.uint64)
    return list(zip(words[0::2], words[1::2], strict=True))
