"""Reads tensor bytes into tensors: parallel, bounded in memory, every block checked before a byte of it is copied."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from ray_stateful.errors import DamagedCheckpoint
from ray_stateful.format.checksums import CHECKSUM_BYTES, first_bad_block
from ray_stateful.format.chunks import Box, span_of, strides_of
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage import streams
from ray_stateful.storage.base import Storage
from ray_stateful.storage.ranges import Fetch, Piece, ReadLimits, fetches_of, pieces_of

T = TypeVar("T")

# Elements are moved as elements of these types, by size: numpy has no bfloat16 and no float8, and copying needs none.
_AS_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_AS_NUMPY: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}


@dataclass(frozen=True, slots=True)
class Request:
    """A box of a stored chunk (offsets within the chunk), and the tensor of the box's sizes that it fills."""

    chunk: StoredChunk
    box: Box
    into: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the box, as stored."""
        return self.box.num_elements * ITEM_BYTES[self.chunk.dtype or ""]


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """What reading cost: the bytes and requests asked of storage, and the bytes that were wanted."""

    bytes_read: int = 0
    bytes_wanted: int = 0
    num_requests: int = 0

    def __add__(self, other: ReadStatistics) -> ReadStatistics:
        return ReadStatistics(
            self.bytes_read + other.bytes_read,
            self.bytes_wanted + other.bytes_wanted,
            self.num_requests + other.num_requests,
        )


def read(
    storage: Storage, path: str, groups: Mapping[str, Sequence[Request]], limits: ReadLimits | None = None
) -> dict[str, ReadStatistics]:
    """Fill the tensors of all requests from the checkpoint in directory `path`.

    Returns:
        What each group of requests asked of storage.

    Raises:
        DamagedCheckpoint: bytes are missing, or are not those that were written. Tensors may be filled in part by then,
            with bytes that were checked.
    """
    limits = limits or ReadLimits()
    plans = {name: _planned(requests, limits) for name, requests in groups.items()}
    filled = [target for _, targets in plans.values() for target in targets]
    jobs = [partial(_fetch, storage, path, fetch, targets) for fetches, targets in plans.values() for fetch in fetches]
    streams.wait_before_other_threads(filled)
    try:
        in_threads(jobs, limits)
    finally:
        streams.wait_for_other_threads(filled)
    return {
        name: ReadStatistics(
            bytes_read=sum(fetch.stop - fetch.start for fetch in fetches),
            bytes_wanted=sum(request.num_bytes for request in groups[name]),
            num_requests=len(fetches),
        )
        for name, (fetches, _) in plans.items()
    }


def in_threads(jobs: Sequence[Callable[[], T]], limits: ReadLimits) -> list[T]:
    """Run jobs in `limits.num_threads` threads; returns what they return, in their order.

    The error of the first job, in this order, that fails is raised; jobs that have not begun by then are cancelled.
    """
    with ThreadPoolExecutor(max_workers=limits.num_threads, thread_name_prefix="checkpoint-read") as pool:
        under_way = [pool.submit(job) for job in jobs]
        try:
            return [job.result() for job in under_way]
        except BaseException:
            # Reading on is useless: the checkpoint is damaged, or storage is out of reach.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _planned(requests: Sequence[Request], limits: ReadLimits) -> tuple[list[Fetch], list[torch.Tensor]]:
    pieces = [
        piece
        for number, request in enumerate(requests)
        for piece in pieces_of(request.chunk, request.box, number, limits)
    ]
    return fetches_of(pieces, limits), [request.into.detach() for request in requests]


def read_exactly(storage: Storage, path: str, file: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file of the checkpoint in directory `path`.

    Raises:
        DamagedCheckpoint: the file is missing, or ends before `stop`.
    """
    where = posixpath.join(path, file)
    try:
        data = storage.read(where, start, stop - start)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(where, "the file is missing") from error
    if len(data) != stop - start:
        raise DamagedCheckpoint(where, f"ends {stop - start - len(data):,} bytes before byte {stop:,}")
    return data


def verify_blocks(chunk: StoredChunk, blocks: range, data: memoryview, where: str) -> None:
    """Check `blocks` of a chunk; `data` has the bytes of these blocks.

    Raises:
        DamagedCheckpoint: names the first block that is not what was written.
    """
    if not chunk.checksums:
        return  # a foreign checkpoint or weights; an index of ours is refused if it has no checksums
    expected = chunk.checksums[blocks.start * CHECKSUM_BYTES : blocks.stop * CHECKSUM_BYTES]
    bad = first_bad_block(data, chunk.block_bytes, expected)
    if bad is not None:
        at = chunk.data_offset + (blocks.start + bad) * chunk.block_bytes
        raise DamagedCheckpoint(where, f"block at byte {at:,} ({chunk.key!r}) is not what was written")


def place_checked(
    pieces: Iterable[Piece], targets: Sequence[torch.Tensor], data: memoryview, start: int, where: str
) -> None:
    """Check each block of `data`, the bytes of a file from byte `start` on, and copy pieces out of it to their targets.

    Raises:
        DamagedCheckpoint: names the first block that is not what was written.
    """
    checked: set[tuple[int, int, int]] = set()
    for piece in pieces:
        first, stop = piece.file_span
        blocks = (piece.chunk.data_offset, piece.blocks.start, piece.blocks.stop)
        if blocks not in checked:
            verify_blocks(piece.chunk, piece.blocks, data[first - start : stop - start], where)
            checked.add(blocks)
        _place(piece, data[first - start : stop - start], targets[piece.target])


def _fetch(storage: Storage, path: str, fetch: Fetch, targets: Sequence[torch.Tensor]) -> None:
    data = memoryview(read_exactly(storage, path, fetch.file, fetch.start, fetch.stop))
    place_checked(fetch.pieces, targets, data, fetch.start, posixpath.join(path, fetch.file))


def _place(piece: Piece, data: memoryview, target: torch.Tensor) -> None:
    """Copy the piece's elements out of `data`, the bytes of its whole blocks, to their place in `target`.

    They are cast if `target` has a different dtype: whether that is allowed was decided when the state was matched.
    """
    item_bytes = ITEM_BYTES[piece.chunk.dtype or ""]
    sizes = piece.box.sizes
    begin = piece.span[0] - piece.blocks.start * piece.chunk.block_bytes
    first, stop = span_of(piece.box, piece.chunk.box.sizes)
    run = np.frombuffer(data, dtype=_AS_NUMPY[item_bytes], count=stop - first, offset=begin)
    strides = tuple(stride * item_bytes for stride in strides_of(piece.chunk.box.sizes))
    source = np.lib.stride_tricks.as_strided(run, sizes, strides, writeable=False)
    for dim, (offset, size) in enumerate(zip(piece.target_offsets, sizes, strict=True)):
        target = target.narrow(dim, offset, size)
    dtype = getattr(torch, piece.chunk.dtype or "")
    # torch refuses to view a tensor that is conjugated or negated when it is read: elements are copied to such a one.
    is_plain = target.dtype == dtype and not (target.is_conj() or target.is_neg())
    if target.device.type == "cpu" and is_plain:
        np.copyto(target.view(_AS_TORCH[item_bytes]).numpy(), source)
        return
    host = torch.empty(sizes, dtype=_AS_TORCH[item_bytes], device="cpu")
    np.copyto(host.numpy(), source)
    if is_plain:
        target.view(_AS_TORCH[item_bytes]).copy_(host)
    else:
        target.copy_(host.view(dtype))
