"""The commit: proof that a checkpoint is complete, then the files that say so, the manifest last.

Made on one rank, from what all ranks said they wrote. Until the manifest is there a directory is not a checkpoint,
and a reader does not look further; once it is there, every file it names is whole.
"""

from __future__ import annotations

import posixpath
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from ray_stateful.format import index, layout
from ray_stateful.format.checksums import checksum
from ray_stateful.format.chunks import coverage_problems
from ray_stateful.format.index import StoredChunk
from ray_stateful.format.manifest import Manifest, StoredFile
from ray_stateful.storage import dcp_metadata, opening
from ray_stateful.storage.base import Storage


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
    """An item file as its writer saw it go by."""

    name: str
    file: StoredFile


def file_result(written: WrittenFile) -> WriteResult:
    """A file's size and checksum, in the one channel that DCP has from writers to the coordinator."""
    return WriteResult(index=MetadataIndex(written.name), size_in_bytes=written.file.size, storage_data=written)


def tree_result(row: StoredChunk) -> WriteResult:
    """A tree, in the same channel."""
    return WriteResult(index=MetadataIndex(row.key), size_in_bytes=0, storage_data=row)


def collect(results: Sequence[Sequence[WriteResult]]) -> tuple[list[StoredChunk], dict[str, StoredFile]]:
    """The index's rows and the files, from all ranks' results.

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
            raise ValueError(f"{written.key}: one value on some ranks, and another on others")
    tensors = {row.path[:depth] for row in rows if row.dtype is not None for depth in range(1, len(row.path))}
    # Where one rank has no tensors another may have some; a tree, which stands for all below it, would hide them.
    return [*rows, *(tree for tree in trees.values() if tree.path not in tensors)], files


def prove(metadata: Metadata, rows: Sequence[StoredChunk]) -> None:
    """Check that what was written is what was planned: every entry, every tensor covered exactly.

    Raises:
        ValueError: names what is missing, unplanned, or covered twice or not at all.
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


def commit(
    storage: Storage,
    path: str,
    metadata: Metadata,
    rows: list[StoredChunk],
    files: Mapping[str, StoredFile],
    description: Description,
) -> None:
    """Write `.metadata`, the index and, last, the manifest into directory `path`."""
    contents = {
        layout.DCP_METADATA: dcp_metadata.to_bytes(metadata, rows),
        layout.INDEX: index.to_bytes(rows),
    }
    described = {name: StoredFile(size=len(content), xxh3=checksum(content)) for name, content in contents.items()}
    manifest = Manifest(
        step=description.step,
        samples=description.samples,
        world_size=description.world_size,
        attempt=description.attempt,
        parts=description.parts,
        mesh=description.mesh,
        versions=description.versions,
        files=dict(sorted({**files, **described}.items())),
        created_s=time.time(),
    ).to_json()
    # What no reader would take is not committed: the first to find out must not be the restore that needs it.
    sizes = {name: file.size for name, file in {**files, **described}.items()}
    opening.parse(opening.RawCheckpoint(path=path, sizes=sizes, manifest=manifest, index=contents[layout.INDEX]))
    for name, content in contents.items():
        storage.write(posixpath.join(path, name), content)
    # Only now: a reader takes the manifest's presence as proof that every file it names is whole.
    storage.write(posixpath.join(path, layout.MANIFEST), manifest)
