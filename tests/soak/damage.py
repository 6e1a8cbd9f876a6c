"""Damages checkpoints in every way that storage does, and restores from them: `python -m tests.soak.damage`.

A run has two checkpoints, steps 1 and 2. Each mutation changes files of the second; then a restore into freshly built
objects either gives the state of step 2, bit for bit (the mutation was harmless: it hit what no reader looks at), or
that of step 1 (it was detected), or an error of this package. Anything else is a wrong value, and ends the run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ray_stateful import checkpoint
from ray_stateful.errors import CheckpointError
from ray_stateful.states.part import Reconciled, StrictPart

DAMAGED_STEP, OLDER_STEP = 2, 1


class Model(StrictPart):
    """Tensors of several dtypes, whose keys are known."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def load_state_dict(self, value: dict[str, torch.Tensor]) -> None:
        self.tensors = dict(value)

    def reconcile(self, missing: frozenset[str], unexpected: frozenset[str]) -> Reconciled:
        return Reconciled(problems=tuple(sorted(missing | unexpected)))


class Free:
    """Whatever it was given."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


def state_of(seed: int) -> dict[str, Any]:
    """A state of the same shapes for each seed, and other values: stale files fit in all but their content."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "large": torch.randn(300, 70, generator=generator),
        "small": torch.randn(5, generator=generator),
        "narrow": torch.randn(64, 33, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "mask": torch.rand(77, generator=generator) > 0.5,
        "many": torch.randint(0, 1 << 40, (9, 9, 9), generator=generator),
    }
    value = {
        "step": seed,
        "groups": [{"lr": 0.1 / seed, "exp_avg": torch.randn(40, generator=generator), "betas": (0.9, 0.99)}],
        "milestones": {10 * seed: "a", 20 * seed: "b"},
        "text": f"seed {seed}",
    }
    return {"model": Model(tensors), "rest": Free(value)}


def fresh_state() -> dict[str, Any]:
    filled = state_of(99)["model"].tensors
    return {"model": Model({key: torch.zeros_like(tensor) for key, tensor in filled.items()}), "rest": Free()}


def snapshot(state: dict[str, Any]) -> bytes:
    """The whole state, exactly: equal if, and only if, it is equal bit for bit and type for type."""
    return b"\n".join(_exact((state["model"].tensors, state["rest"].value), "state"))


def _exact(value: Any, where: str) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{where} {value.dtype} {tuple(value.shape)} ".encode()
        yield value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        yield f"{where} {type(value)} {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield from _exact(value[key], f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        yield f"{where} {type(value)} {len(value)}".encode()
        for number, item in enumerate(value):
            yield from _exact(item, f"{where}[{number}]")
    else:
        yield f"{where} {type(value)} {value!r}".encode()


