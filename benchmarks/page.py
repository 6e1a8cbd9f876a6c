"""`python -m benchmarks.page`: puts what was measured into the tables of docs/performance.md.

Between two comments, `<!-- measured: NAME -->` and `<!-- end -->`, the page is made from `results/latest.json`; a test
holds that it says nothing else.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results" / "latest.json"

Content = dict[str, Any]

# "A / ours" above 1 means that ours is faster.
WORDS = {
    "restore.read_amplification.max": "tensor bytes read on restore / bytes this world needs, the worst N → M",
    "restore.read_amplification.few_tensors": "the same, 306 tensors",
    "restore.read_amplification.many_tensors": "the same, 3,006 tensors, 4 → 4",
    "restore.read_amplification.many_tensors_resized": "the same, 3,006 tensors, on another number of workers",
    "restore.read_amplification_with_index.max": "the same with manifest, index and listings, 306 tensors",
    "restore.peak_extra_memory_mb.max": "peak extra host memory on restore, MB a rank",
    "restore.s3_30ms.vs_stock_dcp_pyarrow": "restore, S3 at 30 ms: stock DCP over pyarrow / ours",
    "restore.s3_30ms.vs_stock_dcp_s3fs": "restore, S3 at 30 ms: stock DCP over s3fs / ours",
    "restore.s3_30ms.vs_ray_recipe": "restore, S3 at 30 ms: Ray's recipe, one download for four ranks / ours",
    "restore.s3_30ms.vs_ray_recipe_a_node_each": "restore, S3 at 30 ms: Ray's recipe, a download for each rank / ours",
    "restore.s3_30ms.vs_s3torchconnector": "restore, S3 at 30 ms: s3torchconnector / ours",
    "restore.s3_30ms.large.vs_stock_dcp_s3fs": "restore of 1 GB, S3 at 30 ms: stock DCP over s3fs / ours",
    "restore.s3_30ms.large.vs_ray_recipe": "restore of 1 GB, S3 at 30 ms: Ray's recipe, one download / ours",
    "restore.s3_30ms.large.vs_ray_recipe_a_node_each": "the same with a download for each rank",
    "restore.local.vs_stock_dcp": "restore, disk: stock DCP / ours",
    "save.local.vs_raw_stream": "save, disk: raw stream, flushed / ours",
    "save.local.vs_raw_stream_unflushed": "save, disk: raw stream, not flushed / ours",
    "save.local.large.vs_raw_stream": "save of 1 GB, disk: raw stream, flushed / ours",
    "save.local.many_tensors.vs_raw_stream": "save of 3,006 tensors, disk: raw stream, flushed / ours",
    "save.s3.vs_raw_stream": "save, S3: raw stream / ours",
    "save.s3.large.vs_raw_stream": "save of 1 GB, S3: raw stream / ours",
    "save.s3_30ms.vs_raw_stream": "save, S3 at 30 ms: raw stream / ours",
    "save.local.vs_stock_dcp": "save, disk: stock DCP / ours",
    "save.local.vs_ray_recipe": "save, disk: Ray's recipe / ours",
    "save.s3.vs_ray_recipe": "save, S3: Ray's recipe / ours",
    "save.s3_30ms.vs_ray_recipe": "save, S3 at 30 ms: Ray's recipe / ours",
    "save.s3_30ms.large.vs_ray_recipe": "save of 1 GB, S3 at 30 ms: Ray's recipe / ours",
    "save.vs_ray_recipe": "save, the least of those with a target",
    "background.stall_vs_copy": "stall of a background save / one memory copy, 1 GB",
    "background.stall_vs_copy.small": "the same, 0.25 GB",
    "background.throughput": "steps a second with background saves / without, host waiting for a device",
    "background.throughput_on_busy_cores": "the same, training computing on every core",
    "background.python_steps.thread": "speed of steps in Python while a thread saves / undisturbed",
    "background.python_steps.process": "the same while another process saves",
    "gpu.stall_vs_pinned_copy": "stall of a background save / raw copy to pinned memory, on a device",
    "gpu.stall_vs_pinned_copy.small": "the same, 1 GB instead of 8",
    "gpu.host_stall_vs_pinned_copy": "the stall of the host alone, 8 GB",
    "planning.warm_vs_cold": "planning, 1024 ranks: first save / later saves",
    "planning.warm_growth_with_ranks": "planning, later saves: 1024 ranks / 64 ranks",
    "planning.warm_bytes_a_rank": "planning, later saves: bytes sent a rank",
    "checksums.vs_memory_copy": "checksums (by block and by file) / one memory copy of the same bytes",
    "checksums.save_price": "save of 1 GB, disk, with checksums / without them",
    "checksums.restore_price": "restore of 1 GB, disk, with checksums / without them",
}


def main() -> None:
    content = json.loads(RESULTS.read_text())
    PAGE.write_text(filled(PAGE.read_text(), content))
    print(f"{PAGE} says what {RESULTS} has")


def filled(page: str, content: Content) -> str:
    """The page with what was measured in the places for it."""

    def place(match: re.Match[str]) -> str:
        return f"{match[1]}\n{_TABLES[match[2]](content)}\n{match[3]}"

    return re.sub(r"(<!-- measured: (\w+) -->)\n.*?\n?(<!-- end -->)", place, page, flags=re.DOTALL)


def _targets(content: Content) -> str:
    lines = ["| what | target | measured | | command |", "|---|---|---|---|---|"]
    for name, words in WORDS.items():
        if name not in content["ratios"]:
            continue
        value, (low, high) = content["ratios"][name], content["spread"][name]
        target, verdict = "none set", ""
        if name in content["targets"]:
            limit, at_most = content["targets"][name]
            target = f"{'≤' if at_most else '≥'} {limit:g}"
            verdict = "met" if (value <= limit if at_most else value >= limit) else "**missed**"
        part = name.partition(".")[0]
        measured = f"{_number(value)} ({_number(low)} .. {_number(high)})"
        lines.append(f"| {words} | {target} | {measured} | {verdict} | `python -m benchmarks {part}` |")
    return "\n".join(lines)


def _machine(content: Content) -> str:
    about = content["machine"]
    return (
        f"Measured on {about['cores']} cores ({about['cpu']}), {about['memory_gb']:g} GB, torch {about['torch']}; load"
        f" average {about['load_before']:.1f} before and {about['load_after']:.1f} after it."
    )


def _limits(content: Content) -> str:
    rates: dict[str, list[float]] = {}
    for row in content["rows"]:
        if row["part"] == "limits" and row["bytes"]:
            rates.setdefault(row["what"], []).append(row["bytes"] / row["seconds"] / 1e6)
    said = [f"{what} {min(found):,.0f} to {max(found):,.0f} MB/s" for what, found in rates.items()]
    return "With plain sockets and files, in the same run: " + "; ".join(said) + "."


def _resizes(content: Content) -> str:
    rows = [row for row in content["rows"] if row["part"] == "restore" and row["size"] == _usual_size(content)]
    lines = [
        "| N → M | where | ours: bytes read | requests | seconds | peak, MiB a rank | stock: bytes read | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault((row["saved"], row["now"], row["where"], row["latency_ms"]), []).append(row)
    for (saved, now, where, latency_ms), here in sorted(places.items(), key=lambda place: place[0]):
        ours, stock = ([r for r in here if r["who"] == who] for who in ("ours", "stock DCP"))
        if not ours:
            continue
        cells = [
            f"{saved} → {now}",
            "disk" if where == "local" else f"S3, {latency_ms} ms",
            f"{max(r['bytes_read'] / r['bytes_needed'] for r in ours):.3f}x",
            f"{max(r['requests'] for r in ours):,}",
            f"{statistics.median(r['seconds'] for r in ours):.2f}",
            f"{max(r['peak_bytes'] for r in ours) / (1 << 20):.0f}",
            f"{max(r['bytes_read'] / r['bytes_needed'] for r in stock):.2f}x" if stock else "",
            f"{statistics.median(r['seconds'] for r in stock):.2f}" if stock else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _planning(content: Content) -> str:
    lines = [
        "| ranks | first plan, rank 0 | sent | later plans, each rank | sent | first commit, rank 0 | later commits"
        " | index | opened in | and memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['num_ranks']:,} | {row['cold_s']:.0f} s | {row['cold_bytes'] / 1e6:,.0f} MB"
        f" | {row['warm_s'] * 1e3:.0f} ms | {row['warm_bytes']:,} B"
        f" | {row['commit_s']:.0f} s | {row['commit_again_s']:.1f} s | {row['index_bytes'] / 1e6:,.0f} MB"
        f" | {row['open_s']:.1f} s | {row['open_peak_bytes'] / 1e6:,.0f} MB |"
        for row in content["rows"]
        if row["part"] == "planning"
    ]
    return "\n".join(lines)


def _usual_size(content: Content) -> str:
    """The size at which every change of the number of workers was measured."""
    return next(row["size"] for row in content["rows"] if row["part"] == "restore" and row["saved"] != row["now"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


_TABLES: dict[str, Callable[[Content], str]] = {
    "limits": _limits,
    "machine": _machine,
    "planning": _planning,
    "resizes": _resizes,
    "targets": _targets,
}


if __name__ == "__main__":
    main()
