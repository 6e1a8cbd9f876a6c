"""What checksums cost: beside one memory copy of the same bytes, and of a save and a restore, by leaving them out."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from benchmarks import states
from benchmarks.measuring import Ratio, measure, ratio, seconds_of
from benchmarks.peers import Contender, Ours, Place, fresh_directory
from benchmarks.settings import Settings
from benchmarks.states import Size
from ray_stateful.format.checksums import CHECKSUM_BYTES, RunningChecksum, block_bytes_for, block_checksums, num_blocks
from ray_stateful.storage import reading, writer
from ray_stateful.testing import run_ranks

Row = dict[str, Any]

_PART_BYTES = 4 << 20


class Unchecked(Ours):
    """Ours, but nothing is hashed: what is saved like this can be restored like this alone."""

    name = "ours without checksums"

    def save(self, place: Place) -> None:
        with _no_checksums():
            super().save(place)

    def restore(self, place: Place) -> None:
        with _no_checksums():
            super().restore(place)


class _NoChecksum:
    def update(self, data: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 16


@contextmanager
def _no_checksums() -> Iterator[None]:
    with ExitStack() as patches:
        patches.enter_context(patch.object(writer, "RunningChecksum", _NoChecksum))
        patches.enter_context(patch.object(writer, "block_checksums", _zeros))
        patches.enter_context(patch.object(reading, "verify_blocks", lambda *_: None))
        yield


def _zeros(data: Any, block_bytes: int) -> bytes:
    return bytes(CHECKSUM_BYTES * num_blocks(memoryview(data).nbytes, block_bytes))


def run(settings: Settings, place: Place) -> tuple[list[Row], list[Ratio]]:
    few, _, large = settings.sizes()
    (hashed,) = run_ranks(1, _hash, few, timeout_s=300)
    costs, *_ = outcomes = run_ranks(
        settings.num_ranks, _alternate, large, place, 5 * settings.repeats, timeout_s=600, collective_timeout_s=600
    )
    for outcome in (hashed, *outcomes):
        if isinstance(outcome, BaseException):
            raise outcome
    rows: list[Row] = [*hashed, *costs]
    for row in rows:
        speed = row["bytes"] / row["seconds"] / 1e9
        print(f"  {row['what']:<8} {row.get('who', ''):<24} {row['seconds']:8.3f} s {speed:8.2f} GB/s", flush=True)

    def seconds(what: str, who: type[Contender]) -> list[float]:
        return seconds_of(rows, what=what, who=who.name)

    return rows, [
        ratio("checksums.vs_memory_copy", seconds_of(rows, what="hash"), seconds_of(rows, what="copy")),
        *(
            ratio(f"checksums.{what}_price", seconds(what, Ours), seconds(what, Unchecked), target=1.1, at_most=True)
            for what in ("save", "restore")
        ),
    ]


def _alternate(size: Size, place: Place, repeats: int) -> list[Row]:
    """Saves and restores with checksums and without, in turn, of what was saved with them."""
    model, optimizer = states.build(size)
    both = [kind(model, optimizer) for kind in (Ours, Unchecked)]
    num_bytes = 3 * 4 * sum(p.numel() for p in model.parameters())
    rows = []
    fresh_directory(place)
    for number, contender in enumerate(both):
        contender.save(place.below(f"saved {number}"))
    # One more: the second save of a structure is the first that plans nothing.
    kept = place.below("kept")
    both[0].save(kept)
    both[0].restore(kept)
    for repeat in range(repeats):
        for what in ("save", "restore"):
            # Whoever comes after a save finds the machine in another state than who comes after a restore.
            for number in (0, 1) if repeat % 2 else (1, 0):
                contender = both[number]
                if what == "save" and dist.get_rank() == 0:
                    place.below(f"saved {number}").clear()
                gc.collect()
                # What was written before is not this one's to flush.
                os.sync()
                call, where = (
                    (contender.save, place.below(f"saved {number}")) if what == "save" else (contender.restore, kept)
                )
                cost = measure(lambda call=call, where=where: call(where))  # type: ignore[misc]
                rows.append(cost.row(part="checksums", what=what, who=contender.name, bytes=num_bytes, repeat=repeat))
    fresh_directory(place)
    return rows


def _hash(size: Size) -> list[Row]:
    model, optimizer = states.build(size)
    shards = [tensor.to_local() for tensor in states.tensors(model, optimizer)]
    copies = [shard.clone() for shard in shards]
    num_bytes = sum(shard.nbytes for shard in shards)
    rows = []
    for repeat in range(3):
        began = time.perf_counter()
        whole = RunningChecksum()
        for shard in shards:
            view = memoryview(shard.view(-1).numpy()).cast("B")
            for at in range(0, len(view), _PART_BYTES):
                part = view[at : at + _PART_BYTES]
                whole.update(part)
                block_checksums(part, block_bytes_for(dist.get_world_size() * len(view)))
        middle = time.perf_counter()
        for shard, copy in zip(shards, copies, strict=True):
            copy.copy_(shard)
        ended = time.perf_counter()
        for what, seconds in (("hash", middle - began), ("copy", ended - middle)):
            rows.append({"part": "checksums", "what": what, "seconds": seconds, "bytes": num_bytes, "repeat": repeat})
    return rows
