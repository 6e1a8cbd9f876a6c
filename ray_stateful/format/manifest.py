"""The manifest: what a checkpoint consists of. Written last; its presence is the commit, and nothing else is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint, UnknownFormat
from ray_stateful.format.checksums import checksum
from ray_stateful.format.layout import DCP_METADATA, FORMAT_VERSION, INDEX, is_item_file
from ray_stateful.format.strict_json import strict_json

MAX_BYTES = 2**62
MAX_FILES = 1 << 20
MAX_TEXT_LENGTH = 4095
_MIN_ENTRY_BYTES = 16  # less than any file's entry has


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of the checkpoint: its size in bytes, and the xxh3-64 of its content as 16 hex digits."""

    size: int
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    `step` counts optimizer steps completed and `samples` the samples trained when it was saved; `created_s` is in
    seconds since 1970. `parts` are the names of the state's parts; `mesh` describes the device meshes seen in it
    (axis names to sizes).
    """

    step: int
    samples: int
    world_size: int
    attempt: str
    parts: tuple[str, ...]
    files: Mapping[str, StoredFile]
    mesh: tuple[Mapping[str, int], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    created_s: float = 0.0
    format: int = FORMAT_VERSION

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, the manifest itself left out."""
        return sum(file.size for file in self.files.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes, by its name."""
        return {name: file.size for name, file in self.files.items()}

    def to_json(self) -> bytes:
        """The bytes of the manifest file. Its last entry is a checksum of all the others, which proves it intact."""
        body = asdict(self)
        return json.dumps({**body, "checksum": _checksum_of(body)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Read a manifest file.

        Raises:
            DamagedCheckpoint: it is cut short, or its checksum does not match its content.
            UnknownFormat: it has a newer or unknown format, or states none.
            HostileCheckpoint: an entry is malformed, or names a file that no writer of ours would.
        """
        try:
            body = strict_json(data, _MIN_ENTRY_BYTES)
        except ValueError as error:
            raise DamagedCheckpoint(where, f"the manifest can't be read: {error}") from error
        if not isinstance(body, dict) or type(body.get("format")) is not int:
            raise UnknownFormat(where, "the manifest says nothing of its format")
        if body["format"] != FORMAT_VERSION:
            raise UnknownFormat(
                where,
                f"format {body['format']}; this version reads format {FORMAT_VERSION}: "
                + ("install a newer ray-stateful" if body["format"] > FORMAT_VERSION else "no such format exists"),
            )
        stated = body.pop("checksum", None)
        try:
            found = _checksum_of(body)
        except RecursionError:
            raise DamagedCheckpoint(where, "the manifest is nested without end") from None
        if stated != found:
            raise DamagedCheckpoint(where, "the manifest's checksum is not that of its content")
        return _checked(cls, body, where)


def _checked(cls: type[Manifest], body: dict[str, Any], where: str) -> Manifest:
    def refuse(found: str) -> HostileCheckpoint:
        return HostileCheckpoint(where, f"manifest: {found}")

    if set(body) != set(cls.__slots__):
        raise refuse(f"its entries are {sorted(body)}, not {sorted(cls.__slots__)}")
    for name, least in (("step", 0), ("samples", 0), ("world_size", 1)):
        if type(body[name]) is not int or not least <= body[name] < 2**63:
            raise refuse(f"{name} is {body[name]!r}")
    if type(body["created_s"]) is not float or not math.isfinite(body["created_s"]):
        raise refuse(f"created_s is {body['created_s']!r}")
    if not _strings([body["attempt"]]) or not isinstance(body["parts"], list) or not _strings(body["parts"]):
        raise refuse("attempt and parts are not strings")
    if not isinstance(body["versions"], dict) or not _strings(body["versions"].values()):
        raise refuse("versions are not strings")
    if not isinstance(body["mesh"], list) or not all(_is_mesh(mesh) for mesh in body["mesh"]):
        raise refuse("mesh is not a list of axis names and sizes")
    if not isinstance(body["files"], dict) or INDEX not in body["files"] or len(body["files"]) > MAX_FILES:
        raise refuse("its files have no index, or are too many")
    files: dict[str, StoredFile] = {}
    num_bytes = 0
    for name, entry in body["files"].items():
        if name not in (INDEX, DCP_METADATA) and not is_item_file(name):
            raise refuse(f"file {name!r} is not one that a checkpoint has")
        if not isinstance(entry, dict) or set(entry) != {"size", "xxh3"} or not _strings([entry["xxh3"]]):
            raise refuse(f"entry of file {name!r} is not its size and checksum")
        if type(entry["size"]) is not int or not 0 <= entry["size"] <= MAX_BYTES:
            raise refuse(f"file {name!r} has size {entry['size']!r}")
        # A restore counts the bytes of all files together, in 64 bits.
        num_bytes += entry["size"]
        if num_bytes > MAX_BYTES:
            raise refuse(f"its files have more than {MAX_BYTES:,} bytes together")
        files[name] = StoredFile(**entry)
    return cls(**{**body, "files": files, "parts": tuple(body["parts"]), "mesh": tuple(body["mesh"])})


def _checksum_of(body: Mapping[str, Any]) -> str:
    return checksum(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _strings(values: Any) -> bool:
    return all(type(value) is str and len(value) <= MAX_TEXT_LENGTH for value in values)


def _is_mesh(mesh: Any) -> bool:
    return isinstance(mesh, dict) and all(type(size) is int and size > 0 for size in mesh.values())
