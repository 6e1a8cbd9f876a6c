"""The list of attacks, and what they are made with.

An attack is a function that gets a `Workshop`, changes the checkpoint in it (or writes another there) and returns
nothing. `attempt.py` then restores from it, and expects a refusal.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_stateful.format import index, layout
from ray_stateful.format.checksums import checksum
from ray_stateful.format.rows import StoredChunk

_MODULES = (
    "archives",
    "files",
    "foreign_metadata",
    "indexes",
    "items",
    "manifests",
    "pickles",
    "structures",
    "typed_values",
    "weights",
)

# What code on load would do: leave this file in the checkpoint's run.
CANARY = "canary"


@dataclass(frozen=True)
class Attack:
    """One entry of the corpus.

    `foreign`: it is a plain DCP directory, without a manifest of ours. `initial`: it is a directory of safetensors,
    which a run begins from. `late`: it can be found out only by reading the bytes of tensors, when others, which were
    checked, may be filled already.
    """

    name: str
    tries: str
    run: Callable[[Any], None]
    foreign: bool
    late: bool
    initial: bool = False


_attacks: dict[str, Attack] = {}


def attack(
    function: Callable[[Any], None] | None = None, *, foreign: bool = False, late: bool = False, initial: bool = False
) -> Any:
    """Add a function to the corpus."""
    if function is None:
        return functools.partial(attack, foreign=foreign, late=late, initial=initial)
    assert function.__doc__, f"{function.__name__} does not say what it tries"
    assert function.__name__ not in _attacks, f"two attacks are called {function.__name__}"
    tries = " ".join(function.__doc__.split())
    _attacks[function.__name__] = Attack(function.__name__, tries, function, foreign, late, initial)
    return function


def all_attacks() -> dict[str, Attack]:
    """Every attack by name."""
    for module in _MODULES:
        importlib.import_module(f"attacks.{module}")
    return dict(sorted(_attacks.items()))


@dataclass(frozen=True)
class Workshop:
    """An intact checkpoint in `directory`, which an attacker may change as they like, checksums included."""

    directory: Path

    @property
    def canary(self) -> Path:
        return self.directory.parent / CANARY

    def rows(self) -> list[StoredChunk]:
        sizes = {path.name: path.stat().st_size for path in self.directory.iterdir()}
        return index.from_bytes((self.directory / layout.INDEX).read_bytes(), "workshop", sizes)

    def row(self, of: str, /, **changes: Any) -> None:
        """Change the fields of the rows of an entry."""
        rows = self.rows()
        assert any(row.key == of for row in rows), of
        self.write_rows([dataclasses.replace(row, **changes) if row.key == of else row for row in rows])

    def add(self, like: str, /, **changes: Any) -> None:
        """Add a row like that of an entry."""
        rows = self.rows()
        first = next(row for row in rows if row.key == like)
        self.write_rows([*rows, dataclasses.replace(first, **changes)])

    def write_rows(self, rows: list[StoredChunk]) -> None:
        self.write(layout.INDEX, index.to_bytes(rows))

    def table(self) -> pa.Table:
        return pa.ipc.open_stream((self.directory / layout.INDEX).read_bytes()).read_all()

    def write_table(self, table: pa.Table, **options: Any) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, **options) as writer:
            writer.write_table(table)
        self.write(layout.INDEX, sink.getvalue().to_pybytes())

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, and have the manifest vouch for it."""
        (self.directory / name).write_bytes(data)
        self.manifest(lambda body: body["files"].update({name: {"size": len(data), "xxh3": checksum(data)}}))

    def manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the manifest, and have it vouch for itself."""
        body = json.loads((self.directory / layout.MANIFEST).read_bytes())
        body.pop("checksum", None)
        change(body)
        self.write_manifest(body)

    def write_manifest(self, body: dict[str, Any]) -> None:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        data = json.dumps({**body, "checksum": checksum(text.encode())}).encode()
        (self.directory / layout.MANIFEST).write_bytes(data)

    def item_file(self) -> str:
        return next(row.file for row in self.rows() if row.key == "thing.weights")
