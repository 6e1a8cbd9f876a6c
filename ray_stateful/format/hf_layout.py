"""Weights in the Hugging Face layout: the header of a safetensors file, tensors spread over files, the index. Pure.

Written by hand because the `safetensors` library takes all tensors of a file at once, in memory, and a local path.
The format is eight bytes that give the length of a JSON header, that header, and the tensors' bytes; it is public and
frozen: https://huggingface.co/docs/safetensors. Tests have the library and this module read each other's files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_stateful.errors import HostileCheckpoint
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.rows import MAX_DIMS
from ray_stateful.format.strict_json import strict_json

WEIGHTS = "model"
ADAPTER = "adapter_model"
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

# The one entry of a header that is not a tensor.
METADATA = "__metadata__"

# The library's own limit.
MAX_HEADER_BYTES = 100_000_000

# For each list and object: a tensor's entry has three of them, in some 60 bytes.
_MIN_ENTRY_BYTES = 16

DTYPES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "complex64": "C64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "uint8": "U8",
}
_TORCH_NAMES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor in a file. `dtype` is torch's name; `offset` is where its bytes begin in the file, if that is known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def spread(weights: Sequence[Weight], max_file_bytes: int, stem: str = WEIGHTS) -> dict[str, list[Weight]]:
    """The files that `weights` go to, in their order: a file ends before it would exceed the limit.

    A tensor larger than the limit gets a file of its own. Within a file, tensors with wider elements come first, so
    that all of them are aligned.
    """
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if groups[-1] and size + weight.num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += weight.num_bytes
    names = (
        [f"{stem}{SUFFIX}"]
        if len(groups) == 1
        else [f"{stem}-{number + 1:05d}-of-{len(groups):05d}{SUFFIX}" for number in range(len(groups))]
    )
    return {
        name: sorted(group, key=lambda weight: (-ITEM_BYTES[weight.dtype], weight.name))
        for name, group in zip(names, groups, strict=True)
    }


def header(weights: Sequence[Weight]) -> bytes:
    """The bytes of a file before those of `weights`, which follow in this order and without gaps."""
    # Without this entry `transformers` refuses the file.
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    offset = 0
    for weight in weights:
        entries[weight.name] = {
            "dtype": DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.num_bytes],
        }
        offset += weight.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_bytes(start: bytes, file_bytes: int, where: str) -> int:
    """The length of the header, from the first eight bytes of a file.

    Raises:
        HostileCheckpoint: the file is not a safetensors file, or the length of its header is impossible.
    """
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise HostileCheckpoint(where, "is not a safetensors file: the length of its header is impossible")
    return int(length)


def parse_header(text: bytes, file_bytes: int, where: str) -> list[Weight]:
    """The tensors that a header describes, with offsets from the beginning of the file.

    Raises:
        HostileCheckpoint: they do not fill the file end to end, or one has an unknown dtype.
    """
    try:
        entries = strict_json(text, _MIN_ENTRY_BYTES)
        weights = [
            (_weight(name, entry), *entry["data_offsets"]) for name, entry in entries.items() if name != METADATA
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostileCheckpoint(where, f"its header can't be read: {type(error).__name__}: {error}") from error
    begin, end = 8 + len(text), 0
    placed = []
    for weight, start, stop in sorted(weights, key=lambda entry: (entry[1], entry[2])):
        if start != end or stop - start != weight.num_bytes:
            raise HostileCheckpoint(where, f"{weight.name!r} is not where the tensor before it ends")
        placed.append(Weight(weight.name, weight.dtype, weight.shape, begin + start))
        end = stop
    if begin + end != file_bytes:
        raise HostileCheckpoint(where, f"has {file_bytes:,} bytes; its header tells of {begin + end:,}")
    return placed


def _weight(name: str, entry: Any) -> Weight:
    if set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in _TORCH_NAMES:
        raise ValueError(f"{name!r} is described as {str(entry)[:100]}")
    # A name goes into messages; half a surrogate pair, which JSON allows, can't be printed.
    name.encode()
    shape, offsets = entry["shape"], entry["data_offsets"]
    if type(shape) is not list or len(shape) > MAX_DIMS or type(offsets) is not list or len(offsets) != 2:
        raise ValueError(f"{name!r} has shape {str(shape)[:100]} at {str(offsets)[:100]}")
    absurd = any(type(number) is not int or not 0 <= number < 2**62 for number in [*shape, *offsets])
    # Also where a size is 0: strides are products of the other sizes.
    if absurd or math.prod(max(size, 1) for size in shape) * 16 > 2**62:
        raise ValueError(f"{name!r} has shape {str(shape)[:100]} at {str(offsets)[:100]}")
    return Weight(name, _TORCH_NAMES[entry["dtype"]], tuple(shape))


def index(files: Mapping[str, Sequence[Weight]]) -> bytes:
    """The index of several files."""
    total = sum(weight.num_bytes for weights in files.values() for weight in weights)
    weight_map = {weight.name: name for name, weights in files.items() for weight in weights}
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(body, indent=2) + "\n").encode()


def weight_map(text: bytes, where: str) -> dict[str, str]:
    """The file of each tensor, read from an index.

    Raises:
        HostileCheckpoint: `text` is not an index, or names files outside of its directory.
    """
    try:
        found = strict_json(text, _MIN_ENTRY_BYTES)["weight_map"]
        names = set(found.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostileCheckpoint(where, f"is not an index of safetensors: {type(error).__name__}: {error}") from error
    if any(type(name) is not str or "/" in name or "\\" in name or not name.endswith(SUFFIX) for name in names):
        raise HostileCheckpoint(where, "names files outside of its directory")
    return dict(found)
