"""Checks the rows of an index, whoever wrote it, before a byte is allocated or read for them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray_stateful.format.checksums import CHECKSUM_BYTES, MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, num_blocks
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.layout import is_item_file
from ray_stateful.format.rows import MAX_DIMS, StoredChunk, tree_row


def row_problem(row: StoredChunk, file_sizes: Mapping[str, int]) -> str | None:
    """Why no writer of ours makes such a row in a checkpoint with files of these sizes; `None` if one could."""
    if not row.path or ".".join(map(str, row.path)) != row.key:
        return f"its path {row.path} is not its key"
    if row.is_tree:
        return None if row == tree_row(row.path, row.value or "") else "a tree with more than a path and a value"
    if not is_item_file(row.file) or row.file not in file_sizes:
        return f"file {row.file!r} is not a file of this checkpoint"
    if row.item_offset < 0 or row.item_length < 0 or row.item_offset + row.item_length > file_sizes[row.file]:
        return f"bytes {row.item_offset}+{row.item_length} are not within {row.file!r}"
    if row.dtype is None:
        return _value_problem(row)
    if row.dtype not in ITEM_BYTES:
        return f"unknown dtype {row.dtype!r}"
    if row.value is not None:
        return "a tensor with a value"
    if len(row.shape) > MAX_DIMS or not len(row.shape) == len(row.box.offsets) == len(row.box.sizes):
        return f"shape {row.shape}, offsets {row.box.offsets} and sizes {row.box.sizes} do not match"
    # Also where a size is 0: strides are products of the other sizes.
    if any(size < 0 for size in row.shape) or math.prod(max(size, 1) for size in row.shape) * 16 > 2**62:
        return f"shape {row.shape} is absurd"
    if any(
        o < 0 or n < 0 or o + n > size for o, n, size in zip(row.box.offsets, row.box.sizes, row.shape, strict=True)
    ):
        return f"chunk at {row.box.offsets} of sizes {row.box.sizes} is outside of shape {row.shape}"
    stop = row.data_offset + row.num_bytes
    if not row.item_offset <= row.data_offset <= stop <= row.item_offset + row.item_length:
        return f"data at {row.data_offset} of {row.num_bytes} bytes is outside of its item"
    return _block_problem(row)


def _value_problem(row: StoredChunk) -> str | None:
    if row.value is None:
        return "neither a tensor nor a value"
    if row.shape or row.box.offsets or row.box.sizes or row.data_offset != row.item_offset:
        return "a value with a shape"
    return _block_problem(row)


def _block_problem(row: StoredChunk) -> str | None:
    if not MIN_BLOCK_BYTES <= row.block_bytes <= MAX_BLOCK_BYTES or row.block_bytes & (row.block_bytes - 1):
        return f"blocks of {row.block_bytes} bytes"
    if len(row.checksums) != CHECKSUM_BYTES * num_blocks(row.num_bytes, row.block_bytes):
        return f"{len(row.checksums)} bytes of checksums for {row.num_bytes} bytes in blocks of {row.block_bytes}"
    return None
