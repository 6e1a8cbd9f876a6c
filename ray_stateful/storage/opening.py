"""Opening a checkpoint: manifest and index read once, checked, and turned into what a reader plans with.

Two steps, so that storage is asked by one rank and not by all: `fetch` reads the bytes on rank 0, `parse` makes the
same `OpenCheckpoint` of them on every rank. Nothing is unpickled except a foreign `.metadata`, and that through an
allow-list.

torch is imported only where DCP's types are needed: importing it takes longer than looking at a checkpoint.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ray_stateful import collector
from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint
from ray_stateful.format import index, layout
from ray_stateful.format.checksums import checksum
from ray_stateful.format.chunks import coverage_problems
from ray_stateful.format.manifest import Manifest
from ray_stateful.format.rows import StoredChunk
from ray_stateful.format.structure import structure_problem
from ray_stateful.storage.base import Storage

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

MAX_MANIFEST_BYTES = 64 << 20

# Not derived from the items' size: the values of a state are twice in its index, and once in the items. And an attacker
# who wants a reader to read that much can write large items as well.
MAX_INDEX_BYTES = 4 << 30

# Foreign metadata has no values. It may have as many bytes as the items, plus this.
_MIN_METADATA_LIMIT_BYTES = 64 << 20

# How much of manifest and index is read before their sizes are known: all of both, except for the largest states.
AT_ONCE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCheckpoint:
    """The bytes that describe a checkpoint, as they were read, and the sizes of the files in its directory."""

    path: str
    sizes: Mapping[str, int]
    manifest: bytes | None
    index: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint whose description is complete and consistent; its tensor bytes are not checked yet.

    `manifest` is `None` for a foreign one, whose bytes have no checksums. `chunks` has every entry's stored chunks
    by flat key (a value has one), `trees` the containers without tensors, by flat key too.
    """

    path: str
    manifest: Manifest | None
    chunks: Mapping[str, tuple[StoredChunk, ...]]
    trees: Mapping[str, StoredChunk]

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    def first_rows(self) -> list[StoredChunk]:
        """One row for each entry, trees included."""
        return [chunks[0] for chunks in self.chunks.values()] + list(self.trees.values())

    def metadata(self, sources: Mapping[str, str] | None = None) -> Metadata:
        """The checkpoint's metadata in the form that DCP's planners take.

        Args:
            sources: The entries to include: the key to give each, and the key that it has in this checkpoint. By
                default all entries, under their own keys.
        """
        from ray_stateful.storage import dcp_metadata

        wanted = {key: key for key in self.chunks} if sources is None else sources
        return dcp_metadata.for_planners({key: self.chunks[source] for key, source in wanted.items()})


def fetch(storage: Storage, path: str) -> RawCheckpoint:
    """Read what describes the checkpoint in directory `path`; begins with three requests made at the same time.

    Raises:
        DamagedCheckpoint: there is no checkpoint, or a file is missing or has a different size than the manifest says.
    """
    with ThreadPoolExecutor(max_workers=3, thread_name_prefix="checkpoint-open") as pool:
        listing = pool.submit(storage.sizes, path)
        starts = {name: pool.submit(_start_of, storage, path, name) for name in (layout.MANIFEST, layout.INDEX)}
    sizes = listing.result()
    if layout.MANIFEST not in sizes:
        if layout.DCP_METADATA not in sizes:
            raise DamagedCheckpoint(path, "no checkpoint: neither a manifest nor DCP metadata is there")
        # One of ours that lost its manifest must not pass for a foreign checkpoint, whose bytes nobody checks.
        if layout.INDEX in sizes or layout.parse_name(posixpath.basename(path)) is not None:
            raise DamagedCheckpoint(path, "was never committed: its manifest is missing")
        return RawCheckpoint(path=path, sizes=sizes, manifest=None, index=_read_metadata(storage, path, sizes))
    if sizes[layout.MANIFEST] > MAX_MANIFEST_BYTES:
        raise HostileCheckpoint(path, f"a manifest of {sizes[layout.MANIFEST]:,} bytes")
    data = _whole(storage, path, layout.MANIFEST, starts[layout.MANIFEST].result())
    manifest = Manifest.from_json(data, posixpath.join(path, layout.MANIFEST))
    for name, file in manifest.files.items():
        if sizes.get(name) != file.size:
            found = f"has {sizes[name]:,} bytes" if name in sizes else "is missing"
            raise DamagedCheckpoint(posixpath.join(path, name), f"{found}; {file.size:,} were written")
    check_name(path, manifest)
    check_index_size(path, sizes[layout.INDEX])
    index_bytes = _whole(storage, path, layout.INDEX, starts[layout.INDEX].result())
    return RawCheckpoint(path=path, sizes=sizes, manifest=data, index=index_bytes)


