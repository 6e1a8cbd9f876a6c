"""Commands that write a checkpoint in another form: export, import."""

from __future__ import annotations

import dataclasses
import re

import click

from ray_stateful.cli.looking import json_option
from ray_stateful.cli.places import open_checkpoint, place
from ray_stateful.cli.rendering import as_json, meter, say, size
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.layout import MAX_STEP
from ray_stateful.storage.credentials import without_credentials

_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?", re.IGNORECASE)


class ByteSize(click.ParamType[int]):
    """`5GB`, `500MB`, `2GiB`, or a number of bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size; write 5GB, 500MB or a number of bytes", param, ctx)
        base = 1024 if match["binary"] else 1000
        power = " KMGT".index(match["unit"].upper() or " ")
        return max(1, int(float(match["number"]) * base**power))


@click.command("export")
@click.argument("checkpoint")
@click.argument("out")
@click.option("--format", "format_", type=click.Choice(["safetensors", "torch", "dcp"]), required=True)
@click.option("--part", help="Which part of the state: by default `model` for safetensors, and all of them otherwise.")
@click.option("--dtype", type=click.Choice(sorted(ITEM_BYTES)), help="Cast floating-point tensors to this.")
@click.option(
    "--max-file-size", type=ByteSize(), default="5GB", show_default=True, help="Largest size of one safetensors file."
)
@click.option("--adapter", is_flag=True, help="The adapter alone, as adapter_model.safetensors, for PEFT.")
@click.option("--drop-tied", is_flag=True, help="Leave out an output head that equals the embedding.")
@json_option
def export_(
    checkpoint: str,
    out: str,
    format_: str,
    part: str | None,
    dtype: str | None,
    max_file_size: int,
    adapter: bool,
    drop_tied: bool,
    json_: bool,
) -> None:
    """Write CHECKPOINT to OUT: a directory for safetensors and dcp, a file for torch."""
    if format_ != "safetensors" and (adapter or drop_tied):
        raise click.UsageError("--adapter and --drop-tied are for --format safetensors")
    if format_ == "dcp" and dtype is not None:
        raise click.UsageError("--dtype casts for --format safetensors and torch; dcp copies the files as they are")
    storage, opened = open_checkpoint(checkpoint)
    out_storage, out_path = place(out)
    from ray_stateful import export, export_torch

    if part is not None or format_ == "safetensors":
        part = export.part_to_export(opened, part)
    total = sum(c.num_bytes for chunks in opened.chunks.values() for c in chunks if part in (None, c.path[0]))
    with meter("export", total) as progress:
        if format_ == "safetensors":
            assert part is not None
            chosen = export.select(opened, part, adapter_only=adapter, drop_tied=drop_tied)
            result = export.to_safetensors(
                storage,
                opened,
                out_storage,
                out_path,
                chosen,
                dtype=dtype,
                max_file_bytes=max_file_size,
                progress=progress,
            )
        elif format_ == "torch":
            result = export_torch.to_torch(storage, opened, out_storage, out_path, part, dtype=dtype, progress=progress)
        else:
            result = export.to_dcp(storage, opened, out_storage, out_path, part, progress=progress)
    out = without_credentials(out)
    if json_:
        as_json({"out": out, **dataclasses.asdict(result)})
        return
    say(f"{out}: {result.num_tensors:,} tensors, {size(result.num_bytes)} in {len(result.files)} file(s)")
    for key, why in sorted(result.left_out.items()):
        say(f"  left out: {key}: {why}")
    for note in result.notes:
        say(f"  note: {note}")


@click.command("import")
@click.argument("source")
@click.argument("run")
@click.option(
    "--part", default="model", show_default=True, help="Name of the part that weights without a part name become."
)
@click.option(
    "--step", type=click.IntRange(0, MAX_STEP), help="Steps they were trained for: by default, as SOURCE says, or 0."
)
@json_option
def import_(source: str, run: str, part: str, step: int | None, json_: bool) -> None:
    """Make SOURCE (safetensors in the Hugging Face layout, a DCP directory, or a checkpoint) the first one of RUN."""
    storage, path = place(source)
    run_storage, run_path = place(run)
    from ray_stateful import importing

    found = importing.find(storage, path, part)
    with meter("import", found.num_bytes) as progress:
        result = importing.import_checkpoint(found, run_storage, run_path, step=step, progress=progress)
    if json_:
        as_json(dataclasses.asdict(result))
        return
    checked = "" if result.verified else "; the source has no checksums, so what was read could not be verified"
    say(f"{result.path}: {result.num_entries:,} entries, {size(result.num_bytes)}{checked}")
