"""Exports a checkpoint for other tools: safetensors in the Hugging Face layout, or a plain DCP directory.

Streamed from storage to storage, each byte checked on the way; the memory used is bounded, whatever the size of the
model.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from typing_extensions import Buffer

from ray_stateful import slabs
from ray_stateful.errors import DamagedCheckpoint
from ray_stateful.format import hf_layout, layout
from ray_stateful.format.checksums import RunningChecksum
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.hf_layout import Weight
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage import dcp_metadata
from ray_stateful.storage.base import Sink, Storage
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.retries import write_file

DEFAULT_MAX_FILE_BYTES = 5 * 10**9
ADAPTER_PREFIX = "base_model.model."

_PART_BYTES = 8 << 20
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "word_embeddings.weight")

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written: `files` in the order of writing; `left_out` gives the reason for each key left out."""

    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The tensors of one part: `keys` maps their names within the part to their keys in the checkpoint."""

    keys: Mapping[str, str]
    left_out: Mapping[str, str]
    is_adapter: bool


def part_to_export(opened: OpenCheckpoint, part: str | None) -> str:
    """`part`, if the checkpoint has it; by default `model`, or the only part there is.

    Raises:
        ValueError: says which parts there are.
    """
    parts = sorted({str(row.path[0]) for row in opened.first_rows()})
    if part is None:
        part = "model" if "model" in parts or len(parts) != 1 else parts[0]
    if part not in parts:
        raise ValueError(f"the checkpoint has no part {part!r}; choose one of: {', '.join(parts)}")
    return part


def select(opened: OpenCheckpoint, part: str, *, adapter_only: bool = False, drop_tied: bool = False) -> Selection:
    """Which tensors of `part` are exported, under which names.

    Args:
        drop_tied: Leave out an output head that equals the embedding. A tied head is not saved in the first place; one
            that was saved and is equal may be tied across pipeline stages, or be about to be trained on its own.

    Raises:
        ValueError: no tensor is left to be exported.
    """
    keys: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for key, chunks in opened.chunks.items():
        path = chunks[0].path
        if path[0] != part:
            continue
        # A tensor at the top level of a foreign checkpoint has no name below its part.
        name = ".".join(map(str, path[1:])) or key
        if chunks[0].dtype is None:
            left_out[key] = "not a tensor"
        elif adapter_only and not name.startswith(ADAPTER_PREFIX):
            left_out[key] = "not of the adapter"
        else:
            keys[name] = key
    head = _tied_head(opened, keys) if drop_tied else None
    if head is not None:
        left_out[keys.pop(head[0])] = f"equal to {head[1]}"
    if not keys:
        raise ValueError(f"part {part!r} has no tensors" + (" of an adapter" if adapter_only else ""))
    return Selection(
        keys=dict(sorted(keys.items())),
        left_out=left_out,
        is_adapter=all(name.startswith(ADAPTER_PREFIX) for name in keys),
    )


def to_safetensors(
    storage: Storage,
    opened: OpenCheckpoint,
    out_storage: Storage,
    out: str,
    selection: Selection,
    *,
    dtype: str | None = None,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write safetensors into directory `out`: one file, or several and an index, which is written last.

    Args:
        dtype: What floating-point tensors are cast to; others keep theirs.
        max_file_bytes: Limit for the tensors of one file, unless a single tensor is larger.

    Raises:
        ValueError: safetensors files can't have a tensor's dtype or name; names it, before anything is written.
        FileExistsError: `out` has files already.
        DamagedCheckpoint: bytes are missing, or not those that were written.
    """
    weights = [weight_of(opened, name, key, dtype) for name, key in selection.keys.items()]
    _check_empty(out_storage, out)
    # Never several files: PEFT looks for one file of this name.
    stem, limit = (hf_layout.ADAPTER, 2**62) if selection.is_adapter else (hf_layout.WEIGHTS, max_file_bytes)
    files = hf_layout.spread(weights, limit, stem)
    for file, of_file in files.items():

        def produce(sink: Sink, of_file: list[Weight] = of_file) -> None:
            sink.write(hf_layout.header(of_file))
            boxes = slabs.cut(opened, [selection.keys[weight.name] for weight in of_file])
            cast_to = {selection.keys[weight.name]: getattr(torch, weight.dtype) for weight in of_file}
            for slab in slabs.stream(storage, opened, boxes):
                tensor = slab.tensor.to(cast_to[slab.key])
                sink.write(_bytes_of(tensor))
                if progress is not None:
                    progress(slab.tensor.numel() * slab.tensor.element_size())

        write_file(out_storage, posixpath.join(out, file), produce)
    if len(files) > 1:
        # Last: whoever finds it finds all the files.
        index = f"{stem}{hf_layout.INDEX_SUFFIX}"
        out_storage.write(posixpath.join(out, index), hf_layout.index(files))
    notes = ("put the adapter_config.json of the training beside it",) if selection.is_adapter else ()
    return Exported(
        files=(*files, *([index] if len(files) > 1 else [])),
        num_tensors=len(weights),
        num_bytes=sum(weight.num_bytes for weight in weights),
        left_out=selection.left_out,
        notes=notes,
    )