class Damage:
    """Mutations of the files in `directory`; `other` is another checkpoint of the same run, with the same shapes."""

    def __init__(self, directory: Path, other: Path, chance: random.Random) -> None:
        self.directory, self.other, self.chance = directory, other, chance

    def apply(self) -> str:
        kinds: list[Callable[[], str]] = [
            *[self.flip] * 8,
            *[self.zero] * 2,
            *[self.swap_blocks] * 2,
            self.truncate,
            self.extend,
            self.delete,
            self.empty,
            self.swap_files,
            self.take_file,
            self.take_files,
            self.take_piece,
            self.add_stale,
            self.rewrite_json,
        ]
        return self.chance.choice(kinds)()

    def _file(self) -> Path:
        return self.chance.choice(sorted(path for path in self.directory.iterdir() if path.stat().st_size))

    def _change(self, change: Callable[[bytearray], None]) -> Path:
        path = self._file()
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return path

    def flip(self) -> str:
        """One to three bits."""

        def change(data: bytearray) -> None:
            for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
                data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)

        return f"flip {self._change(change).name}"

    def zero(self) -> str:
        """A hole: what a disk leaves that lost a write."""

        def change(data: bytearray) -> None:
            start = self.chance.randrange(len(data))
            stop = min(len(data), start + self.chance.choice((1, 512, 4096, 65536)))
            data[start:stop] = bytes(stop - start)

        return f"zero {self._change(change).name}"

    def swap_blocks(self) -> str:
        """Two stretches of a file change places."""

        def change(data: bytearray) -> None:
            size = min(self.chance.choice((1, 8, 512, 1024, 4096)), len(data) // 2)
            first, second = sorted(self.chance.sample(range(len(data) - size + 1), 2))
            if size and second - first >= size:
                data[first : first + size], data[second : second + size] = (
                    data[second : second + size],
                    data[first : first + size],
                )

        return f"swap blocks {self._change(change).name}"

    def truncate(self) -> str:
        """The end is missing."""

        def change(data: bytearray) -> None:
            del data[self.chance.randrange(len(data)) :]

        return f"truncate {self._change(change).name}"

    def extend(self) -> str:
        """There is more than was written."""

        def change(data: bytearray) -> None:
            data += os.urandom(self.chance.choice((1, 100, 10_000)))

        return f"extend {self._change(change).name}"

    def delete(self) -> str:
        """A file is gone."""
        path = self._file()
        path.unlink()
        return f"delete {path.name}"

    def empty(self) -> str:
        """A file has no content."""
        path = self._file()
        path.write_bytes(b"")
        return f"empty {path.name}"

    def swap_files(self) -> str:
        """Two files have each other's name."""
        first, second = self.chance.sample(sorted(self.directory.iterdir()), 2)
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
        return f"swap files {first.name}, {second.name}"

    def take_file(self) -> str:
        """One file is that of another checkpoint: same name, often the same size."""
        path = self.chance.choice(sorted(self.other.iterdir()))
        shutil.copyfile(path, self.directory / path.name)
        return f"take file {path.name}"

    def take_files(self) -> str:
        """Several files are those of another checkpoint; all of them, at times."""
        paths = sorted(self.other.iterdir())
        taken = self.chance.sample(paths, self.chance.randint(2, len(paths)))
        for path in taken:
            shutil.copyfile(path, self.directory / path.name)
        return f"take {len(taken)} files"

    def take_piece(self) -> str:
        """A stretch of a file is that of another checkpoint."""
        path = self._file()
        other = self.other / path.name
        if not other.exists():
            return "take nothing"
        data, theirs = bytearray(path.read_bytes()), other.read_bytes()
        start = self.chance.randrange(len(data))
        stop = min(len(data), len(theirs), start + self.chance.choice((8, 512, 4096, 65536)))
        data[start:stop] = theirs[start:stop]
        path.write_bytes(data)
        return f"take piece {path.name}"

    def add_stale(self) -> str:
        """A file of a world of another size lies there too."""
        path = self.chance.choice(sorted(self.other.glob("*.distcp")))
        name = f"__{self.chance.randint(2, 9)}_{self.chance.randint(0, 3)}.distcp"
        shutil.copyfile(path, self.directory / name)
        if self.chance.random() < 0.3:
            (self.directory / "__0.metadata").write_bytes(os.urandom(100))
        return f"add stale {path.suffix}"

    def rewrite_json(self) -> str:
        """A field of the manifest has another value."""
        path = self.directory / "manifest.json"
        body = json.loads(path.read_bytes())
        key = self.chance.choice(sorted(body))
        body[key] = self.chance.choice((None, 0, -1, 2, "", "x", [], {}, 1e400, body[self.chance.choice(sorted(body))]))
        path.write_bytes(json.dumps(body, indent=1).encode())
        return f"rewrite json {key}"


def run(num_mutations: int, seed: int, num_checkpoints: int = 8) -> Counter[str]:
    """Make the mutations; returns how often each kind had each outcome.

    Raises:
        AssertionError: a restore gave neither of the two states, or an error that is not ours.
    """
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    expected = {step: snapshot(state_of(step)) for step in (OLDER_STEP, DAMAGED_STEP)}
    with tempfile.TemporaryDirectory(prefix="damage-") as scratch:
        for number in range(num_checkpoints):
            # Several: files of one rank may be laid out in one or in several, and other things lie next to each other.
            directory = Path(scratch) / f"run{number}"
            names = {
                step: checkpoint.save(state_of(step), step=step, run=str(directory), num_files=1 + number % 3).name
                for step in (OLDER_STEP, DAMAGED_STEP)
            }
            intact = Path(scratch) / f"intact{number}"
            shutil.copytree(directory / names[DAMAGED_STEP], intact)
            for at in range(number * num_mutations // num_checkpoints, (number + 1) * num_mutations // num_checkpoints):
                damaged = directory / names[DAMAGED_STEP]
                what = Damage(damaged, directory / names[OLDER_STEP], chance).apply()
                outcome = _outcome(directory, expected, f"mutation {at} of seed {seed}: {what}")
                counts[f"{re.sub(r'__[0-9]+_[0-9]+[.]distcp', 'items', what)}: {outcome}"] += 1
                shutil.rmtree(damaged)
                shutil.copytree(intact, damaged)
    return counts


def _outcome(directory: Path, expected: dict[int, bytes], what: str) -> str:
    state = fresh_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            report = checkpoint.restore(state, run=str(directory))
    except CheckpointError as error:
        return f"refused with {type(error).__name__}"
    assert report is not None, f"{what}: started from scratch"
    assert snapshot(state) == expected[report.step], f"{what}: wrong values loaded"
    return "detected" if report.step == OLDER_STEP else "harmless"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    # Here, where the process ends with it: each mutation that is found says so.
    logging.getLogger("ray_stateful").setLevel(logging.ERROR)
    began = time.monotonic()
    counts = run(given.mutations, given.seed)
    totals: Counter[str] = Counter()
    for name, count in sorted(counts.items()):
        totals[name.rpartition(": ")[2]] += count
        print(f"{count:7,}  {name}")
    print(f"{sum(counts.values()):,} mutations in {time.monotonic() - began:.0f} s: {dict(totals)}; wrong values: 0")


if __name__ == "__main__":
    sys.exit(main())
