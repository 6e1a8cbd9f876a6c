"""What one call costs: seconds, bytes, requests, memory, over all ranks; and ratios of such costs."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.s3_server import S3Server


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one collective call.

    `seconds` are the slowest rank's. `bytes_read` and `requests` are what the server saw, or, for files of this
    machine, what the ranks' system calls moved. `peak_bytes` is the most that one rank's memory grew by.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    requests: int
    peak_bytes: int

    def row(self, **what: Any) -> dict[str, Any]:
        return {**what, **asdict(self)}


def measure(call: Callable[[], object], server: S3Server | None = None) -> Cost:
    """The cost of `call`, made on every rank; the same on every rank."""
    is_first = dist.get_rank() == 0
    dist.barrier()
    if is_first and server is not None:
        server.take_stats()
    before, resident = _io(), reset_peak()
    dist.barrier()
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    peak = memory_of("VmHWM") - resident
    after = _io()
    dist.barrier()
    moved = [after[name] - before[name] for name in ("rchar", "wchar", "syscr")]
    sums = _reduced(moved, dist.ReduceOp.SUM)
    most = _reduced([seconds, peak], dist.ReduceOp.MAX)
    if server is not None:
        stats: list[Any] = [server.take_stats() if is_first else None]
        dist.broadcast_object_list(stats)
        sums = [stats[0]["bytes_out"], stats[0]["bytes_in"], stats[0]["requests"]]
    return Cost(
        seconds=most[0],
        bytes_read=int(sums[0]),
        bytes_written=int(sums[1]),
        requests=int(sums[2]),
        peak_bytes=int(most[1]),
    )


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio, measured several times in one run: the middle, and the least and largest."""

    name: str
    value: float
    low: float
    high: float
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        wanted = ""
        if self.target is not None:
            wanted = f"  {'at most' if self.at_most else 'at least'} {self.target:g}: {'yes' if self.met else 'NO'}"
        return f"{self.name:<44} {self.value:8.3f}  ({self.low:.3f} .. {self.high:.3f}){wanted}"


def ratio(
    name: str,
    above: Sequence[float],
    below: Sequence[float],
    *,
    target: float | None = None,
    at_most: bool = False,
) -> Ratio:
    """`above` over `below`, pair by pair as they alternated; the last of a shorter list stands for those missing."""
    num_pairs = max(len(above), len(below))
    pairs = [above[min(i, len(above) - 1)] / below[min(i, len(below) - 1)] for i in range(num_pairs)]
    return Ratio(name, statistics.median(pairs), min(pairs), max(pairs), target, at_most)


def seconds_of(rows: Sequence[dict[str, Any]], **what: Any) -> list[float]:
    """The seconds of the rows that have all of `what`, in the order in which they were measured."""
    return [row["seconds"] for row in rows if all(row.get(name) == value for name, value in what.items())]


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*:\s*(.*)", file.read())
    with open("/proc/meminfo") as file:
        memory = re.search(r"MemTotal:\s*(\d+)", file.read())
    return {
        "cores": os.cpu_count(),
        "cpu": model[1] if model else "?",
        "memory_gb": round(int(memory[1]) / 1e6, 1) if memory else 0,
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def _reduced(values: list[float], how: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, how)
    return tensor.tolist()


def _io() -> dict[str, int]:
    with open("/proc/self/io") as file:
        return {name: int(value) for name, value in (line.split(": ") for line in file)}


def memory_of(name: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"{name}:\s*(\d+) kB", file.read())
    return int(found[1]) * 1024 if found else 0


def reset_peak() -> int:
    """Forget the highest memory so far; returns what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory_of("VmRSS")
