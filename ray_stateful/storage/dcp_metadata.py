"""DCP's own `.metadata`: written for stock tools, read from foreign checkpoints through an allow-list.

The file is a pickle, and `pickle.load` runs whatever a pickle says. Ours is written here and never read back; a
foreign one is read by an unpickler that knows the dozen types DCP puts into it, and calls nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the type that stock readers expect to unpickle
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from ray_stateful.errors import HostileCheckpoint
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.rows import MAX_DIMS, IntKey, StoredChunk
from ray_stateful.storage.strict_pickle import StrictUnpickler

StorageInfo = _StorageInfo

# Characters: no file system has longer paths.
MAX_FILE_NAME = 4096


def to_bytes(metadata: Metadata, rows: list[StoredChunk]) -> bytes:
    """The `.metadata` that makes stock `dcp.load` find the items of `rows`."""
    stored = {index_of(row): StorageInfo(row.file, row.item_offset, row.item_length) for row in rows if not row.is_tree}
    # Every dict key as a string, as DCP writes it: unpickling a type of ours would need this package.
    paths = {
        key: tuple(str(int(step)) if isinstance(step, IntKey) else step for step in path)
        for key, path in (metadata.planner_data or {}).items()
    }
    # Protocol 4: read by every Python that torch runs on.
    return pickle.dumps(replace(metadata, planner_data=paths, storage_data=stored), protocol=4)


def for_planners(chunks: Mapping[str, Sequence[StoredChunk]]) -> Metadata:
    """Metadata for DCP's planners: one entry per key of `chunks`, with its stored chunks (their own key may differ)."""
    entries = {
        key: dcp.BytesStorageMetadata()
        if of_key[0].dtype is None
        else dcp.TensorStorageMetadata(
            dcp.TensorProperties(dtype=getattr(torch, of_key[0].dtype)),
            torch.Size(of_key[0].shape),
            [dcp.ChunkStorageMetadata(torch.Size(c.box.offsets), torch.Size(c.box.sizes)) for c in of_key],
        )
        for key, of_key in chunks.items()
    }
    paths = {key: of_key[0].path for key, of_key in chunks.items()}
    stored = {index_of(replace(chunk, key=key)): chunk for key, of_key in chunks.items() for chunk in of_key}
    return Metadata(entries, planner_data=paths, storage_data=stored)


def index_of(row: StoredChunk) -> MetadataIndex:
    """DCP's name of a stored chunk."""
    return MetadataIndex(row.key, None if row.dtype is None else row.box.offsets)


def from_bytes(data: bytes, where: str) -> Metadata:
    """Read a foreign `.metadata`, running none of it.

    Raises:
        HostileCheckpoint: it asks for anything but the types DCP itself writes, or can't be read.
    """
    unpickler = StrictUnpickler(data, values=_VALUES, functions=_FUNCTIONS, classes=_CLASSES, is_key=_is_key)
    try:
        metadata = unpickler.load()
    # A damaged or hostile pickle can fail in any way: a missing attribute, a wrong type, no memory for a length.
    except Exception as error:
        raise HostileCheckpoint(where, f"the metadata can't be read: {type(error).__name__}: {error}") from error
    entries = getattr(metadata, "state_dict_metadata", None)
    if type(metadata) is not Metadata or type(entries) is not dict or any(type(key) is not str for key in entries):
        raise HostileCheckpoint(where, f"holds a {type(metadata).__name__}, not DCP metadata")
    return metadata


def is_index(key: Any) -> bool:
    """Whether `key` is a `MetadataIndex` whose fields have the types that DCP gives them, so it is safe to hash."""
    return (
        type(key) is MetadataIndex
        and type(getattr(key, "fqn", None)) is str
        and (getattr(key, "offset", None) is None or type(key.offset) is torch.Size)
    )


def _is_key(key: Any) -> bool:
    return type(key) in (str, int) or is_index(key)


def _strided(name: str) -> torch.layout:
    # DCP's metadata deprecates the layout; the items themselves say which one they have.
    return torch.strided


def _joined(*parts: str) -> str:
    # A path joined from two paths, each joined from two paths, and so on forty times, would take a terabyte.
    if any(type(part) is not str for part in parts) or sum(map(len, parts)) > MAX_FILE_NAME:
        raise ValueError("a path of a file is no short text")
    return "/".join(parts)


def _size(sizes: Any = ()) -> torch.Size:
    # A pickle could make a long size again and again from one tuple.
    if type(sizes) not in (tuple, list) or len(sizes) > MAX_DIMS:
        raise ValueError("a size has more dims than any tensor")
    return torch.Size(sizes)


_METADATA = "torch.distributed.checkpoint.metadata"

_VALUES: dict[tuple[str, str], Any] = {
    ("torch", "strided"): torch.strided,
    **{("torch", name): getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name)},
}
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("pathlib", "PosixPath"): _joined,
    ("pathlib._local", "PosixPath"): _joined,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _strided,
    (_METADATA, "_MEM_FORMAT_ENCODING"): lambda number: dcp._MEM_FORMAT_ENCODING(number),
}
_CLASSES: dict[tuple[str, str], type] = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    **{
        (_METADATA, name): getattr(dcp, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    },
}
