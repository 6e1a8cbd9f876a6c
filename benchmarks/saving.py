"""Saving: against a raw stream of the same bytes, stock DCP, and Ray's recipe."""

from __future__ import annotations

import gc
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks import states
from benchmarks.measuring import Ratio, measure, ratio, seconds_of
from benchmarks.peers import (
    Contender,
    Ours,
    OursAtFirst,
    Place,
    RayRecipe,
    S3TorchConnector,
    StockLocal,
    StockPyarrow,
    StockS3fs,
    TorchSnapshot,
    fresh_directory,
)
from benchmarks.settings import Settings
from benchmarks.states import Size
from ray_stateful.storage.writer import DEFAULT_NUM_FILES
from ray_stateful.testing import run_ranks

Row = dict[str, Any]

_PART_BYTES = 4 << 20


class RawStream(Contender):
    """The bytes of the local shards and nothing else, into as many files at a time as we write.

    On this machine they are flushed to the disk, as ours are: the same promise.
    """

    name = "raw stream"
    is_synced = True

    def save(self, place: Place) -> None:
        filesystem = place.filesystem()
        if place.server is None:
            os.makedirs(place.directory, exist_ok=True)
        shards = [tensor.to_local() for tensor in states.tensors(self.model, self.optimizer)]
        with ThreadPoolExecutor(DEFAULT_NUM_FILES) as pool:
            for job in [
                pool.submit(self._write, filesystem, place, number, shards[number::DEFAULT_NUM_FILES])
                for number in range(DEFAULT_NUM_FILES)
            ]:
                job.result()
        dist.barrier()

    def _write(self, filesystem: Any, place: Place, number: int, shards: Sequence[Tensor]) -> None:
        path = posixpath.join(place.directory, f"raw_{dist.get_rank()}_{number}")
        with filesystem.open_output_stream(path, compression=None) as stream:
            for shard in shards:
                view = memoryview(shard.view(-1).numpy()).cast("B")
                for at in range(0, len(view), _PART_BYTES):
                    stream.write(view[at : at + _PART_BYTES])
        if self.is_synced and place.server is None:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def restore(self, place: Place) -> None:
        # A contender has both; it is among those that save alone.
        raise NotImplementedError("what was streamed has no names")


class UnsyncedStream(RawStream):
    """Into the page cache only."""

    name = "raw stream, not flushed"
    is_synced = False


LOCAL = (Ours, OursAtFirst, RawStream, UnsyncedStream, StockLocal, RayRecipe, TorchSnapshot)
REMOTE = (Ours, RawStream, StockPyarrow, StockS3fs, RayRecipe, S3TorchConnector)


def run(settings: Settings, place: Place, remote: Place) -> tuple[list[Row], list[Ratio]]:
    few, many, large = settings.sizes()
    rows = _measure(settings, few, place, LOCAL, (0,), settings.repeats + 2)
    rows += _measure(settings, many, place, (Ours, OursAtFirst, RawStream, StockLocal), (0,), 2)
    rows += _measure(settings, large, place, (Ours, RawStream, StockLocal, RayRecipe), (0,), 3)
    rows += _measure(settings, few, remote, REMOTE, (0, 30), settings.repeats)
    rows += _measure(settings, large, remote, (Ours, RawStream, RayRecipe), (0, 30), 2)
    return rows, _ratios(rows, few, many, large)


