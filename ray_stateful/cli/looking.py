"""Commands that look and change nothing: ls, inspect, verify, diff, plan."""

from __future__ import annotations

from typing import Any

import click

from ray_stateful import listing, restore_cost, verify
from ray_stateful.cli import tree
from ray_stateful.cli.main import EXIT_FINDINGS
from ray_stateful.cli.places import open_checkpoint, open_run, place, refuse_missing_bucket
from ray_stateful.cli.rendering import age, as_json, finite, meter, say, size, table
from ray_stateful.cli.tree import Summary
from ray_stateful.storage.credentials import without_credentials

json_option = click.option("--json", "json_", is_flag=True, help="Print JSON instead of text.")


@click.command("ls")
@click.argument("run")
@json_option
def ls_(run: str, json_: bool) -> None:
    """List the checkpoints of RUN, the newest last."""
    found = open_run(run)
    entries = listing.entries(found.storage, found.path, found.known_to_ray())
    if json_:
        as_json(
            {
                "run": without_credentials(run),
                "checkpoints": [{**_fields(entry), "orphan": entry.is_orphan} for entry in entries],
            }
        )
        return
    if not entries:
        say(f"{found.uri} has no checkpoints of this package")
        return
    rows = [
        (
            entry.name,
            f"{entry.step:,}",
            age(entry.created_s),
            size(entry.num_bytes),
            str(entry.world_size or "-"),
            "yes" if entry.committed else "no",
            {True: "yes", False: "no", None: "-"}[entry.known_to_ray],
            entry.problem or ("orphan" if entry.is_orphan else ""),
        )
        for entry in entries
    ]
    table(("CHECKPOINT", "STEP", "AGE", "SIZE", "WORKERS", "COMMITTED", "RAY", ""), rows, right=(1, 2, 3, 4))


@click.command("inspect")
@click.argument("checkpoint")
@click.argument("key", required=False)
@click.option("--tree", "as_tree", is_flag=True, help="Show the keys as a tree.")
@json_option
def inspect_(checkpoint: str, key: str | None, as_tree: bool, json_: bool) -> None:
    """Show what CHECKPOINT holds; with KEY, that entry or all below it, and where its bytes are."""
    _, opened = open_checkpoint(checkpoint)
    summaries = tree.summaries(opened, key)
    if json_:
        manifest = opened.manifest
        head = {} if manifest is None else {k: v for k, v in _fields(manifest).items() if k != "files"}
        as_json(
            {
                "checkpoint": without_credentials(checkpoint),
                **head,
                "entries": [_fields(summary) for summary in summaries],
            }
        )
        return
    for line in tree.heading(opened, without_credentials(checkpoint)):
        say(line)
    say("")
    if as_tree:
        for line in tree.lines(summaries):
            say(line)
    else:
        table(("KEY", "DTYPE", "SHAPE", "SIZE", "CHUNKS", "WRITTEN BY"), [_row(one) for one in summaries], right=(3,))
    if key is not None and len(summaries) == 1:
        for line in tree.chunk_lines(opened, summaries[0]):
            say(line)


@click.command("verify")
@click.argument("checkpoint")
@click.option("--full", is_flag=True, help="Read every byte, and compare it with its checksum.")
@json_option
@click.pass_context
def verify_(ctx: click.Context, checkpoint: str, full: bool, json_: bool) -> None:
    """Check CHECKPOINT: manifest, index and the sizes of its files; with --full, every byte. Exit code 1 if damaged."""
    storage, path = place(checkpoint)
    sizes = storage.sizes(path)
    if not sizes:
        refuse_missing_bucket(storage, path)
    with meter("verify", sum(sizes.values()) if full else 0) as progress:
        result = verify.verify(storage, path, full=full, progress=progress)
    if json_:
        # Without checksums nobody knows whether it is intact.
        intact = None if result.unverifiable else True
        as_json({**_fields(result), "intact": False if result.findings else intact})
    else:
        for finding in result.findings:
            say(str(finding))
        say(f"{path}: {_verdict(result)}")
    if result.findings:
        ctx.exit(EXIT_FINDINGS)


