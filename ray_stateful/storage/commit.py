"""The commit: proves that a checkpoint is complete, then writes the files that describe it, the manifest last.

One rank commits, from what all ranks reported that they wrote. Until the manifest is there, a directory is not a
checkpoint, and a reader does not look further; once it is there, every file it names is whole.
"""

from __future__ import annotations

import logging
import posixpath
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from ray_stateful import collector
from ray_stateful.errors import DamagedCheckpoint, StorageError, UnsupportedState
from ray_stateful.format import index, layout
from ray_stateful.format.checksums import checksum, digest_number
from ray_stateful.format.chunks import coverage_problems
from ray_stateful.format.manifest import Manifest, StoredFile
from ray_stateful.format.rows import StoredChunk
from ray_stateful.ranks import Outcome
from ray_stateful.storage import dcp_metadata, deadlines, opening
from ray_stateful.storage.base import Storage
from ray_stateful.storage.retries import is_transient

logger = logging.getLogger(__name__)

# The most seconds spent on deleting what a failed save has written. Meanwhile the other ranks, which have nothing to
# delete, wait at the next step.
_DISCARD_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a manifest says besides its files. `step` counts optimizer steps completed, `samples` samples trained."""

    world_size: int
    step: int = 0
    samples: int = 0
    attempt: str = ""
    parts: tuple[str, ...] = ()
    mesh: tuple[Mapping[str, int], ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: {"torch": torch.__version__})


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """An item file as its writer counted and hashed it."""

    name: str
    file: StoredFile


def file_result(written: WrittenFile) -> WriteResult:
    """A file's size and checksum as a `WriteResult`: the only thing DCP passes from writers to the coordinator."""
    return WriteResult(index=MetadataIndex(written.name), size_in_bytes=written.file.size, storage_data=written)


def tree_result(row: StoredChunk) -> WriteResult:
    """A tree as a `WriteResult`, for the same reason."""
    return WriteResult(index=MetadataIndex(row.key), size_in_bytes=0, storage_data=row)


def collect(results: Sequence[Sequence[WriteResult]]) -> tuple[list[StoredChunk], dict[str, StoredFile]]:
    """The rows of the index, and the files by name, from all ranks' results.

    Raises:
        ValueError: two ranks have different trees at one path.
    """
    rows: list[StoredChunk] = []
    files: dict[str, StoredFile] = {}
    trees: dict[str, StoredChunk] = {}
    for result in (result for of_rank in results for result in of_rank):
        written = result.storage_data
        if isinstance(written, WrittenFile):
            files[written.name] = written.file
        elif not written.is_tree:
            rows.append(written)
        elif trees.setdefault(written.key, written) != written:
            raise ValueError(f"{written.key}: different values on different ranks")
    tensors = {row.path[:depth] for row in rows if row.dtype is not None for depth in range(1, len(row.path))}
    # A tree stands for everything below its path. Where one rank has a tree, a different rank may have tensors below
    # it, or where it has an empty one any entry, which the tree would hide.
    if any(map(_is_empty, trees.values())):
        everything = [*rows, *trees.values()]
        above = {row.path[:depth] for row in everything for depth in range(1, len(row.path))}
        trees = {key: tree for key, tree in trees.items() if not (_is_empty(tree) and tree.path in above)}
    return [*rows, *(tree for tree in trees.values() if tree.path not in tensors)], files


def _is_empty(tree: StoredChunk) -> bool:
    return tree.value in ("{}", "[]")


def prove(metadata: Metadata, rows: Sequence[StoredChunk]) -> None:
    """Check that what was written is what was planned: every entry is there, and every tensor is covered exactly.

    Raises:
        ValueError: names the entries that are missing, unplanned, or covered twice or not at all.
    """
    written: dict[str, list[StoredChunk]] = defaultdict(list)
    for row in rows:
        if not row.is_tree:
            written[row.key].append(row)
    planned = metadata.state_dict_metadata
    problems = [f"{key}: planned and not written" for key in planned.keys() - written.keys()]
    problems += [f"{key}: written and not planned" for key in written.keys() - planned.keys()]
    for key, entry in planned.items():
        chunks = written[key]
        if isinstance(entry, TensorStorageMetadata):
            problems += [f"{key}: {problem}" for problem in coverage_problems(entry.size, [row.box for row in chunks])]
        elif len(chunks) > 1:
            problems.append(f"{key}: a value written {len(chunks)} times")
    if problems:
        raise ValueError("what was written is not what was planned:\n  " + "\n  ".join(sorted(problems)))


