"""Checks and normalises the paths, ranges and buffers that every storage takes. Pure.

Every refusal is an `OSError`, as the `Storage` protocol asks: a caller who handles storage errors handles these.
"""

from __future__ import annotations

import errno

from typing_extensions import Buffer


def normalised(path: str, *, to_delete: bool = False) -> str:
    """`path` without empty and `.` components and without a trailing slash; a leading slash stays.

    Raises:
        OSError: a component is `..`, which could lead outside of where a checkpoint belongs; the path has a NUL byte;
            or it is the root, and `to_delete` is given.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise OSError(errno.EINVAL, "a path has no '..' and no NUL byte", path)
    if to_delete and not parts:
        raise OSError(errno.EINVAL, "the root of a storage is not deleted", path)
    return ("/" if path.startswith("/") else "") + "/".join(parts)


def checked_range(path: str, offset: int, length: int | None, size: int) -> tuple[int, int]:
    """Where a read of `length` bytes from `offset` starts and stops in a file of `size` bytes.

    The range is cut to the file before anything is allocated: a damaged index may ask for more than there is.
    """
    if offset < 0 or (length is not None and length < 0):
        raise OSError(errno.EINVAL, f"a range of a file is not negative: offset {offset}, length {length}", path)
    start = min(offset, size)
    return start, size if length is None else min(start + length, size)


def as_bytes(data: Buffer) -> memoryview:
    """`data` as one run of bytes, without a copy."""
    view = memoryview(data)
    # An empty view whose shape has a zero in it can't be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
