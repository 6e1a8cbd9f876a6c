"""A tensor as one item of a DCP file: the zip archive that `torch.load` reads, around bytes that we write as they are.

`torch.save` costs 0.4 ms a tensor, computes a CRC that `torch.load` never checks, and does not say where in the
archive the tensor's bytes begin. Here the archive is a `header` and a `trailer` that depend on dtype and shape
alone: the bytes between them go from the tensor to storage without a copy, and an item's length is known before it is
written.

The members are those that `caffe2/serialize/inline_container.cc` and `torch.load` ask for, stored and not deflated. The
CRC of the tensor's member is left at zero, as torch does itself under
`torch.utils.serialization.config.save.compute_crc32 = False`; our own checksums are in the index. Members that torch
adds and nothing needs are left out: a restore also reads what lies between small tensors.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zlib
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import torch

from ray_stateful.format.chunks import strides_of

# The folder of the archive's members: a short name, as each member's path is written twice.
_ROOT = "t"
_MEMBER = b"PK\x03\x04"
_DIRECTORY_ENTRY = b"PK\x01\x02"
_END_64 = b"PK\x06\x06"
_END_64_LOCATOR = b"PK\x06\x07"
_END = b"PK\x05\x06"
_ZIP64_EXTRA = 0x0001
_UINT32_MAX = 0xFFFF_FFFF


@lru_cache(maxsize=4096)
def envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The bytes to put before and after those of a contiguous tensor, so that `torch.load` reads the whole."""
    num_bytes = dtype.itemsize * _product(shape)
    header, directory = bytearray(), bytearray()
    small = {"data.pkl": _data_pickle(dtype, shape, num_bytes), "version": b"3\n"}
    for name, content in small.items():
        _add_member(header, directory, name, zlib.crc32(content), len(content))
        header += content
    # Last, so that everything else is either before or after it.
    _add_member(header, directory, "data/0", 0, num_bytes)
    return bytes(header), bytes(_trailer(directory, 1 + len(small), len(header) + num_bytes))


def _add_member(header: bytearray, directory: bytearray, name: str, crc: int, num_bytes: int) -> None:
    # The offset is never large: the tensor is the last member.
    path, offset = f"{_ROOT}/{name}".encode(), len(header)
    fits = num_bytes < _UINT32_MAX
    extra = b"" if fits else struct.pack("<HHQQ", _ZIP64_EXTRA, 16, num_bytes, num_bytes)
    size = num_bytes if fits else _UINT32_MAX
    fields = struct.pack("<5H3I2H", 45, 0, 0, 0, 0, crc, size, size, len(path), len(extra))
    header += _MEMBER + fields + path + extra
    directory += _DIRECTORY_ENTRY + struct.pack("<H", 45) + fields + struct.pack("<3H2I", 0, 0, 0, 0, offset)
    directory += path + extra


def _trailer(directory: bytearray, num_members: int, directory_offset: int) -> bytearray:
    trailer = bytearray(directory)
    if directory_offset >= _UINT32_MAX:
        end_64_offset = directory_offset + len(directory)
        trailer += _END_64 + struct.pack(
            "<Q2H2I4Q", 44, 45, 45, 0, 0, num_members, num_members, len(directory), directory_offset
        )
        trailer += _END_64_LOCATOR + struct.pack("<IQI", 0, end_64_offset, 1)
    offset = min(directory_offset, _UINT32_MAX)
    trailer += _END + struct.pack("<4H2IH", 0, 0, num_members, num_members, len(directory), offset, 0)
    return trailer


class _Storage:
    """Stands for the tensor's storage in the pickle, which refers to it by a persistent id."""


class _Tensor:
    """Stands for the tensor in the pickle."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dtype: torch.dtype, shape: tuple[int, ...], num_bytes: int) -> None:
        super().__init__(file, protocol=2)
        self._dtype, self._shape, self._num_bytes = dtype, shape, num_bytes

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", torch.UntypedStorage, "0", "cpu", self._num_bytes)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _Tensor):
            stride = strides_of(self._shape)
            # The form torch.save uses for the dtypes that have no typed storage; it holds for all of them.
            rebuild = torch._utils._rebuild_tensor_v3  # the function that torch.save names
            return rebuild, (_Storage(), 0, self._shape, stride, False, OrderedDict(), self._dtype)
        return NotImplemented


def _data_pickle(dtype: torch.dtype, shape: tuple[int, ...], num_bytes: int) -> bytes:
    file = io.BytesIO()
    _Pickler(file, dtype, shape, num_bytes).dump(_Tensor())
    # Without memo entries, which nothing refers to.
    return pickletools.optimize(file.getvalue())


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
