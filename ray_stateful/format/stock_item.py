"""Where the bytes of a tensor begin in an item that stock `torch.save` wrote. Pure; no torch.

The archive's directory, at its end, says so, but its first bytes do as well: the pickle that describes the tensor
comes first, and the tensor's bytes follow before anything else that is large. So a range of a large item can be read
after one small read of its head. The pickle is read as a list of instructions, a dozen of which suffice to describe a
tensor; none is executed. An item with any other instruction is left to callers that read the whole of it.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Sequence
from typing import Any

from ray_stateful.format.chunks import strides_of
from ray_stateful.format.dtypes import ITEM_BYTES

# Some 700 bytes come before those of the tensor.
HEAD_BYTES = 4 << 10

_HEADER = struct.Struct("<4s5H3I2H")
_MEMBER = b"PK\x03\x04"
_REBUILDS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")
STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
}
_MARK = object()


def data_position(head: bytes, dtype: str, sizes: Sequence[int]) -> int | None:
    """How many bytes of the item come before those of its tensor.

    Args:
        head: The first `HEAD_BYTES` of the item, or all of a smaller one.
        dtype, sizes: What the tensor must be, contiguous and row-major.

    Returns:
        `None` if the item holds anything else, or has a different form.
    """
    try:
        name, begin = _member(head, 0)
        if not name.endswith("/data.pkl"):
            return None
        root = name.removesuffix("data.pkl")
        offset = _offset(_described(head[begin:]), dtype, tuple(sizes))
        order = _find(head, root + "byteorder")
        data = _find(head, root + "data/0")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error):
        return None
    if offset is None or data is None or (order is not None and head[order : order + 6] != b"little"):
        return None
    return data + offset * ITEM_BYTES[dtype]


def _member(head: bytes, at: int) -> tuple[str, int]:
    """Name of the archive's member whose header is at `at`, and where its content begins."""
    magic, _, _, method, *_, name_bytes, extra_bytes = _HEADER.unpack_from(head, at)
    if magic != _MEMBER or method != 0:
        raise ValueError("no stored member")
    begin = at + _HEADER.size
    return head[begin : begin + name_bytes].decode(), begin + name_bytes + extra_bytes


def _find(head: bytes, wanted: str) -> int | None:
    """Where the content of member `wanted` begins. Headers do not tell lengths; all members but the last are small."""
    at = head.find(_MEMBER)
    while at != -1:
        if at + _HEADER.size + len(wanted) <= len(head):
            name, begin = _member(head, at)
            if name == wanted:
                return begin
        at = head.find(_MEMBER, at + 1)
    return None


def _described(pickled: bytes) -> Any:
    """What a pickle describes, as nested tuples: calls are `(function, arguments)`, names are strings."""
    stack: list[Any] = []
    for instruction, argument, _ in pickletools.genops(pickled):
        name = instruction.name
        if name in ("PROTO", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            continue
        if name in ("GLOBAL", "BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)
        elif name in ("NEWFALSE", "NEWTRUE"):
            stack.append(name == "NEWTRUE")
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            _fold(stack, len(stack) - int(name[-1]))
        elif name == "TUPLE":
            begin = len(stack) - 1 - stack[::-1].index(_MARK)
            del stack[begin]
            _fold(stack, begin)
        elif name == "REDUCE":
            _fold(stack, len(stack) - 2)
        elif name == "STOP":
            (whole,) = stack
            return whole
        elif name != "BINPERSID":  # a storage: the tuple that describes it stays on the stack
            raise ValueError(f"{name} describes no tensor")
    raise ValueError("the pickle has no end")


def _fold(stack: list[Any], begin: int) -> None:
    if begin < 0:
        raise ValueError("the pickle takes more than it was given")
    stack[begin:] = [tuple(stack[begin:])]


def _offset(described: Any, dtype: str, sizes: tuple[int, ...]) -> int | None:
    """Elements in the storage before the tensor's first; `None` if it has a different dtype, sizes or strides."""
    rebuild, (storage, offset, found_sizes, strides, _, hooks, *rest) = described
    kind, storage_type, key, _, _ = storage
    if rebuild not in _REBUILDS or kind != "storage" or key != "0" or hooks != ("collections OrderedDict", ()):
        return None
    named = rest[0].removeprefix("torch ") if rest else STORAGES[storage_type.rpartition(" ")[2]]
    if named != dtype or found_sizes != sizes or strides != strides_of(sizes) or type(offset) is not int or offset < 0:
        return None
    return offset
