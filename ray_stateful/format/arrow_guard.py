"""Refuses Arrow streams that would grow when pyarrow reads them: compressed buffers, and dictionaries sent again.

Our streams are never compressed. A compressed one can hold a buffer that inflates some 30,000-fold (a zstd run of
zeros), and pyarrow sets no limit; so the one field that tells is looked up by hand in each message's flatbuffer
(`Message.fbs`: Message.header, a RecordBatch or the data of a DictionaryBatch; RecordBatch.compression).

A dictionary may be sent again, or with a few more entries, before each batch of rows; pyarrow then keeps a whole copy
for every batch. So a stream may have one dictionary for each column that uses one, and only few batches.
"""

from __future__ import annotations

import struct

import pyarrow as pa

_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER = 1, 2
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_DICTIONARY_DATA, _BATCH_COMPRESSION = 1, 3
# Rows are written in one batch, unless columns have gigabytes. Every batch checks its whole dictionaries again.
MAX_BATCHES = 64


def refuse_growing(stream: bytes, num_dictionaries: int) -> None:
    """Raise ValueError if reading the Arrow IPC `stream` takes more memory than its length, or a message can't be read.

    Args:
        num_dictionaries: Number of columns that have a dictionary.
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
