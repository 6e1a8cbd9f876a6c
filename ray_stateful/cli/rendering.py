"""Results as text for a person, or as JSON for a program. Text goes to standard output without colours."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ray_stateful.printable import printable

MAX_CELL_LENGTH = 512

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def say(text: str, *, err: bool = False) -> None:
    """Print a line. Keys and values come from strangers: what would instruct the terminal is shown as text."""
    click.echo(printable(text, keep=""), err=err)


def as_json(value: Any) -> None:
    """Print `value`, a dataclass or something that contains some, as one JSON object."""
    click.echo(json.dumps(value, default=_plain, indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def finite(number: float) -> float | None:
    """A number that JSON has; `None` for an infinite one."""
    return number if abs(number) != float("inf") else None


def size(num_bytes: int) -> str:
    """Bytes in units of a thousand, three digits."""
    number, unit = float(num_bytes), 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{num_bytes} B" if unit == 0 else f"{number:.3g} {_UNITS[unit]}"


def age(since_s: float | None, now_s: float | None = None) -> str:
    """The time since `since_s`, in its largest unit."""
    if since_s is None:
        return "-"
    seconds = max(0.0, (time.time() if now_s is None else now_s) - since_s)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print columns, wide enough for what is in them; those at `right` are numbers, and aligned to the right."""
    # Shortened: a key may be a megabyte long, and every line is padded to the widest.
    lines = [list(header), *([_shortened(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


def _shortened(cell: str) -> str:
    half = MAX_CELL_LENGTH // 2
    return cell if len(cell) <= MAX_CELL_LENGTH else f"{cell[:half]}...{cell[-half:]}"


class Meter:
    """Counts the bytes done so far, with or without showing them."""

    def __init__(self, update: Any = None) -> None:
        self._update = update

    def __call__(self, num_bytes: int) -> None:
        if self._update is not None:
            self._update(num_bytes)


@contextmanager
def meter(doing: str, total_bytes: int) -> Iterator[Meter]:
    """A progress bar on standard error, if that is a terminal."""
    # `None` if standard error was closed.
    if sys.stderr is None or not sys.stderr.isatty():
        yield Meter()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=total_bytes)
        yield Meter(lambda num_bytes: progress.advance(task, num_bytes))