def _verdict(result: verify.Verification) -> str:
    found = f"{len(result.findings)} finding(s)"
    if result.unverifiable is not None:
        opened = "every item was opened" if result.full else "the metadata was read, and no item"
        return f"{found if result.findings else 'nothing found'}; {opened}: {result.unverifiable}"
    if result.full and result.num_bytes:
        looked = f"every byte of {result.num_files} files ({size(result.num_bytes)})"
    else:
        looked = f"manifest, index and the sizes of {result.num_files} files"
    return f"{found if result.findings else 'intact'}; checked {looked}"


@click.command("diff")
@click.argument("first")
@click.argument("second")
@json_option
@click.pass_context
def diff_(ctx: click.Context, first: str, second: str, json_: bool) -> None:
    """Compare checkpoints FIRST and SECOND, entry by entry. Exit code 1 if they differ."""
    (first_storage, a), (second_storage, b) = open_checkpoint(first), open_checkpoint(second)
    from ray_stateful import diff

    total = sum(chunk.num_bytes for chunks in a.chunks.values() for chunk in chunks if chunk.dtype is not None)
    with meter("compare", total) as progress:
        result = diff.diff(first_storage, a, second_storage, b, progress=progress)
    if json_:
        tensors = [
            {**_fields(t), "max_absolute": finite(t.max_absolute), "max_relative": finite(t.max_relative)}
            for t in result.tensors
        ]
        as_json({**_fields(result), "tensors": tensors, "equal": result.is_empty})
    else:
        for side, keys in ((first, result.only_in_first), (second, result.only_in_second)):
            for key in keys:
                say(f"only in {without_credentials(side)}: {key}")
        for changed in result.changed:
            say(f"{changed.key}: {changed.first} became {changed.second}")
        for key in result.values:
            say(f"{key}: the values differ")
        if result.tensors:
            table(
                ("TENSOR", "DIFFERENT", "MAX ABSOLUTE", "MAX RELATIVE"),
                [
                    (
                        t.key,
                        f"{t.num_different:,} of {t.num_elements:,}",
                        f"{t.max_absolute:.3g}",
                        f"{t.max_relative:.3g}",
                    )
                    for t in result.tensors
                ],
                right=(1, 2, 3),
            )
        say(f"{result.num_equal} entries are equal, bit for bit")
    if not result.is_empty:
        ctx.exit(EXIT_FINDINGS)


@click.command("plan")
@click.argument("checkpoint")
@click.option("--workers", required=True, type=click.IntRange(min=1), help="How many workers would restore it.")
@json_option
def plan_(checkpoint: str, workers: int, json_: bool) -> None:
    """Say what each of --workers would read of CHECKPOINT, with every tensor sharded along its first dim (FSDP)."""
    _, opened = open_checkpoint(checkpoint)
    costs = restore_cost.costs(opened, workers)
    read, wanted = sum(cost.bytes_read for cost in costs), sum(cost.bytes_wanted for cost in costs)
    if json_:
        where, ranks = without_credentials(checkpoint), list(map(_fields, costs))
        as_json({"checkpoint": where, "workers": workers, "bytes_read": read, "ranks": ranks})
        return
    table(
        ("RANK", "NEEDS", "READS", "REQUESTS"),
        [(str(c.rank), size(c.bytes_wanted), size(c.bytes_read), f"{c.num_requests:,}") for c in costs],
        right=(0, 1, 2, 3),
    )
    requests = sum(cost.num_requests for cost in costs)
    # Heads of stock items that lie close together are read in one request: only reading tells how many do.
    most = "" if opened.manifest else "at most "
    say(
        f"{most}{size(read)} in {requests:,} requests, {read / max(1, wanted):.2f}x of what is needed; in addition,"
        " rank 0 reads the manifest and index for all ranks"
    )


def _row(one: Summary) -> tuple[str, ...]:
    return one.key, one.dtype or "value", one.shape_text, size(one.num_bytes), one.chunks_text, one.writers_text


def _fields(value: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(value)