def to_dcp(
    storage: Storage,
    opened: OpenCheckpoint,
    out_storage: Storage,
    out: str,
    part: str | None = None,
    *,
    progress: Progress | None = None,
) -> Exported:
    """Write a plain DCP directory: the item files as they are, then metadata that names only the chosen entries.

    Raises:
        DamagedCheckpoint: a file is not what was written.
    """
    chosen = {key: chunks for key, chunks in opened.chunks.items() if part is None or chunks[0].path[0] == part}
    rows = [row for chunks in chosen.values() for row in chunks]
    files = sorted({row.file for row in rows})
    _check_empty(out_storage, out)
    sizes = storage.sizes(opened.path)
    for name in files:
        written = sizes.get(name) if opened.manifest is None else opened.manifest.files[name].size
        if written is None or sizes.get(name) != written:
            found = f"has {sizes[name]:,} bytes; {written:,} were written" if name in sizes else "the file is missing"
            raise DamagedCheckpoint(posixpath.join(opened.path, name), found)
    for name in files:

        def produce(sink: Sink, name: str = name) -> None:
            _copy(storage, opened, name, sizes[name], sink, progress)

        write_file(out_storage, posixpath.join(out, name), produce)
    metadata = opened.metadata({key: key for key in chosen})
    out_storage.write(posixpath.join(out, layout.DCP_METADATA), dcp_metadata.to_bytes(metadata, rows))
    return Exported(
        files=(*files, layout.DCP_METADATA),
        num_tensors=sum(chunks[0].dtype is not None for chunks in chosen.values()),
        num_bytes=sum(sizes[name] for name in files),
        left_out={},
    )


def _copy(
    storage: Storage, opened: OpenCheckpoint, name: str, size: int, sink: Sink, progress: Progress | None
) -> None:
    where = posixpath.join(opened.path, name)
    found = RunningChecksum()
    for at in range(0, size, _PART_BYTES):
        data = storage.read(where, at, min(_PART_BYTES, size - at))
        found.update(data)
        sink.write(data)
        if progress is not None:
            progress(len(data))
    if opened.manifest is not None and found.hexdigest() != opened.manifest.files[name].xxh3:
        raise DamagedCheckpoint(where, "its checksum is not the one in the manifest")


def weight_of(opened: OpenCheckpoint, name: str, key: str, dtype: str | None, *, any_dtype: bool = False) -> Weight:
    """The tensor at `key` as it will be written under `name`, floating-point elements as `dtype`.

    Raises:
        ValueError: safetensors files can't have its dtype or its name, and `any_dtype` is false; or `dtype` is unknown.
    """
    stored = opened.chunks[key][0]
    assert stored.dtype is not None
    found = dtype if dtype is not None and getattr(torch, stored.dtype).is_floating_point else stored.dtype
    if name == hf_layout.METADATA and not any_dtype:
        raise ValueError(
            f"{key} would be {name!r} in a safetensors file, which is the name of its metadata; leave it out"
        )
    if found not in hf_layout.DTYPES and not any_dtype:
        raise ValueError(f"{name} is of dtype {found}, which safetensors files do not have; leave it out or cast it")
    if found not in ITEM_BYTES:
        raise ValueError(f"dtype is {found!r}; choose one of {', '.join(sorted(ITEM_BYTES))}")
    return Weight(name, found, stored.shape)


def _tied_head(opened: OpenCheckpoint, keys: Mapping[str, str]) -> tuple[str, str] | None:
    """The output head and the embedding that it equals, bit for bit; `None` if there is no such pair.

    Only this pair is looked for: other tensors may be equal by chance, as are all that begin as zeros.
    """
    heads = [name for name in keys if name == _HEAD or name.endswith("." + _HEAD)]
    embeddings: dict[Any, str] = {}
    for name in keys:
        if heads and name.endswith(_EMBEDDINGS):
            embeddings.setdefault(_content(opened.chunks[keys[name]]), name)
    # Without checksums nobody can tell.
    embeddings.pop(None, None)
    for head in heads:
        embedding = embeddings.get(_content(opened.chunks[keys[head]]))
        if embedding is not None:
            return head, embedding
    return None


def _content(chunks: tuple[StoredChunk, ...]) -> Any:
    """A value that is equal for tensors of equal content and sharding; `None` where checksums are missing."""
    if any(not chunk.checksums for chunk in chunks):
        return None
    boxes = tuple(sorted((chunk.box, chunk.block_bytes, bytes(chunk.checksums)) for chunk in chunks))
    return chunks[0].dtype, chunks[0].shape, boxes


def _bytes_of(tensor: torch.Tensor) -> Buffer:
    return cast(Buffer, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _check_empty(storage: Storage, path: str) -> None:
    found = storage.sizes(path)
    if found:
        raise FileExistsError(f"{path} has {len(found)} file(s) already; choose an empty directory")
