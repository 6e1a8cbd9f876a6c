"""Verifies that a file is, byte for byte, what was written. In bounded memory; no torch."""

from __future__ import annotations

from ray_stateful.errors import DamagedCheckpoint
from ray_stateful.format.checksums import RunningChecksum
from ray_stateful.format.manifest import StoredFile
from ray_stateful.storage.base import Storage

_PART_BYTES = 8 << 20


def verify_file(storage: Storage, path: str, expected: StoredFile) -> None:
    """Read the file at `path` whole and compare its size and checksum with the manifest's.

    Raises:
        DamagedCheckpoint: the file is missing or cut short, or its checksum is different.
    """
    found, offset = RunningChecksum(), 0
    while offset < expected.size:
        try:
            data = storage.read(path, offset, min(_PART_BYTES, expected.size - offset))
        except FileNotFoundError as error:
            raise DamagedCheckpoint(path, "the file is missing") from error
        if not data:
            raise DamagedCheckpoint(path, f"ends after {offset:,} bytes; {expected.size:,} were written")
        found.update(data)
        offset += len(data)
    if found.hexdigest() != expected.xxh3:
        raise DamagedCheckpoint(path, "its checksum is not the one in the manifest")
