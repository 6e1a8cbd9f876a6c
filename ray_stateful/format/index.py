"""The index: one row per stored chunk, as an Arrow stream.

Everything a restore needs to know before it reads tensor bytes: which boxes of which tensors are where in which file,
the checksums of their blocks, and the values that are not tensors, in full. Arrow columns are plain data: reading them
executes nothing, and, as they are stored uncompressed, no column is larger in memory than the file.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa

from ray_stateful.errors import HostileCheckpoint
from ray_stateful.format.arrow_guard import refuse_growing
from ray_stateful.format.chunks import Box
from ray_stateful.format.row_checks import row_problem
from ray_stateful.format.rows import MAX_PATH_LENGTH, MAX_POSITION, IntKey, KeyPath, StoredChunk

MAX_REPEATED_BYTES = 16 << 20
MAX_VALUES_BYTES = (1 << 31) - 2  # the most that one column of texts can hold
# Entries with the same hash, each of which a dict or a list has to compare with all the others.
MAX_EQUAL_KEYS = 1000
MAX_EQUAL_PLACES = 16
_MIN_ROW_BYTES = 64  # fixed-width part of a row: 3 int64, 1 int32, and 3 int32 each for lists, texts and dictionaries
_HASH_MODULUS = sys.hash_info.modulus
_ROWS_AT_ONCE = 1 << 16
_LONG_BYTES = 192  # a memoryview takes about as much, however short it is

_INTS = pa.list_(pa.int64())
_NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("dtype", _NAME),
        pa.field("shape", _INTS, nullable=False),
        pa.field("offsets", _INTS, nullable=False),
        pa.field("sizes", _INTS, nullable=False),
        pa.field("file", _NAME, nullable=False),
        pa.field("item_offset", pa.int64(), nullable=False),
        pa.field("item_length", pa.int64(), nullable=False),
        pa.field("data_offset", pa.int64(), nullable=False),
        pa.field("block_bytes", pa.int32(), nullable=False),
        pa.field("checksums", pa.binary(), nullable=False),
        pa.field("value", _NAME),
    ]
)


def to_bytes(rows: Sequence[StoredChunk]) -> bytes:
    """The index file of `rows`, sorted by key and offsets."""
    return stream_of(columns_of([rows[at] for at in order_of(rows)]))


def order_of(rows: Sequence[StoredChunk]) -> list[int]:
    """The positions of `rows`, in the order in which an index has the rows."""
    return sorted(range(len(rows)), key=lambda at: (rows[at].key, rows[at].box.offsets))


def columns_of(rows: Sequence[StoredChunk]) -> dict[str, pa.Array]:
    """The columns of an index, by name."""
    columns: dict[str, list[Any]] = {
        "key": [row.key for row in rows],
        "path": [_path_to_json(row.path) for row in rows],
        "dtype": [row.dtype for row in rows],
        "shape": [row.shape for row in rows],
        "offsets": [row.box.offsets for row in rows],
        "sizes": [row.box.sizes for row in rows],
        "file": [row.file for row in rows],
        "item_offset": [row.item_offset for row in rows],
        "item_length": [row.item_length for row in rows],
        "data_offset": [row.data_offset for row in rows],
        "block_bytes": [row.block_bytes for row in rows],
        "checksums": [row.checksums for row in rows],
        "value": [row.value for row in rows],
    }
    return {field.name: column_of(field.name, columns[field.name]) for field in SCHEMA}


def column_of(name: str, entries: Sequence[Any]) -> pa.Array:
    """One column of an index."""
    return pa.array(entries, type=SCHEMA.field(name).type)


def stream_of(columns: Mapping[str, pa.Array]) -> bytes:
    """The bytes of the index file with these columns."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays([columns[field.name] for field in SCHEMA], schema=SCHEMA))
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]  # pyarrow is untyped


