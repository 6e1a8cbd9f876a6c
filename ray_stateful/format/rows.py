"""A row of the index: a stored chunk, and where its bytes are. Pure; no torch, no Arrow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from ray_stateful.format.chunks import Box
from ray_stateful.format.dtypes import ITEM_BYTES

MAX_DIMS = 64
MAX_PATH_LENGTH = 64
MAX_POSITION = 1 << 20  # in a list: it is filled up to a position, so a position read from a file must be bounded


class IntKey(int):
    """A step of a path that is an int key of a dict; a plain int is a position in a list."""

    __str__ = int.__repr__

    def __repr__(self) -> str:
        return f"IntKey({self})"


KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """One row of the index: a box of one tensor, or a value that is not a tensor, and where its bytes are.

    `key` is the flat name, `path` the dict keys and list positions it was flattened from. A value has `value`, its
    JSON, and no `dtype`; its bytes in `file` are what `torch.save` made of it, there for stock tools. For a tensor,
    `data_offset` counts from the beginning of the file to the first byte of its elements, which are contiguous and
    row-major; `checksums` has 8 bytes for every `block_bytes` of them. In a row that was read, `checksums` may be a
    view of the index file's bytes, which keeps all of them in memory.

    A tree is a value with no `file`: a whole dict or list that has no tensors in it. DCP flattens it into one entry per
    leaf, which loses that a key was an int or a dict was a Counter; the tree keeps this, and replaces all entries
    below its path.
    """

    key: str
    path: KeyPath
    dtype: str | None
    shape: tuple[int, ...]
    box: Box
    file: str
    item_offset: int
    item_length: int
    data_offset: int
    block_bytes: int
    checksums: bytes | memoryview = field(hash=False)
    value: str | None = None

    def __reduce__(self) -> tuple[Callable[..., StoredChunk], tuple[Any, ...]]:
        # As for `Box`: with the default, gathering rows was a third of the computing in a save of many small tensors.
        *others, checksums, value = _fields_of(self)
        return _chunk_of, (*others, bytes(checksums), value)

    @property
    def is_tree(self) -> bool:
        return not self.file

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements (of the stored copy, for a value)."""
        return self.item_length if self.dtype is None else self.box.num_elements * ITEM_BYTES[self.dtype]


_FIELDS = tuple(one.name for one in fields(StoredChunk))
_fields_of = attrgetter(*_FIELDS)


def _chunk_of(*values: Any) -> StoredChunk:
    """Rebuild a row when it is unpickled: `StoredChunk` takes its fields by keyword only."""
    return StoredChunk(**dict(zip(_FIELDS, values, strict=True)))


def tree_row(path: KeyPath, value: str) -> StoredChunk:
    """The row of a tree: `value` is its JSON."""
    return StoredChunk(
        key=".".join(map(str, path)),
        path=path,
        dtype=None,
        shape=(),
        box=Box((), ()),
        file="",
        item_offset=0,
        item_length=0,
        data_offset=0,
        block_bytes=0,
        checksums=b"",
        value=value,
    )