def fetch_description(storage: Storage, path: str) -> RawCheckpoint:
    """Read what describes the checkpoint in directory `path` in two reads, without a listing.

    For looking at a checkpoint: it does not check that the files are there. A directory without a manifest is read by
    `fetch`.

    Raises:
        DamagedCheckpoint: as `fetch`.
    """
    try:
        data = read_manifest(storage, path)
    except FileNotFoundError:
        return fetch(storage, path)
    manifest = Manifest.from_json(data, posixpath.join(path, layout.MANIFEST))
    check_name(path, manifest)
    sizes = manifest.sizes
    check_index_size(path, sizes[layout.INDEX])
    # At most this size, however long the file is: the size is only what the manifest claims.
    found = _read(storage, path, layout.INDEX, sizes[layout.INDEX])
    return RawCheckpoint(path=path, sizes=sizes, manifest=data, index=found)


def read_manifest(storage: Storage, path: str) -> bytes:
    """The bytes of the manifest of the checkpoint in directory `path`, in one read.

    Raises:
        FileNotFoundError: there is none.
        HostileCheckpoint: it is larger than `MAX_MANIFEST_BYTES`.
    """
    data = storage.read(posixpath.join(path, layout.MANIFEST), 0, MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise HostileCheckpoint(path, f"a manifest of more than {MAX_MANIFEST_BYTES:,} bytes")
    return data


def check_index_size(path: str, num_bytes: int) -> None:
    """Refuse an index that is too large to be read.

    Raises:
        HostileCheckpoint: it has more than `MAX_INDEX_BYTES`.
    """
    if num_bytes > MAX_INDEX_BYTES:
        found = f"is {num_bytes:,} bytes; an index has {MAX_INDEX_BYTES:,} at most"
        raise HostileCheckpoint(posixpath.join(path, layout.INDEX), found)


def parse(raw: RawCheckpoint) -> OpenCheckpoint:
    """Check and decode what `fetch` read. Pure: the same on every rank.

    Raises:
        DamagedCheckpoint: the checksum of the index is not the one in the manifest.
        HostileCheckpoint: what `fetch` read has something that no writer makes.
    """
    if raw.manifest is None:
        from ray_stateful.storage import dcp_metadata, foreign

        where = posixpath.join(raw.path, layout.DCP_METADATA)
        metadata = dcp_metadata.from_bytes(raw.index, where)
        return _opened(raw.path, None, foreign.rows(metadata, where, raw.sizes))
    manifest = Manifest.from_json(raw.manifest, posixpath.join(raw.path, layout.MANIFEST))
    where = posixpath.join(raw.path, layout.INDEX)
    if checksum(raw.index) != manifest.files[layout.INDEX].xxh3:
        raise DamagedCheckpoint(where, "its checksum is not the one in the manifest")
    sizes = manifest.sizes
    with collector.paused():
        opened = _opened(raw.path, manifest, index.from_bytes(raw.index, where, sizes))
    unknown = {row.path[0] for row in opened.first_rows()} - set(manifest.parts) if manifest.parts else set()
    if unknown:
        raise HostileCheckpoint(
            where, f"has entries of parts that the manifest does not name: {sorted(map(repr, unknown))[:3]}"
        )
    return opened


def _opened(path: str, manifest: Manifest | None, rows: list[StoredChunk]) -> OpenCheckpoint:
    chunks: dict[str, list[StoredChunk]] = defaultdict(list)
    for row in rows:
        if not row.is_tree:
            chunks[row.key].append(row)
    for key, of_key in chunks.items():
        _check_whole(path, key, of_key)
    _check_apart(path, rows)
    # One row per entry is enough: its other rows have the same path.
    problem = structure_problem([*(of_key[0] for of_key in chunks.values()), *(row for row in rows if row.is_tree)])
    if problem is not None:
        raise HostileCheckpoint(path, problem)
    return OpenCheckpoint(
        path=path,
        manifest=manifest,
        chunks={key: tuple(of_key) for key, of_key in chunks.items()},
        trees={row.key: row for row in rows if row.is_tree},
    )


def _check_whole(path: str, key: str, chunks: list[StoredChunk]) -> None:
    first = chunks[0]
    if any((c.dtype, c.shape, c.path) != (first.dtype, first.shape, first.path) for c in chunks):
        raise HostileCheckpoint(path, f"{key!r}: its chunks disagree on dtype, shape or path")
    if first.dtype is None:
        if len(chunks) > 1:
            raise HostileCheckpoint(path, f"{key!r}: a value that stands there {len(chunks)} times")
        return
    # A region of a tensor that no chunk covers would silently keep what it had before the restore.
    problems = coverage_problems(first.shape, [chunk.box for chunk in chunks])
    if problems:
        raise HostileCheckpoint(path, f"{key!r}: {'; '.join(problems[:3])}")


def _check_apart(path: str, rows: list[StoredChunk]) -> None:
    """Refuse items that share bytes: a small file could stand for any number of large tensors."""
    # Equal values are stored once, and several entries point to them; so each of their places is counted once.
    places = {(row.file, row.item_offset, row.item_length, row.dtype is None) for row in rows if not row.is_tree}
    if sum(row.dtype is not None for row in rows) > sum(not is_value for *_, is_value in places):
        raise HostileCheckpoint(path, "several chunks of tensors are stored in the same place")
    for (file, offset, length, _), (next_file, next_offset, _, _) in pairwise(sorted(places)):
        if file == next_file and offset + length > next_offset:
            raise HostileCheckpoint(path, f"items of {file!r} overlap at byte {next_offset:,}")


def check_name(path: str, manifest: Manifest) -> None:
    """Refuse a checkpoint under the name of a different one: its files fit together, but the step is wrong.

    Raises:
        DamagedCheckpoint: the name of directory `path` has another step or attempt than `manifest`.
    """
    name = layout.parse_name(posixpath.basename(path))
    if name is not None and manifest.attempt and (name.step, name.attempt) != (manifest.step, manifest.attempt):
        raise DamagedCheckpoint(path, f"holds another checkpoint: step {manifest.step}, attempt {manifest.attempt!r}")


def _start_of(storage: Storage, path: str, name: str) -> bytes | None:
    """The first `AT_ONCE_BYTES` of a file, mostly all of it; `None` if there is no such file."""
    try:
        return storage.read(posixpath.join(path, name), 0, AT_ONCE_BYTES)
    except FileNotFoundError:
        return None


def _whole(storage: Storage, path: str, name: str, start: bytes | None) -> bytes:
    return start if start is not None and len(start) < AT_ONCE_BYTES else _read(storage, path, name)


def _read_metadata(storage: Storage, path: str, sizes: Mapping[str, int]) -> bytes:
    name = layout.DCP_METADATA
    others = sum(size for other, size in sizes.items() if other != name)
    if sizes[name] > min(MAX_INDEX_BYTES, _MIN_METADATA_LIMIT_BYTES + others):
        raise HostileCheckpoint(posixpath.join(path, name), f"is {sizes[name]:,} bytes, for {others:,} bytes of items")
    return _read(storage, path, name)


def _read(storage: Storage, path: str, name: str, length: int | None = None) -> bytes:
    where = posixpath.join(path, name)
    try:
        return storage.read(where, 0, length)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(where, "the file is missing") from error