@dataclass(frozen=True, slots=True)
class Repeated:
    """What may differ when a rank writes to the places of its last save: checksums, values and files, in row order."""

    checksums: list[bytes | memoryview]
    values: list[str | None]
    files: list[WrittenFile]


def repeated(results: Sequence[WriteResult]) -> Repeated:
    """The part of a rank's results that `places_digest` leaves out, and the files."""
    rows = _rows(results)
    files = [result.storage_data for result in results if isinstance(result.storage_data, WrittenFile)]
    return Repeated([row.checksums for row in rows], [row.value for row in rows], files)


def places_digest(results: Sequence[WriteResult]) -> int:
    """A 63-bit digest of all that an index says about a rank's results, except for checksums and values."""
    places = [
        (
            *(row.key, row.path, row.dtype, row.shape, row.box.offsets, row.box.sizes, row.file),
            *(row.item_offset, row.item_length, row.data_offset, row.block_bytes),
            *(len(row.checksums), row.value is None),
        )
        for row in _rows(results)
    ]
    return digest_number(repr(places).encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class Committed:
    """The outcome of a commit, for the next with the same rows in the same places: only checksums and values change.

    `sources` has, for each row of the index, its positions among all ranks' rows; several if several ranks have a tree.
    """

    metadata: bytes
    columns: Mapping[str, pa.Array]
    sources: list[list[int]]

    @classmethod
    def of(cls, metadata: bytes, rows: Sequence[StoredChunk], results: Sequence[Sequence[WriteResult]]) -> Committed:
        """The outcome of committing `rows`, which were collected from all ranks' `results`."""
        positions: dict[tuple[str, bool, tuple[int, ...]], list[int]] = defaultdict(list)
        for at, row in enumerate(row for of_rank in results for row in _rows(of_rank)):
            positions[row.key, row.is_tree, row.box.offsets].append(at)
        rows = [rows[at] for at in index.order_of(rows)]
        sources = [positions[row.key, row.is_tree, row.box.offsets] for row in rows]
        return cls(metadata, index.columns_of(rows), sources)

    def again(self, everyone: Sequence[Repeated]) -> bytes:
        """The bytes of the index of a save that wrote to the same places.

        Raises:
            ValueError: two ranks have different trees at one path.
            UnsupportedState: the values are longer than an index has room for.
        """
        checksums = [one for of_rank in everyone for one in of_rank.checksums]
        values = [one for of_rank in everyone for one in of_rank.values]
        names = self.columns["key"].to_pylist()
        for name, sources in zip(names, self.sources, strict=True):
            if len(sources) > 1 and len({values[at] for at in sources}) > 1:
                raise ValueError(f"{name}: different values on different ranks")
        values = [values[sources[0]] for sources in self.sources]
        _refuse_large(zip(names, values, strict=True), index.MAX_VALUES_BYTES)
        renewed = {
            "checksums": index.column_of("checksums", [checksums[sources[0]] for sources in self.sources]),
            "value": index.column_of("value", values),
        }
        data = index.stream_of({**self.columns, **renewed})
        _refuse_large(zip(names, values, strict=True), index.room_for_values(data))
        return data


def prepare(
    storage: Storage,
    path: str,
    metadata: Metadata,
    results: Sequence[Sequence[WriteResult]],
    description: Description,
) -> tuple[Committed, Manifest]:
    """Prove the checkpoint complete, and write `.metadata` and the index into directory `path`: all but the manifest.

    Raises:
        ValueError: an item that was planned is not among the results, or the written chunks leave a gap.
        UnsupportedState: the values are longer than an index has room for.
        DamagedCheckpoint: a file that some rank wrote is not there, or has a different size.
    """
    with collector.paused():
        rows, files = collect(results)
        prove(metadata, rows)
        _refuse_large(((row.key, row.value) for row in rows), index.MAX_VALUES_BYTES)
        committed = Committed.of(dcp_metadata.to_bytes(metadata, rows), rows, results)
        index_bytes = index.stream_of(committed.columns)
        _refuse_large(((row.key, row.value) for row in rows), index.room_for_values(index_bytes))
        contents = {layout.DCP_METADATA: committed.metadata, layout.INDEX: index_bytes}
        manifest = _manifest(files, contents, description)
        _check_readable(path, manifest, index_bytes)
    _write(storage, path, contents, manifest)
    return committed, manifest


def prepare_again(
    storage: Storage, path: str, committed: Committed, everyone: Sequence[Repeated], description: Description
) -> Manifest:
    """Like `prepare`, for a save in which every rank wrote to the places of `committed`.

    The places were proved complete then, and are not proved again: equal `places_digest`s show that they are the same.

    Raises:
        ValueError: two ranks have different trees at one path.
        UnsupportedState: the values are longer than an index has room for.
        DamagedCheckpoint: a file that some rank wrote is not there, or has a different size.
        HostileCheckpoint: a reader would refuse the manifest.
    """
    files = {written.name: written.file for of_rank in everyone for written in of_rank.files}
    contents = {layout.DCP_METADATA: committed.metadata, layout.INDEX: committed.again(everyone)}
    manifest = _manifest(files, contents, description)
    # What a reader refuses in an index, except for its size, concerns the places, which the earlier `prepare` checked.
    opening.check_index_size(path, len(contents[layout.INDEX]))
    # A manifest is new each time.
    Manifest.from_json(manifest.to_json(), posixpath.join(path, layout.MANIFEST))
    _write(storage, path, contents, manifest)
    return manifest


def write_manifest(storage: Storage, path: str, manifest: Manifest) -> None:
    """Commit what was prepared: a reader takes the manifest's presence as proof that every file it names is whole."""
    try:
        storage.write(posixpath.join(path, layout.MANIFEST), manifest.to_json())
    except StorageError as error:
        if not is_transient(error.__cause__, error.path):
            raise
        # A call that was given up may still succeed, and the reply to a call that succeeded may be lost.
        late = "; if it comes to be there all the same, the checkpoint is whole and committed, and a restore finds it"
        raise StorageError(error.operation, error.path, error.cause + late) from error


def discard(storage: Storage, path: str, timeout_s: float) -> None:
    """Delete what a failed save has written, as far as that can be done within `timeout_s`, and 30 s at most.

    Left there, it would keep a full disk full, and the next save would fail because of this one.
    """

    def delete() -> None:
        if layout.MANIFEST not in storage.sizes(path):
            storage.delete(path)

    outcome = Outcome()
    with outcome.catch():
        deadlines.call(delete, min(_DISCARD_S, timeout_s), path)
    if outcome.error is not None:
        logger.warning("what the failed save wrote to %s stays until orphans are collected: %s", path, outcome.error)


def _refuse_large(values: Iterable[tuple[str, str | None]], room: int) -> None:
    """Refuse `values`, pairs of key and text, that are longer together than `room`."""
    lengths = [(len(text), key) for key, text in values if text is not None]
    total = sum(length for length, _ in lengths)
    if total > room:
        largest, key = max(lengths)
        together = f"all values together: {total:,}; the index has room for {room:,}"
        raise UnsupportedState(key, f"a value of {largest:,} characters as JSON ({together})", "store it as a tensor")


def _check_readable(path: str, manifest: Manifest, index_bytes: bytes) -> None:
    # A checkpoint that readers would refuse is not committed: otherwise the restore that needs it would find out first.
    opening.check_index_size(path, len(index_bytes))
    sizes = manifest.sizes
    opening.parse(opening.RawCheckpoint(path=path, sizes=sizes, manifest=manifest.to_json(), index=index_bytes))


def _manifest(files: Mapping[str, StoredFile], contents: Mapping[str, bytes], description: Description) -> Manifest:
    described = {name: StoredFile(size=len(content), xxh3=checksum(content)) for name, content in contents.items()}
    return Manifest(
        step=description.step,
        samples=description.samples,
        world_size=description.world_size,
        attempt=description.attempt,
        parts=description.parts,
        mesh=description.mesh,
        versions=description.versions,
        files=dict(sorted({**files, **described}.items())),
        created_s=time.time(),
    )


def _write(storage: Storage, path: str, contents: Mapping[str, bytes], manifest: Manifest) -> None:
    # In parallel: on an object store, each write is a round trip.
    with ThreadPoolExecutor(max_workers=len(contents), thread_name_prefix="checkpoint-commit") as pool:
        jobs = [pool.submit(storage.write, posixpath.join(path, name), data) for name, data in contents.items()]
    for job in jobs:
        job.result()
    _check_there(path, manifest.files, storage.sizes(path))


def _check_there(path: str, files: Mapping[str, StoredFile], sizes: Mapping[str, int]) -> None:
    """Refuse files that rank 0 can't see: each rank saw its own written, maybe to a disk that no other node sees."""
    for name, file in files.items():
        if sizes.get(name) != file.size:
            found = (
                f"has {sizes[name]:,} bytes where rank 0 looks; {file.size:,} were written"
                if name in sizes
                else "was written, and is not there for rank 0: save to a storage that all nodes share"
            )
            raise DamagedCheckpoint(posixpath.join(path, name), found)


def _rows(results: Sequence[WriteResult]) -> list[StoredChunk]:
    return [result.storage_data for result in results if not isinstance(result.storage_data, WrittenFile)]
