"""Pictures of losses over steps, with the number of workers that trained each step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from history import Point
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK, _QUIET = "#1b1b1b", "#8a8a8a"
_REFERENCE, _ELASTIC = "#9aa5b1", "#c2410c"
# Told apart also without colour: neighbouring bands differ in lightness.
_BANDS = {1: "#eef2f7", 2: "#dfe9f5", 3: "#c9dbef", 4: "#b3cde9"}


def bands(points: Sequence[Point]) -> list[tuple[int, int, int]]:
    """Runs of steps with one number of workers: (first step, last step, workers)."""
    groups = [list(group) for _, group in groupby(points, key=lambda point: point.world_size)]
    return [(group[0].step, group[-1].step, group[0].world_size) for group in groups]


def draw(
    path: Path,
    elastic: Sequence[Point],
    reference: Sequence[Point],
    *,
    interruptions: Sequence[tuple[int, int, str]] = (),
    tolerance: float | None = None,
) -> None:
    """Draw the losses of an elastic run over those of an uninterrupted one, and below them how far they are apart.

    Args:
        interruptions: The step that each went back to, the step it had reached, and what happened.
        tolerance: The largest difference that a changed order of additions explains.
    """
    # Without pyplot: there may be no screen, and nobody has to close the figure.
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes in (top, bottom):
        _quiet(axes)
        for first, last, world_size in bands(elastic):
            axes.axvspan(first - 0.5, last + 0.5, color=_BANDS.get(world_size, "#f5f5f5"), lw=0)
    for first, last, world_size in bands(elastic):
        words = f"{world_size} worker" + ("s" if world_size != 1 else "")
        top.text((first + last) / 2, 1.01, words, transform=top.get_xaxis_transform(), ha="center", color=_INK)

    steps = [point.step for point in reference]
    label = f"uninterrupted, {reference[0].world_size} workers" if reference[0].world_size != 1 else "uninterrupted"
    top.plot(steps, [point.loss for point in reference], color=_REFERENCE, lw=4.5, label=label, solid_capstyle="round")
    top.plot([p.step for p in elastic], [p.loss for p in elastic], color=_ELASTIC, lw=1.4, label="elastic")
    # A label takes up to this many steps: one that would run into the one before it stands below that.
    width, height, free_from = 0.2 * max(steps), 0.97, 0.0
    for went_back_to, reached, what in interruptions:
        height, free_from = (0.97 if went_back_to >= free_from else height - 0.11), went_back_to + width
        top.axvline(went_back_to + 0.5, color=_QUIET, lw=0.8, ls=":")
        num_lost = reached - went_back_to
        words = f"{what}\n{num_lost} step{'' if num_lost == 1 else 's'} trained again"
        top.text(
            went_back_to + 0.9, height, words, transform=top.get_xaxis_transform(), va="top", fontsize=8, color=_INK
        )
    top.set_ylabel("loss, nats per byte")
    top.legend(frameon=False, loc="lower left")

    apart = {point.step: point.loss for point in reference}
    shared = [point for point in elastic if point.step in apart]
    differences = [abs(point.loss - apart[point.step]) for point in shared]
    # Below this, differences are drawn on the floor: equal losses have no logarithm.
    floor = 1e-9
    bottom.semilogy([p.step for p in shared], [max(d, floor) for d in differences], color=_ELASTIC, lw=1.2)
    if tolerance is not None:
        bottom.axhline(tolerance, color=_QUIET, lw=0.8, ls="--")
        bottom.text(1, tolerance / 2, "tolerance", fontsize=8, color=_INK, va="top")
    bottom.set_ylabel("difference")
    bottom.set_ylim(bottom=floor / 2)
    bottom.set_xlabel("step")
    bottom.set_xlim(0.5, max(point.step for point in [*elastic, *reference]) + 0.5)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)


def _quiet(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
