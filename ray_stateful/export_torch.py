"""A checkpoint as one `torch.save` file: the whole nested state, or one part of it, as `torch.load` gives it back."""

from __future__ import annotations

import mmap
import os
import posixpath
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from typing_extensions import Buffer

from ray_stateful import parts, slabs
from ray_stateful.export import Exported, weight_of
from ray_stateful.format.chunks import span_of
from ray_stateful.format.hf_layout import Weight
from ray_stateful.storage.base import Sink, Storage
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.reader import value_of
from ray_stateful.storage.retries import write_file

# Bytes per call to storage: `torch.save` writes a tensor in one call, which would have to meet one deadline.
_PART_BYTES = 8 << 20

Progress = Callable[[int], None]


def to_torch(
    storage: Storage,
    opened: OpenCheckpoint,
    out_storage: Storage,
    out: str,
    part: str | None = None,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write what `torch.save` makes of the whole nested state, or of one part of it, to file `out`.

    `torch.save` needs all tensors at once: they are kept in a temporary file of their size on this machine (in
    `TMPDIR`), mapped into memory, so that the system can drop pages that are not in use.
    """
    chosen = {key: chunks for key, chunks in opened.chunks.items() if part is None or chunks[0].path[0] == part}
    tensors = {key: chunks[0] for key, chunks in chosen.items() if chunks[0].dtype is not None}
    directory, name = posixpath.split(out)
    # Looked for now: a directory at `out` would be noticed only when the file is renamed, after all the work.
    if name in out_storage.sizes(directory) or name in out_storage.directories(directory):
        raise FileExistsError(f"{out} exists; choose another name")
    with tempfile.TemporaryFile(prefix="ray-stateful-") as file:
        mapped = _mapped(file, {key: weight_of(opened, key, key, dtype, any_dtype=True) for key in tensors})
        for slab in slabs.stream(storage, opened, slabs.cut(opened, tensors)):
            first, stop = span_of(slab.box, tensors[slab.key].shape)
            mapped[slab.key].reshape(-1)[first:stop].copy_(slab.tensor.reshape(-1))
            if progress is not None:
                progress(slab.tensor.numel() * slab.tensor.element_size())
        found = {key: value_of(storage, opened.path, chunks[0]) for key, chunks in chosen.items() if key not in tensors}
        nested = parts.nest(opened, () if part is None else (part,), {**mapped, **found})
        write_file(out_storage, out, lambda sink: torch.save(nested, cast(Any, _File(sink))))
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in mapped.values())
    return Exported(files=(name,), num_tensors=len(tensors), num_bytes=num_bytes, left_out={})


class _File:
    """A sink as a file for `torch.save`. Splits its writes, each of a whole tensor: storage has a deadline per call."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: Buffer) -> int:
        view = memoryview(data)
        for at in range(0, view.nbytes, _PART_BYTES):
            self._sink.write(view[at : at + _PART_BYTES])
        return view.nbytes

    def flush(self) -> None:
        """Nothing to do: the sink publishes what it has when it ends."""


def _mapped(file: Any, weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    offsets, end = {}, 0
    for key, weight in weights.items():
        offsets[key] = end
        end += -(-weight.num_bytes // 64) * 64
    try:
        # Reserve it all: touching a mapped page for which the disk has no room kills the process, without an exception.
        os.posix_fallocate(file.fileno(), 0, max(end, 1))
    except OSError as error:
        where = tempfile.gettempdir()
        why = os.strerror(error.errno or 0)
        text = f"{end:,} bytes of temporary space could not be reserved in {where}: {why}; set TMPDIR elsewhere"
        raise OSError(error.errno, text) from error
    memory = mmap.mmap(file.fileno(), 0)
    found = {}
    for key, weight in weights.items():
        dtype = getattr(torch, weight.dtype)
        if weight.num_bytes == 0:
            found[key] = torch.empty(weight.shape, dtype=dtype, device="cpu")
            continue
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=weight.num_bytes, offset=offsets[key])
        found[key] = raw.view(dtype).reshape(weight.shape)
    return found
