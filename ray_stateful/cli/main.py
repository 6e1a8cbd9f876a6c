"""The group of commands, and what a person is told when one of them fails: one line, and no traceback."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from typing import Any

import click

from ray_stateful.cli.explain import explain
from ray_stateful.cli.rendering import say
from ray_stateful.errors import CheckpointError

EXIT_FINDINGS = 1
EXIT_ERROR = 2
# What a shell reports for a process that a signal ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

# Imported only when run: `diff` needs torch, and `inspect` should finish in less time than it takes to import that.
_COMMANDS = {
    "diff": "looking",
    "export": "moving",
    "gc": "tidying",
    "import": "moving",
    "inspect": "looking",
    "ls": "looking",
    "plan": "looking",
    "verify": "looking",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"ray_stateful.cli.{_COMMANDS[name]}")
        command: click.Command = getattr(module, f"{name}_")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # `| head` has read enough. click would end with 1, which says that something was found.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is flushed at the exit is to find no broken pipe
            ctx.exit(EXIT_BROKEN_PIPE)
        except KeyboardInterrupt:
            say("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        # The errors that commands raise on purpose, those of storage, and those of arguments that do not fit together.
        # Any other is a bug of ours, and needs its traceback.
        except (CheckpointError, OSError, ValueError) as error:
            say(f"error: {explain(error)}", err=True)
            ctx.exit(EXIT_ERROR)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ray-stateful")
def main() -> None:
    """Look at, check, compare and convert the checkpoints of a run.

    A RUN is the directory <storage_path>/<run name>, a CHECKPOINT a directory in it: a path, or a URI (s3://, gs://,
    abfss://) with the query that pyarrow takes (?region=... or ?endpoint_override=...). Nothing is ever unpickled.

    Exit codes: 0 if all is well, 1 if something was found, 2 if the command could not do its work, 130 if it was
    interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
