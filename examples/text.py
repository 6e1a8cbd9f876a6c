"""The text that is trained on: Python's own standard library, byte by byte.

Real text that every machine with Python has, so that nothing is downloaded. The order of files and the cut into
samples are fixed: sample 17 is the same bytes on every worker of every run.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

# Not text that was written for this Python: what was installed beside it.
_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}


def read_standard_library(max_bytes: int) -> bytes:
    """The sources of the standard library, one after another, cut at `max_bytes`."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in root.rglob("*.py") if not _INSTALLED & set(path.relative_to(root).parts)]
    parts, size = [], 0
    # By name, as directories are listed in an order of their own on every machine.
    for path in sorted(sources, key=lambda path: path.relative_to(root).as_posix()):
        if size >= max_bytes:
            break
        parts.append(path.read_bytes())
        size += len(parts[-1])
    if not parts:
        raise ValueError(f"no Python sources under {root}: this Python was installed without its standard library")
    return b"".join(parts)[:max_bytes]


class ByteSamples:
    """Samples of `seq_len` bytes, each with the byte that follows it: sample i begins at byte i * seq_len."""

    def __init__(self, text: bytes, seq_len: int) -> None:
        if len(text) <= seq_len:
            raise ValueError(f"{len(text)} bytes of text give no sample of {seq_len} + 1 bytes: give more text")
        self.seq_len = seq_len
        self.digest = hashlib.sha256(text).hexdigest()[:16]
        # A copy of their own, as tensors over `bytes` would be writable views of something that is not.
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self.seq_len

    def __getitem__(self, indices: Sequence[int]) -> torch.Tensor:
        """The samples of `indices`, int64, of shape (len(indices), seq_len + 1)."""
        starts = torch.as_tensor(indices, dtype=torch.int64) * self.seq_len
        return self._bytes[starts[:, None] + torch.arange(self.seq_len + 1)].to(torch.int64)
