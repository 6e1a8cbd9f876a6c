"""What to read: turns boxes of tensors into few ranges of bytes in files. Pure; no torch, no I/O.

A piece is a box of one stored chunk. Its bytes are widened to whole blocks, as only a whole block can be checked;
then pieces that lie close together are joined to one fetch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ray_stateful.format.chunks import Box, span_of, split
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.rows import StoredChunk

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """How a rank reads.

    `max_fetch_bytes` is the most that one request asks for (a block may add a little), `max_gap_bytes` the most that is
    read between two pieces and thrown away, rather than make two requests, and `num_threads` the number of requests at
    the same time. What a rank has under way is bounded by `max_fetch_bytes * num_threads`.
    """

    max_fetch_bytes: int = 8 << 20
    max_gap_bytes: int = 16 << 10
    num_threads: int = 16

    def __post_init__(self) -> None:
        if self.max_fetch_bytes < 1 or self.max_gap_bytes < 0 or self.num_threads < 1:
            raise ValueError(f"{self}: at least one byte a fetch, a gap of at least 0 bytes, and one thread are needed")


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a stored chunk (offsets within the chunk), the number of its target, and its offsets in the target."""

    chunk: StoredChunk
    box: Box
    target: int
    target_offsets: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """First and past-the-last byte of the box, counted from the chunk's first byte."""
        item_bytes = ITEM_BYTES[self.chunk.dtype or ""]
        first, stop = span_of(self.box, self.chunk.box.sizes)
        return first * item_bytes, stop * item_bytes

    @property
    def blocks(self) -> range:
        """The blocks of the chunk that the span touches."""
        start, stop = self.span
        return range(start // self.chunk.block_bytes, -(-stop // self.chunk.block_bytes))

    @property
    def file_span(self) -> tuple[int, int]:
        """First and past-the-last byte to fetch, counted from the beginning of the file: whole blocks."""
        blocks, size = self.blocks, self.chunk.block_bytes
        start, stop = blocks.start * size, min(blocks.stop * size, self.chunk.num_bytes)
        return self.chunk.data_offset + start, self.chunk.data_offset + stop


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request: bytes `start` to `stop` of a file, and the pieces that are cut from them."""

    file: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def pieces_of(chunk: StoredChunk, box: Box, target: int, limits: ReadLimits) -> list[Piece]:
    """Cut `box` of `chunk` (offsets within it) into pieces of at most about one fetch each."""
    item_bytes = ITEM_BYTES[chunk.dtype or ""]
    max_span = max(1, limits.max_fetch_bytes // item_bytes)
    return [
        Piece(chunk, part, target, part.relative_to(box).offsets)
        for part in split(box, chunk.box.sizes, max_span, limits.max_gap_bytes // item_bytes)
    ]


def fetches_of(pieces: Iterable[Piece], limits: ReadLimits) -> list[Fetch]:
    """Join pieces that lie close together in a file, up to the size of one fetch."""
    ordered = sorted(pieces, key=lambda piece: (_span_in_file(piece), piece.target, piece.target_offsets))
    return [
        Fetch(file, start, stop, tuple(group)) for file, start, stop, group in joined(ordered, _span_in_file, limits)
    ]


def joined(
    items: Iterable[T], span: Callable[[T], tuple[str, int, int]], limits: ReadLimits
) -> list[tuple[str, int, int, list[T]]]:
    """The requests that read `items`: for each, file, first and past-the-last byte, and the items that lie there.

    Args:
        items: Sorted by `span`.
        span: The file of an item, and its first and past-the-last byte there.
    """
    groups: list[tuple[str, int, int, list[T]]] = []
    for item in items:
        file, first, last = span(item)
        if groups:
            of_group, start, stop, group = groups[-1]
            # An item within the bytes that are fetched anyway costs nothing, however large the fetch is.
            fits = last <= stop or last - start <= limits.max_fetch_bytes
            if file == of_group and first - stop <= limits.max_gap_bytes and fits:
                groups[-1] = (file, start, max(stop, last), group)
                group.append(item)
                continue
        groups.append((file, first, last, [item]))
    return groups


def _span_in_file(piece: Piece) -> tuple[str, int, int]:
    return piece.chunk.file, *piece.file_span
