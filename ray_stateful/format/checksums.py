"""Checksums: one per block of a chunk, one per file. xxh3-64, which runs at the speed of memory.

They find damage, not forgery: whoever can write the bucket can write matching checksums too.
"""

from __future__ import annotations

import math
import struct

import xxhash
from typing_extensions import Buffer

CHECKSUM_BYTES = 8

MIN_BLOCK_BYTES = 1 << 10
MAX_BLOCK_BYTES = 1 << 16


def block_bytes_for(num_bytes: int) -> int:
    """The block size for chunks of a tensor of `num_bytes`: a power of two.

    A read of part of a chunk is widened to whole blocks: by half a block, on average, at each end of what a rank wants
    of a tensor. And every rank holds the checksums of all blocks, however little it reads. With blocks of b bytes this
    costs b and 8 * num_bytes / b bytes; the sum is least where b is the square root of 8 * num_bytes, whatever the
    number of ranks. A fixed fraction of the chunk's size would not do: more ranks would mean more checksums for each.

    Not below 1 KiB, where calling the hash costs more than the hashing; not above 64 KiB, the limit of format 1.
    """
    best = math.isqrt(CHECKSUM_BYTES * num_bytes)
    # The largest power of two that is not above it.
    return max(MIN_BLOCK_BYTES, min(MAX_BLOCK_BYTES, 1 << max(0, best.bit_length() - 1)))


def digest_number(data: Buffer) -> int:
    """63 bits of the checksum of `data`, as ranks send them to each other to compare what they have."""
    return int(checksum(data), 16) >> 1


def num_blocks(num_bytes: int, block_bytes: int) -> int:
    """How many blocks a chunk has; the last one may be short."""
    return -(-num_bytes // block_bytes)


def block_checksums(data: Buffer, block_bytes: int) -> bytes:
    """The checksums of `data`, block by block, 8 bytes each, little-endian."""
    view = memoryview(data).cast("B")
    digest = xxhash.xxh3_64_intdigest
    values = [digest(view[start : start + block_bytes]) for start in range(0, len(view), block_bytes)]
    return struct.pack(f"<{len(values)}Q", *values)


def first_bad_block(data: Buffer, block_bytes: int, expected: bytes | memoryview) -> int | None:
    """The number of the first block of `data` whose checksum differs from `expected`; `None` if all agree."""
    found = block_checksums(data, block_bytes)
    if found == expected:
        return None
    for block in range(len(found) // CHECKSUM_BYTES):
        part = slice(block * CHECKSUM_BYTES, (block + 1) * CHECKSUM_BYTES)
        if found[part] != expected[part]:
            return block
    return len(found) // CHECKSUM_BYTES


def checksum(data: Buffer) -> str:
    """The checksum of one whole small file: 16 hex digits."""
    return str(xxhash.xxh3_64_hexdigest(memoryview(data)))


class RunningChecksum:
    """The checksum of a file that is given piece by piece."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, data: Buffer) -> None:
        self._state.update(memoryview(data))

    def hexdigest(self) -> str:
        return str(self._state.hexdigest())
