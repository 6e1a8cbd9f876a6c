"""On a CUDA device: what a background save stops training for, against the raw copy of the same bytes to pinned memory.

One process, one device, NCCL. Without a device there is nothing to measure, and the command says so.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import states
from benchmarks.measuring import Ratio, ratio, seconds_of
from benchmarks.peers import Place, fresh_directory
from benchmarks.settings import Settings
from benchmarks.states import Size
from ray_stateful import Checkpointer, ModelState, OptimizerState

Row = dict[str, Any]

# What a device holds, rather than what a host of the other measurements does.
_TIMES_LARGE = 8


def run(settings: Settings, place: Place) -> tuple[list[Row], list[Ratio]]:
    if not torch.cuda.is_available():
        print("  no CUDA device: nothing is measured", flush=True)
        return [], []
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    large = settings.sizes()[2]
    try:
        # Beside the copy of a gigabyte, which takes 20 to 40 ms, it is the state dicts that count.
        rows = [
            row
            for size in (large, replace(large, num_bytes=_TIMES_LARGE * large.num_bytes))
            for row in _stalls(settings, size, place)
        ]
    finally:
        dist.destroy_process_group()
    for row in rows:
        print(
            f"  {row['what']:<24} {row['seconds'] * 1e3:8.1f} ms  {row['bytes'] / row['seconds'] / 1e9:8.2f} GB/s",
            flush=True,
        )
    small, full = dict.fromkeys(row["size"] for row in rows)

    def against_copy(name: str, what: str, size: str, target: float | None = None) -> Ratio:
        copies = seconds_of(rows, what="raw pinned copy", size=size)
        return ratio(name, seconds_of(rows, what=what, size=size), copies, target=target, at_most=True)

    # The host is free before the device is: what stops a training is that its next step may not write yet.
    return rows, [
        against_copy("gpu.stall_vs_pinned_copy", "stall", full, 1.2),
        against_copy("gpu.stall_vs_pinned_copy.small", "stall", small),
        against_copy("gpu.host_stall_vs_pinned_copy", "stall of the host", full),
    ]


def _stalls(settings: Settings, size: Size, place: Place) -> list[Row]:
    """Seconds until the host goes on, and until the training stream may write again; and of the raw copy, alone."""
    fresh_directory(place)
    model, optimizer = states.build(size, "cuda")
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    shards = [tensor.to_local() for tensor in states.tensors(model, optimizer)]
    buffers = [torch.empty(shard.shape, dtype=shard.dtype, pin_memory=True) for shard in shards]
    num_bytes = sum(shard.nbytes for shard in shards)
    rows: list[Row] = []
    with Checkpointer(state, background=True, at_end=False, run=place.uri) as checkpointer:
        for repeat in range(2 * settings.repeats + 1):
            checkpointer.request_save()
            torch.cuda.synchronize()
            began = time.perf_counter()
            checkpointer.step()
            host_s = time.perf_counter() - began
            torch.cuda.current_stream().synchronize()
            stall_s = time.perf_counter() - began
            # Alone: what is written meanwhile would slow the copy down, and make the stall look good.
            checkpointer.wait()
            # One takes as much of the disk as the state; the next save needs none of them.
            fresh_directory(place)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for shard, buffer in zip(shards, buffers, strict=True):
                buffer.copy_(shard, non_blocking=True)
            torch.cuda.synchronize()
            copy_s = time.perf_counter() - began
            # The first save plans, and pins its buffers.
            if repeat > 0:
                rows += [
                    {
                        "part": "gpu",
                        "what": what,
                        "size": str(size),
                        "seconds": seconds,
                        "bytes": num_bytes,
                        "repeat": repeat - 1,
                    }
                    for what, seconds in (
                        ("stall", stall_s),
                        ("stall of the host", host_s),
                        ("raw pinned copy", copy_s),
                    )
                ]
    return rows