def room_for_values(data: bytes) -> int:
    """How long all values of an index file may be together."""
    # Each row's value is decoded separately, even where rows refer to one stored copy.
    return MAX_REPEATED_BYTES + len(data)


def from_bytes(data: bytes, where: str, file_sizes: dict[str, int]) -> list[StoredChunk]:
    """The rows of an index file, each checked for consistency and against `file_sizes` (of the manifest).

    Raises:
        HostileCheckpoint: the file is not an index, or a row asks for something outside of the checkpoint's files.
    """
    try:
        refuse_growing(data, sum(field.type == _NAME for field in SCHEMA))
        with pa.ipc.open_stream(data) as reader:
            if not reader.schema.equals(SCHEMA, check_metadata=True):
                raise HostileCheckpoint(where, f"its columns are not those of format 1: {reader.schema.names}")
            table = reader.read_all()
        table.validate(full=True)
        if table.num_rows * _MIN_ROW_BYTES > len(data):
            # Several columns may share the same bytes of the file; rows as Python objects share none.
            raise HostileCheckpoint(where, f"{table.num_rows:,} rows in {len(data):,} bytes")
        if any(_has_nulls(table.column(field.name)) for field in SCHEMA if not field.nullable):
            raise HostileCheckpoint(where, "a required column has a null value")
        columns = {field.name: _values_of(table.column(field.name)) for field in SCHEMA}
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise HostileCheckpoint(where, f"not an index: {error}") from error
    # Parsed once for all chunks of a tensor.
    paths: dict[str, KeyPath] = {}
    for n, text in enumerate(columns["path"]):
        if text not in paths:
            paths[text] = _path_from_json(text, f"{where}: row {n}")
    _check_int_keys(paths.values(), where)
    for name in ("shape", "sizes"):
        columns[name] = _repeated(columns[name])
    rows = [_row(columns, n, paths) for n in range(table.num_rows)]
    values = sum(len(row.value) for row in rows if row.value is not None)
    if values > room_for_values(data):
        raise HostileCheckpoint(where, f"values of {values:,} bytes in an index of {len(data):,}")
    # Compared by hash, and counted: a hostile file can easily have many empty chunks at offsets of one hash.
    seen: dict[tuple[str, bool, int], list[tuple[int, ...]]] = defaultdict(list)
    for row in rows:
        problem = row_problem(row, file_sizes)
        if problem is not None:
            raise HostileCheckpoint(where, f"{row.key!r}: {problem}")
        places = seen[row.key, row.is_tree, hash(row.box.offsets)]
        if row.box.offsets in places:
            raise HostileCheckpoint(where, f"{row.key!r} at {row.box.offsets} stands there twice")
        places.append(row.box.offsets)
        if len(places) > MAX_EQUAL_PLACES:
            found = f"{row.key!r} has more than {MAX_EQUAL_PLACES} chunks whose offsets have the same hash"
            raise HostileCheckpoint(where, found)
    return rows


def _check_int_keys(paths: Iterable[KeyPath], where: str) -> None:
    """Refuse numbers as dict keys that are chosen so that a dict has to compare each key with each other."""
    large = sorted(step for path in paths for step in path if isinstance(step, IntKey) and abs(step) >= _HASH_MODULUS)
    # Each key counts once. Not found with a set, which is what such keys are chosen to slow down.
    hashes = Counter(hash(key) for key, before in zip(large, [None, *large], strict=False) if key != before)
    if hashes and max(hashes.values()) > MAX_EQUAL_KEYS:
        raise HostileCheckpoint(where, f"more than {MAX_EQUAL_KEYS} keys have one hash")


def _row(columns: dict[str, list[Any]], n: int, paths: Mapping[str, KeyPath]) -> StoredChunk:
    return StoredChunk(
        key=columns["key"][n],
        path=paths[columns["path"][n]],
        dtype=columns["dtype"][n],
        shape=columns["shape"][n],
        box=Box(tuple(columns["offsets"][n]), columns["sizes"][n]),
        file=columns["file"][n],
        item_offset=columns["item_offset"][n],
        item_length=columns["item_length"][n],
        data_offset=columns["data_offset"][n],
        block_bytes=columns["block_bytes"][n],
        checksums=columns["checksums"][n],
        value=columns["value"][n],
    )


