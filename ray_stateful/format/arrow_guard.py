"""Refuses what in an Arrow stream would grow, before pyarrow reads it: compressed buffers, dictionaries sent again.

A stream of ours is never compressed. One that is can hold a buffer that inflates some 30,000-fold (a zstd run of
zeros), and pyarrow has no limit for it; so the one field that says so is looked up by hand in each message's flatbuffer
(`Message.fbs`: Message.header, a RecordBatch or the data of a DictionaryBatch; RecordBatch.compression).

A dictionary may be sent again, or with a few entries more, before each batch of rows; pyarrow then keeps all of it for
every batch. So there are as many dictionaries as columns that have one, and few batches.
"""

from __future__ import annotations

import struct

import pyarrow as pa

_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER = 1, 2
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_DICTIONARY_DATA, _BATCH_COMPRESSION = 1, 3
# Rows are written in one, but for columns of gigabytes. Each refers to whole dictionaries, which are checked each time.
MAX_BATCHES = 64


def refuse_growing(stream: bytes, num_dictionaries: int) -> None:
    """Raise ValueError if reading the Arrow IPC `stream` takes more than it is long, or a message can't be read.

    Args:
        num_dictionaries: Columns that have one.
    """
    reader = pa.MessageReader.open_stream(stream)
    left = {"dictionary": num_dictionaries, "record batch": MAX_BATCHES}
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        if message.type in left:
            left[message.type] -= 1
            if left[message.type] < 0:
                raise ValueError(f"it has more than one dictionary for a column, or more than {MAX_BATCHES} batches")
        metadata = message.metadata.to_pybytes()
        try:
            if _is_compressed(metadata):
                raise ValueError("its buffers are compressed, which this format does not allow")
        except (struct.error, IndexError) as error:
            raise ValueError(f"a message can't be read: {error}") from error


def _is_compressed(metadata: bytes) -> bool:
    (root,) = struct.unpack_from("<I", metadata, 0)
    kind_at, header_at = _field(metadata, root, _MESSAGE_HEADER_TYPE), _field(metadata, root, _MESSAGE_HEADER)
    kind = metadata[kind_at] if kind_at is not None else 0
    if header_at is None or kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return False
    table = _follow(metadata, header_at)
    if kind == _DICTIONARY_BATCH:
        data_at = _field(metadata, table, _DICTIONARY_DATA)
        if data_at is None:
            return False
        table = _follow(metadata, data_at)
    return _field(metadata, table, _BATCH_COMPRESSION) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where field `number` of the flatbuffer table at `table` is; `None` if it is absent."""
    (back,) = struct.unpack_from("<i", data, table)
    vtable = table - back
    if vtable < 0:
        raise IndexError("a table outside of the message")
    (vtable_bytes,) = struct.unpack_from("<H", data, vtable)
    slot = 4 + 2 * number
    if slot + 2 > vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + slot)
    return table + offset if offset else None


def _follow(data: bytes, at: int) -> int:
    (offset,) = struct.unpack_from("<I", data, at)
    return int(at + offset)
