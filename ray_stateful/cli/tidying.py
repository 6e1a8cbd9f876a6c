"""The one command that deletes: gc."""

from __future__ import annotations

import dataclasses
import re

import click

from ray_stateful import orphans
from ray_stateful.cli.looking import json_option
from ray_stateful.cli.main import EXIT_FINDINGS
from ray_stateful.cli.places import open_run
from ray_stateful.cli.rendering import age, as_json, say, size, table

_DURATION = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>s|min|h|d)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[float]):
    """`90min`, `24h`, `7d`, `30s`; in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a duration; write 30s, 90min, 24h or 7d", param, ctx)
        return float(match["number"]) * _SECONDS[match["unit"]]


@click.command("gc")
@click.argument("run")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option(
    "--older-than",
    type=Duration(),
    default="24h",
    show_default=True,
    help="Minimum time since anything in the directory last changed.",
)
@json_option
@click.pass_context
def gc_(ctx: click.Context, run: str, dry_run: bool, older_than: float, json_: bool) -> None:
    """Delete the orphans of RUN: directories of checkpoints that were never committed and that Ray does not count.

    Nothing else is ever deleted, and never the newest. Choose --older-than well above the time one save takes: an
    object can't be seen while it is being uploaded. Exit code 1 if some orphan could not be deleted.
    """
    found = open_run(run)
    gone = orphans.find(found, older_than_s=older_than)
    kept: dict[str, str] = {}
    if not dry_run:
        gone, kept = orphans.delete(found, gone)
    if json_:
        found_orphans = [dataclasses.asdict(one) for one in gone]
        as_json({"run": found.uri, "dry_run": dry_run, "orphans": found_orphans, "kept": kept})
    else:
        if gone:
            rows = [(one.name, age(one.changed_s), size(one.num_bytes), str(one.num_files)) for one in gone]
            table(("ORPHAN", "AGE", "SIZE", "FILES"), rows, right=(1, 2, 3))
        for name, why in kept.items():
            say(f"kept {name}: {why}")
        verb = "would be deleted" if dry_run else "deleted"
        say(f"{len(gone)} orphan(s) {verb}, {size(sum(one.num_bytes for one in gone))}")
    if kept:
        ctx.exit(EXIT_FINDINGS)
