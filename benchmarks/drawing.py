"""Pictures of what was measured: every ratio beside its target, and the seconds behind them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any


def draw(content: dict[str, Any], results: Path) -> None:
    """`ratios.png`, and `restore.png` and `save.png` where there are rows."""
    import matplotlib

    matplotlib.use("agg")
    _ratios(content, results / "ratios.png")
    for part in ("restore", "save"):
        rows = [row for row in content["rows"] if row["part"] == part]
        if part == "restore":
            rows = [row for row in rows if (row["saved"], row["now"]) == (4, 4)]
        if rows:
            _seconds(rows, part, results / f"{part}.png")
    planning = [row for row in content["rows"] if row["part"] == "planning"]
    if planning:
        _planning(planning, results / "planning.png")


def _ratios(content: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    names = [name for name in content["ratios"] if name in content["targets"]]
    if not names:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(names) + 1.2), layout="constrained")
    for number, name in enumerate(names):
        target, at_most = content["targets"][name]
        # 1 is the target, and to the right of it is better, whichever way the ratio counts.
        scaled = [value / target for value in (content["ratios"][name], *content["spread"][name])]
        middle, low, high = (1 / value for value in scaled) if at_most else scaled
        color = "tab:green" if middle >= 1 else "tab:red"
        axes.plot([low, high], [number, number], color=color, linewidth=3, alpha=0.4)
        axes.plot(middle, number, "o", color=color)
        sign = "≤" if at_most else "≥"
        axes.annotate(
            f"{content['ratios'][name]:.3g} ({sign} {target:g})", (middle, number), (6, 5), textcoords="offset points"
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("how far on the good side of its target")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _seconds(rows: list[dict[str, Any]], part: str, path: Path) -> None:
    from matplotlib import pyplot

    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        where = "disk" if row["where"] == "local" else f"S3, {row['latency_ms']} ms"
        groups[f"{where}\n{row['size']}"][row["who"]].append(row["seconds"])
    figure, all_axes = pyplot.subplots(
        len(groups), figsize=(8, 1.0 + sum(0.3 * len(g) + 0.5 for g in groups.values())), layout="constrained",
        squeeze=False, gridspec_kw={"height_ratios": [len(group) + 1 for group in groups.values()]},
    )  # fmt: skip
    for axes, (title, group) in zip(all_axes[:, 0], groups.items(), strict=True):
        for number, (who, seconds) in enumerate(group.items()):
            middle = statistics.median(seconds)
            color = "tab:blue" if who == "ours" else "tab:gray"
            error = [[middle - min(seconds)], [max(seconds) - middle]]
            axes.barh(number, middle, xerr=error, color=color, height=0.7)
            axes.annotate(f" {middle:.2f} s", (max(seconds), number), va="center", fontsize=8)
        axes.set_yticks(range(len(group)), group, fontsize=8)
        axes.set_ylabel(title, fontsize=8, rotation=0, ha="right")
        axes.yaxis.set_label_coords(-0.3, 0.5)
        axes.invert_yaxis()
        axes.margins(x=0.15)
    figure.suptitle(f"{part}: seconds, the middle and the spread")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _planning(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    ranks = [row["num_ranks"] for row in rows]
    axes.plot(ranks, [row["cold_s"] for row in rows], "o-", label="first save, on rank 0")
    axes.plot(ranks, [row["warm_s"] for row in rows], "o-", label="later saves, on every rank")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.set_xlabel("ranks")
    axes.set_ylabel("seconds of planning, 70B parameters")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
