"""Weights from elsewhere: opens safetensors in the Hugging Face layout as a checkpoint without checksums.

So matching, ranged reads, sharing and import work as for a checkpoint. There are two steps, as in `opening`: `fetch`
reads headers on rank 0, `parse` makes the same of them on every rank. No code of a file is run. No torch.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow.fs

from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint
from ray_stateful.format import hf_layout, layout
from ray_stateful.format.chunks import Box
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.hf_layout import Weight
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage import opening
from ray_stateful.storage.base import Storage
from ray_stateful.storage.opening import OpenCheckpoint, RawCheckpoint
from ray_stateful.storage.reading import read_exactly
from ray_stateful.storage.uris import filesystem_of

# A header takes two small reads, one after the other; a large model has a hundred files.
_NUM_THREADS = 16

# Of all files together: 100 bytes a tensor, and a few for each expert of the largest models.
MAX_HEADERS_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RawWeights:
    """What describes the safetensors in directory `path`: for each file, its size in bytes and its header's text.

    `index` is the path of the index, and `promised` has the tensors that it names: none if there is no index.
    """

    path: str
    headers: Mapping[str, tuple[int, bytes]]
    index: str = ""
    promised: frozenset[str] = frozenset()


def fetch(storage: Storage, path: str) -> RawWeights | RawCheckpoint:
    """Read what describes the weights at `path`, but not the weights themselves.

    Args:
        path: A safetensors file, a directory of them, or the directory of a checkpoint: of this package, or of DCP.

    Raises:
        DamagedCheckpoint: none of these is there, or a file is missing.
        HostileCheckpoint: a file is not what its name says.
    """
    if path.endswith(hf_layout.SUFFIX):
        directory, name = posixpath.split(path)
        return _headers(storage, directory, _sizes(storage, directory), [name])
    sizes = _sizes(storage, path)
    if layout.MANIFEST in sizes:
        return opening.fetch(storage, path)
    indexes = sorted(name for name in sizes if name.endswith(hf_layout.INDEX_SUFFIX))
    if len(indexes) > 1:
        raise DamagedCheckpoint(path, f"has {len(indexes)} indexes of safetensors; name one file or another directory")
    if indexes:
        where = posixpath.join(path, indexes[0])
        if sizes[indexes[0]] > hf_layout.MAX_HEADER_BYTES:
            raise HostileCheckpoint(where, f"an index of {sizes[indexes[0]]:,} bytes")
        files = hf_layout.weight_map(storage.read(where), where)
        raw = _headers(storage, path, sizes, sorted(set(files.values())))
        return replace(raw, index=where, promised=frozenset(files))
    names = sorted(name for name in sizes if name.endswith(hf_layout.SUFFIX))
    if names:
        return _headers(storage, path, sizes, names)
    if layout.DCP_METADATA in sizes:
        return opening.fetch(storage, path)
    found = "no weights: neither safetensors nor a checkpoint is there"
    checkpoints = [name for name in storage.directories(path) if layout.parse_name(name) is not None]
    if checkpoints:
        found += f"; it is a run's directory: name one of its {len(checkpoints)} checkpoints, {checkpoints[-1]} say"
    raise DamagedCheckpoint(path, found)


def parse(raw: RawWeights | RawCheckpoint) -> OpenCheckpoint:
    """Check and decode what `fetch` read. Pure: the same on every rank.

    Safetensors have no parts: an entry's name is the one in the file, without the name of a part before it.

    Raises:
        DamagedCheckpoint, HostileCheckpoint: as `opening.parse`; or a header is not what a writer makes.
    """
    if isinstance(raw, RawCheckpoint):
        return opening.parse(raw)
    chunks: dict[str, tuple[StoredChunk, ...]] = {}
    for file, (size, text) in raw.headers.items():
        where = posixpath.join(raw.path, file)
        for weight in hf_layout.parse_header(text, size, where):
            if weight.name in chunks:
                raise DamagedCheckpoint(where, f"{weight.name!r} is in another file as well")
            chunks[weight.name] = (_row(file, weight),)
    # A file of a different model or version may have the right name, but none of the tensors.
    missing = sorted(raw.promised - chunks.keys())
    if missing:
        raise DamagedCheckpoint(
            raw.index, f"names {len(missing)} tensors that are in no file, {missing[0]!r} among them"
        )
    return OpenCheckpoint(path=raw.path, manifest=None, chunks=chunks, trees={})


def has_parts(opened: OpenCheckpoint) -> bool:
    """Whether entries lie below the names of parts; `dcp.save(model.state_dict())` and safetensors have none."""
    tensors = [chunks[0] for chunks in opened.chunks.values() if chunks[0].dtype is not None]
    return opened.manifest is not None or all(len(row.path) > 1 for row in tensors)


def below(opened: OpenCheckpoint, part: str) -> OpenCheckpoint:
    """A copy of `opened` with all entries below the name `part`."""
    chunks = {
        f"{part}.{key}": tuple(replace(row, key=f"{part}.{key}", path=(part, *row.path)) for row in rows)
        for key, rows in opened.chunks.items()
    }
    return replace(opened, chunks=chunks)


def _sizes(storage: Storage, path: str) -> dict[str, int]:
    """The sizes of a directory's files, including weights behind links, as in the cache of Hugging Face."""
    sizes = dict(storage.sizes(path))
    if isinstance(filesystem_of(storage), pyarrow.fs.LocalFileSystem):
        # Not listed by pyarrow, which fails where a file's name is not UTF-8.
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path or ".") as entries:
            for entry in entries:
                if entry.name.endswith((hf_layout.SUFFIX, hf_layout.INDEX_SUFFIX)) and entry.is_file():
                    sizes.setdefault(entry.name, entry.stat().st_size)
    return sizes


def _headers(storage: Storage, directory: str, sizes: Mapping[str, int], names: Sequence[str]) -> RawWeights:
    # Checked before any file is read: an index may name any number of files.
    for name in names:
        if name not in sizes:
            raise DamagedCheckpoint(posixpath.join(directory, name), "the file is missing")

    def header_length(name: str) -> int:
        where = posixpath.join(directory, name)
        return hf_layout.header_bytes(storage.read(where, 0, 8), sizes[name], where)

    def header(name: str, length: int) -> tuple[int, bytes]:
        return sizes[name], read_exactly(storage, directory, name, 8, 8 + length)

    with ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="headers") as pool:
        # All lengths first: there may be any number of files, and all headers are in memory at the same time.
        lengths = list(pool.map(header_length, names))
        if sum(lengths) > MAX_HEADERS_BYTES:
            raise HostileCheckpoint(directory, f"its safetensors have headers of {sum(lengths):,} bytes")
        return RawWeights(path=directory, headers=dict(zip(names, pool.map(header, names, lengths), strict=True)))


def _row(file: str, weight: Weight) -> StoredChunk:
    return StoredChunk(
        key=weight.name,
        path=(weight.name,),
        dtype=weight.dtype,
        shape=weight.shape,
        box=Box((0,) * len(weight.shape), weight.shape),
        file=file,
        item_offset=weight.offset,
        item_length=weight.num_bytes,
        data_offset=weight.offset,
        # There are no checksums, so a block is one element: a read need not be widened beyond its box.
        block_bytes=ITEM_BYTES[weight.dtype],
        checksums=b"",
    )
