"""Restoring: bytes, requests, memory and seconds, by way of every contender, on as many workers and on others."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from benchmarks import states
from benchmarks.measuring import Ratio, measure, ratio, seconds_of
from benchmarks.peers import (
    Contender,
    Ours,
    Place,
    RayRecipe,
    RayRecipeApart,
    S3TorchConnector,
    StockLocal,
    StockPyarrow,
    StockS3fs,
    TorchSnapshot,
    fresh_directory,
)
from benchmarks.settings import Settings
from benchmarks.states import Size
from ray_stateful.testing import run_ranks

Row = dict[str, Any]

RESIZES = ((4, 4), (4, 2), (2, 4), (1, 4), (4, 3))
LOCAL = (Ours, StockLocal, TorchSnapshot)
# Who reads stock files reads those that `StockPyarrow` wrote.
REMOTE = (Ours, StockS3fs, RayRecipe, RayRecipeApart, S3TorchConnector)
VERY_SLOW = (StockPyarrow,)

_MIB = 1 << 20


def run(settings: Settings, place: Place, remote: Place) -> tuple[list[Row], list[Ratio]]:
    rows: list[Row] = []
    few, many, large = settings.sizes()
    # 1. What is read, for every change of the number of workers.
    for saved, now in RESIZES:
        rows += _pair(saved, now, few, place, LOCAL, (0,), settings.repeats)
        rows += _pair(saved, now, few, remote, REMOTE if (saved, now) == (4, 4) else LOCAL[:1], (0, 10, 30), 1)
    # 2. Many small tensors, and a large state.
    for saved, now in RESIZES:
        rows += _pair(saved, now, many, place, LOCAL, (0,), 1)
    rows += _pair(4, 4, large, place, LOCAL, (0,), 1)
    # 3. Against the peers, at the latency of an object store; the slowest once.
    rows += _pair(4, 4, few, remote, (*REMOTE, *VERY_SLOW), (30,), settings.repeats)
    rows += _pair(4, 4, large, remote, REMOTE, (30,), 2)
    return rows, _ratios(rows, few, many, large)


def _pair(
    saved: int,
    now: int,
    size: Size,
    place: Place,
    contenders: Sequence[type[Contender]],
    latencies_ms: Sequence[int],
    repeats: int,
) -> list[Row]:
    _raise(run_ranks(saved, _save_all, size, place, contenders, timeout_s=600, collective_timeout_s=600))
    outcomes = run_ranks(
        now,
        _restore_all,
        saved,
        size,
        place,
        contenders,
        latencies_ms,
        repeats,
        timeout_s=1500,
        collective_timeout_s=1500,
    )
    _raise(outcomes)
    rows: list[Row] = outcomes[0]
    for row in rows:
        print(
            f"  {row['saved']} -> {row['now']}  {row['where']:<5} {row['latency_ms']:>3} ms  {row['size']:<24} "
            f"{row['who']:<24} {row['seconds']:8.2f} s  {row['bytes_read'] / 1e6:8.1f} MB read"
            f"  {row['bytes_read'] / row['bytes_needed']:5.2f}x  {row['requests']:6d} requests"
            f"  {row['peak_bytes'] / _MIB:7.1f} MiB a rank",
            flush=True,
        )
    return rows


def _save_all(size: Size, place: Place, contenders: Sequence[type[Contender]]) -> None:
    if place.server is not None:
        place.server.set_latency(0)
    model, optimizer = states.build(size)
    fresh_directory(place)
    Ours(model, optimizer).save(place.below("ours"))
    if any(issubclass(kind, StockLocal) for kind in contenders):
        stock = StockLocal if place.server is None else StockPyarrow
        stock(model, optimizer).save(place.below("stock"))
    if TorchSnapshot in contenders and TorchSnapshot.is_there():
        TorchSnapshot(model, optimizer).save(place.below("torchsnapshot"))


def _restore_all(
    saved: int,
    size: Size,
    place: Place,
    contenders: Sequence[type[Contender]],
    latencies_ms: Sequence[int],
    repeats: int,
) -> list[Row]:
    model, optimizer = states.build(size)
    resized = saved != dist.get_world_size()
    there = [
        kind(model, optimizer)
        for kind in contenders
        if kind.is_there() and not (resized and issubclass(kind, TorchSnapshot))
    ]
    rows = []
    # Once without being measured: imports, connections, and whether it is right.
    for contender in there:
        if not isinstance(contender, VERY_SLOW):
            states.clear(model, optimizer)
            contender.restore(_where(contender, place))
            states.check(model, optimizer)
    for latency_ms in latencies_ms:
        if place.server is not None:
            place.server.set_latency(latency_ms)
        for repeat in range(repeats):
            for contender in there:
                if isinstance(contender, VERY_SLOW) and repeat > 0:
                    continue
                states.clear(model, optimizer)
                gc.collect()
                cost = measure(lambda c=contender: c.restore(_where(c, place)), place.server)  # type: ignore[misc]
                states.check(model, optimizer)
                report = getattr(contender, "report", None)
                rows.append(
                    cost.row(
                        part="restore",
                        who=contender.name,
                        where="local" if place.server is None else "s3",
                        latency_ms=latency_ms,
                        saved=saved,
                        now=dist.get_world_size(),
                        size=str(size),
                        repeat=repeat,
                        bytes_needed=3 * 4 * sum(p.numel() for p in model.parameters()),
                        tensor_bytes_read=None if report is None else report.statistics.bytes_read,
                        tensor_bytes_needed=None if report is None else report.statistics.bytes_wanted,
                    )
                )
    if place.server is not None:
        place.server.set_latency(0)
    return rows


def _most(name: str, found: list[float], target: float | None = None) -> Ratio:
    return Ratio(name, max(found), min(found), max(found), target, at_most=True)


def _where(contender: Contender, place: Place) -> Place:
    return place.below("stock" if isinstance(contender, StockLocal) else contender.name)


def _raise(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def _ratios(rows: list[Row], few: Size, many: Size, large: Size) -> list[Ratio]:
    ours = [row for row in rows if row["who"] == Ours.name]
    read = [row["tensor_bytes_read"] / row["tensor_bytes_needed"] for row in ours]
    read_at = {
        (str(size), resized): [
            row["tensor_bytes_read"] / row["tensor_bytes_needed"]
            for row in ours
            if row["size"] == str(size) and (row["saved"] != row["now"]) == resized
        ]
        for size in (few, many)
        for resized in (False, True)
    }
    all_read = [row["bytes_read"] / row["bytes_needed"] for row in ours if row["where"] == "s3"]
    peaks = [row["peak_bytes"] / 1e6 for row in ours]
    at = {"part": "restore", "where": "s3", "latency_ms": 30, "saved": 4, "now": 4}
    found = [
        _most("restore.read_amplification.max", read, 1.02),
        _most("restore.read_amplification.few_tensors", read_at[str(few), False] + read_at[str(few), True], 1.02),
        _most("restore.read_amplification.many_tensors", read_at[str(many), False]),
        _most("restore.read_amplification.many_tensors_resized", read_at[str(many), True]),
        _most("restore.read_amplification_with_index.max", all_read),
        _most("restore.peak_extra_memory_mb.max", peaks, 256),
    ]
    for name, kind, size, target in (
        ("restore.s3_30ms.vs_stock_dcp_pyarrow", StockPyarrow, few, 50),
        ("restore.s3_30ms.vs_stock_dcp_s3fs", StockS3fs, few, 10),
        ("restore.s3_30ms.vs_ray_recipe", RayRecipe, few, 3),
        ("restore.s3_30ms.vs_ray_recipe_a_node_each", RayRecipeApart, few, None),
        ("restore.s3_30ms.vs_s3torchconnector", S3TorchConnector, few, None),
        ("restore.s3_30ms.large.vs_stock_dcp_s3fs", StockS3fs, large, None),
        ("restore.s3_30ms.large.vs_ray_recipe", RayRecipe, large, None),
        ("restore.s3_30ms.large.vs_ray_recipe_a_node_each", RayRecipeApart, large, None),
    ):
        theirs = seconds_of(rows, **at, who=kind.name, size=str(size))
        if theirs:
            mine = seconds_of(rows, **at, who=Ours.name, size=str(size))
            found.append(ratio(name, theirs, mine, target=target))
    local = {"part": "restore", "where": "local", "saved": 4, "now": 4, "size": str(few)}
    found.append(
        ratio(
            "restore.local.vs_stock_dcp",
            seconds_of(rows, **local, who=StockLocal.name),
            seconds_of(rows, **local, who=Ours.name),
        )
    )
    return found