def _has_nulls(column: pa.ChunkedArray) -> bool:
    # The schema says which fields are not nullable, but pyarrow does not enforce it.
    return any(part.null_count or (pa.types.is_list(part.type) and part.flatten().null_count) for part in column.chunks)


def _values_of(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python objects; a dictionary's entry is a single object, however often it is referred to."""
    found: list[Any] = []
    entries: list[Any] = []
    entries_of: Any = None
    # One object per name, as all chunks of a tensor have its name. Not by `dictionary_encode`: Python's hashes of texts
    # can't be foreseen, so nobody can write a file with many texts of the same hash.
    texts: dict[str, str] = {}
    for part in column.chunks:
        if isinstance(part, pa.DictionaryArray):
            known = part.dictionary
            place = [len(known), known.offset, *(buffer and buffer.address for buffer in known.buffers())]
            if place != entries_of:
                # Decoded once, and not for each batch that refers to it.
                entries, entries_of = known.to_pylist(), place
            found += [None if at is None else entries[at] for at in part.indices.to_pylist()]
        elif pa.types.is_binary(part.type):
            found += _slices(part)
        elif pa.types.is_string(part.type):
            for at in range(0, len(part), _ROWS_AT_ONCE):
                found += [texts.setdefault(text, text) for text in part.slice(at, _ROWS_AT_ONCE).to_pylist()]
        else:
            found += part.to_pylist()
    return found


def _repeated(column: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """A column of lists as tuples; equal neighbours are one object, which suffices as rows are sorted by key.

    Not found with a dict: tuples of numbers with the same hash are easily made.
    """
    found: list[tuple[int, ...]] = []
    last: tuple[int, ...] = ()
    for numbers in column:
        entry = tuple(numbers)
        last = last if entry == last else entry
        found.append(last)
    return found


def _slices(binary: pa.BinaryArray) -> list[bytes | memoryview]:
    """The entries of a column without nulls; long ones, most of the file, as views of the file's own bytes."""
    _, offsets, data = binary.buffers()
    if not len(binary):
        return []
    bounds = memoryview(offsets).cast("B")[4 * binary.offset : 4 * (binary.offset + len(binary) + 1)].cast("i").tolist()
    whole = memoryview(b"" if data is None else data).cast("B")
    parts = [whole[start:stop] for start, stop in pairwise(bounds)]
    return [bytes(part) if len(part) < _LONG_BYTES else part for part in parts]


def _path_to_json(path: KeyPath) -> str:
    return json.dumps([[int(step)] if isinstance(step, IntKey) else step for step in path])


def _path_from_json(text: str, where: str) -> KeyPath:
    try:
        # Not `strict_json`, which would take as long as the rest of the row: it adds checks of objects and constants,
        # and neither can be a step.
        steps = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HostileCheckpoint(where, f"its path can't be read: {error}") from error
    if not isinstance(steps, list) or len(steps) > MAX_PATH_LENGTH:
        raise HostileCheckpoint(where, "its path is not a short list")
    if steps and type(steps[0]) is not str:
        # The first step is the name of a part. Also, nobody can choose the hash of a path that begins with a text.
        raise HostileCheckpoint(where, "its path does not begin with a name")
    path: list[str | int] = []
    for step in steps:
        if type(step) is str or (type(step) is int and 0 <= step < MAX_POSITION):
            path.append(step)
        elif type(step) is list and len(step) == 1 and type(step[0]) is int:
            path.append(IntKey(step[0]))
        else:
            raise HostileCheckpoint(where, f"its path has a step of type {type(step).__name__}, or out of bounds")
    return tuple(path)