def _measure(
    settings: Settings,
    size: Size,
    place: Place,
    contenders: Sequence[type[Contender]],
    latencies_ms: Sequence[int],
    repeats: int,
) -> list[Row]:
    outcomes = run_ranks(
        settings.num_ranks,
        _save_all,
        size,
        place,
        contenders,
        latencies_ms,
        repeats,
        timeout_s=1200,
        collective_timeout_s=1200,
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    rows: list[Row] = outcomes[0]
    for row in rows:
        print(
            f"  {row['where']:<5} {row['latency_ms']:>3} ms  {row['size']:<24} {row['who']:<24}"
            f" {row['seconds']:8.2f} s  {row['state_bytes'] / row['seconds'] / 1e6:8.1f} MB/s"
            f"  {row['requests']:6d} requests  {row['peak_bytes'] / (1 << 20):7.1f} MiB a rank",
            flush=True,
        )
    return rows


def _save_all(
    size: Size, place: Place, contenders: Sequence[type[Contender]], latencies_ms: Sequence[int], repeats: int
) -> list[Row]:
    model, optimizer = states.build(size)
    there = [kind(model, optimizer) for kind in contenders if kind.is_there()]
    rows = []
    for contender in there:
        fresh_directory(place)
        contender.save(place.below("one"))
    for latency_ms in latencies_ms:
        if place.server is not None:
            place.server.set_latency(latency_ms)
        for repeat in range(repeats):
            for contender in there:
                fresh_directory(place)
                gc.collect()
                # What an earlier contender left for the disk to do is not this one's.
                os.sync()
                cost = measure(lambda c=contender: c.save(place.below("one")), place.server)  # type: ignore[misc]
                rows.append(
                    cost.row(
                        part="save",
                        who=contender.name,
                        where="local" if place.server is None else "s3",
                        latency_ms=latency_ms,
                        size=str(size),
                        repeat=repeat,
                        state_bytes=3 * 4 * sum(p.numel() for p in model.parameters()),
                    )
                )
    if place.server is not None:
        place.server.set_latency(0)
    fresh_directory(place)
    return rows


def _ratios(rows: list[Row], few: Size, many: Size, large: Size) -> list[Ratio]:
    def seconds(who: type[Contender], where: str, latency_ms: int = 0, size: Size = few) -> list[float]:
        return seconds_of(rows, who=who.name, where=where, latency_ms=latency_ms, size=str(size))

    found = [
        ratio("save.local.vs_raw_stream", seconds(RawStream, "local"), seconds(Ours, "local"), target=0.9),
        ratio("save.local.vs_raw_stream_unflushed", seconds(UnsyncedStream, "local"), seconds(Ours, "local")),
        ratio(
            "save.local.many_tensors.vs_raw_stream",
            seconds(RawStream, "local", size=many),
            seconds(Ours, "local", size=many),
        ),
        ratio(
            "save.local.large.vs_raw_stream",
            seconds(RawStream, "local", size=large),
            seconds(Ours, "local", size=large),
        ),
        ratio("save.local.vs_stock_dcp", seconds(StockLocal, "local"), seconds(Ours, "local")),
        ratio("save.local.vs_ray_recipe", seconds(RayRecipe, "local"), seconds(Ours, "local"), target=2),
        ratio("save.s3.vs_raw_stream", seconds(RawStream, "s3"), seconds(Ours, "s3"), target=0.9),
        ratio("save.s3_30ms.vs_raw_stream", seconds(RawStream, "s3", 30), seconds(Ours, "s3", 30)),
        ratio(
            "save.s3.large.vs_raw_stream",
            seconds(RawStream, "s3", size=large),
            seconds(Ours, "s3", size=large),
        ),
        ratio(
            "save.s3_30ms.large.vs_ray_recipe",
            seconds(RayRecipe, "s3", 30, large),
            seconds(Ours, "s3", 30, large),
        ),
        ratio("save.s3.vs_ray_recipe", seconds(RayRecipe, "s3"), seconds(Ours, "s3"), target=2),
        ratio("save.s3_30ms.vs_ray_recipe", seconds(RayRecipe, "s3", 30), seconds(Ours, "s3", 30), target=2),
    ]
    worst = min((r for r in found if r.name.endswith("vs_ray_recipe") and r.target), key=lambda r: r.value)
    return [*found, Ratio("save.vs_ray_recipe", worst.value, worst.low, worst.high, 2)]
