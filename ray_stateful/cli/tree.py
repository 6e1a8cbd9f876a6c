"""What `inspect` shows of a checkpoint, from its manifest and index alone. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from ray_stateful.cli.rendering import age, size
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage.opening import OpenCheckpoint

MAX_VALUE_LENGTH = 60
MAX_TREE_DEPTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One entry. `sharded_dims` are the dims that its chunks divide; `ranks` wrote those; `value` is its JSON."""

    key: str
    path: tuple[str | int, ...]
    dtype: str | None
    shape: tuple[int, ...]
    num_bytes: int
    num_chunks: int
    sharded_dims: tuple[int, ...]
    ranks: tuple[int, ...]
    value: str | None

    @property
    def shape_text(self) -> str:
        if self.dtype is not None:
            return "x".join(map(str, self.shape)) or "scalar"
        text = self.value or "?"
        return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "..."

    @property
    def chunks_text(self) -> str:
        if not self.sharded_dims:
            return "whole"
        return f"{self.num_chunks} along dim {', '.join(map(str, self.sharded_dims))}"

    @property
    def writers_text(self) -> str:
        return ranges(self.ranks)


def summaries(opened: OpenCheckpoint, key: str | None = None) -> list[Summary]:
    """The entries at `key` and below it, or all, in the order of their keys.

    Raises:
        ValueError: there is no such entry; names those with the most similar keys.
    """
    found = [
        _summary(chunks)
        for name, chunks in sorted(opened.chunks.items())
        if key is None or name == key or name.startswith(f"{key}.")
    ]
    if not found and key is not None:
        import difflib

        near = difflib.get_close_matches(key, opened.chunks, n=3, cutoff=0.4)
        raise ValueError(f"no entry {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return found


def heading(opened: OpenCheckpoint, where: str) -> Iterator[str]:
    """What the manifest says."""
    manifest = opened.manifest
    tensors = [chunks for chunks in opened.chunks.values() if chunks[0].dtype is not None]
    elements = sum(math.prod(chunks[0].shape) for chunks in tensors)
    contents = f"{len(tensors):,} tensors, {elements:,} elements, {len(opened.chunks) - len(tensors):,} values"
    if manifest is None:
        yield f"{where}: a plain DCP directory, without checksums"
        yield f"  {contents}"
        return
    meshes = ["(" + ", ".join(f"{axis}={n}" for axis, n in mesh.items()) + ")" for mesh in manifest.mesh]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    yield where
    saved = f"saved {age(manifest.created_s)} ago"
    yield f"  step {manifest.step:,}, {manifest.samples:,} samples; format {manifest.format}, {saved}"
    yield f"  {manifest.world_size} worker(s)" + (f", mesh {' '.join(meshes)}" if meshes else "") + f"; {versions}"
    yield f"  {contents}; {size(manifest.num_bytes)} in {len(manifest.files)} files"


def lines(found: Sequence[Summary]) -> Iterator[str]:
    """The entries as a tree: each name once, with the bytes below it."""
    ordered = sorted(((_steps(one), one) for one in found), key=lambda entry: entry[0])
    paths = [path for path, _ in ordered]
    # How many steps each path shares with the one before it. What is below one step stands in a row, so no prefixes
    # need be kept, of which a name with many dots has many.
    common = [_num_common(*pair) for pair in pairwise([[], *paths])]
    for at, (path, one) in enumerate(ordered):
        for depth in range(common[at] + 1, len(path)):
            num_bytes = _bytes_below(ordered, common, at, depth)
            yield f"{'  ' * (depth - 1)}{path[depth - 1]}  ({size(num_bytes)})"
        what = f"{one.dtype} {one.shape_text}, {one.chunks_text}" if one.dtype else one.shape_text
        yield f"{'  ' * (len(path) - 1)}{path[-1]}  {what}"


def chunk_lines(opened: OpenCheckpoint, one: Summary) -> Iterator[str]:
    """Where the bytes of one entry are."""
    yield ""
    for chunk in opened.chunks[one.key]:
        if chunk.dtype is None:
            yield f"value in {chunk.file}: {chunk.value}"
        else:
            begin = chunk.data_offset if chunk.data_offset >= 0 else chunk.item_offset
            place = f"{chunk.file} at byte {begin:,}, {size(chunk.num_bytes)}"
            blocks = len(chunk.checksums) // 8
            yield f"chunk at {chunk.box.offsets} of sizes {chunk.box.sizes}: {place}, {blocks} checksum(s)"


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as ranges: `rank 0-2, 5`."""
    if not numbers:
        return "-"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "rank " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _summary(chunks: Sequence[StoredChunk]) -> Summary:
    first = chunks[0]
    cut = [dim for dim, size in enumerate(first.shape) if any(chunk.box.sizes[dim] != size for chunk in chunks)]
    return Summary(
        key=first.key,
        path=tuple(first.path),
        dtype=first.dtype,
        shape=first.shape,
        num_bytes=math.prod(first.shape) * ITEM_BYTES[first.dtype] if first.dtype else first.item_length,
        num_chunks=len(chunks),
        sharded_dims=tuple(cut),
        ranks=tuple(sorted({rank for chunk in chunks if (rank := _writer(chunk.file)) is not None})),
        value=first.value,
    )


def _writer(file: str) -> int | None:
    """The rank in the name of an item file: `__3_0.distcp`."""
    text = file.removeprefix("__").partition("_")[0]
    return int(text) if file.startswith("__") and text.isdigit() else None


def _num_common(first: list[str], second: list[str]) -> int:
    """How many steps two paths share from the beginning."""
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in shared)


def _bytes_below(ordered: Sequence[tuple[list[str], Summary]], common: Sequence[int], first: int, depth: int) -> int:
    """The bytes of the entries from `first` that share its first `depth` steps."""
    others = takewhile(lambda at: common[at] >= depth, range(first + 1, len(ordered)))
    return sum(ordered[at][1].num_bytes for at in (first, *others))


def _steps(one: Summary) -> list[str]:
    # The name of a parameter is one step with dots in it: the tree splits it at those.
    steps = [part for step in one.path for part in str(step).split(".")]
    # A name with a million dots would make a tree as deep, with a line for each level, indented by its depth.
    return (
        steps if len(steps) <= MAX_TREE_DEPTH else [*steps[: MAX_TREE_DEPTH - 1], ".".join(steps[MAX_TREE_DEPTH - 1 :])]
    )
