"""Commands on pages, with what they print: run while the page is built, against a run in an S3 server.

`{transcript}` shows text, `{screenshot}` a picture of a terminal. The body of both is commands, one a line, so that a
reader of the source has at least those. A command must end with exit code 0, or with the one it names: `# exits 1`.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from contextlib import ExitStack, chdir
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import example_run
from click.testing import CliRunner
from docutils import nodes
from rich.console import Console
from rich.text import Text
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from ray_stateful.cli.main import main
from tests import servers

RUN = "s3://bucket/runs/first"
# Commands see a clock that is so far ahead: an age in hours is the same in each build.
AHEAD_S = 2 * 3600.0

_EXITS = re.compile(r"\s*# exits (?P<code>[0-9]+)$")
_WIDTH = 130


class Workshop:
    """A server with the run on it, made when the first command is run; and a directory for what commands write."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._directory: str | None = None

    def run(self, line: str) -> str:
        """What a command prints.

        Raises:
            ValueError: it ended with another exit code than it was expected to.
        """
        if self._directory is None:
            self._directory = self._set_up()
        expected = _EXITS.search(line)
        words = shlex.split(line, comments=True)
        if words[0] != "ray-stateful":
            raise ValueError(f"{line!r} is no command of this package")
        ahead = SimpleNamespace(time=lambda: time.time() + AHEAD_S)
        with (
            chdir(self._directory),
            mock.patch("ray_stateful.cli.rendering.time", ahead),
            mock.patch("ray_stateful.orphans.time", ahead),
            mock.patch("ray_stateful.importing.secrets", SimpleNamespace(token_hex=lambda num_bytes: "04be5a")),
        ):
            result = CliRunner().invoke(main, words[1:], prog_name=words[0])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code != int(expected["code"] if expected else 0):
            raise ValueError(f"{line!r} ended with exit code {result.exit_code}:\n{result.output}")
        return result.output

    def close(self) -> None:
        self._stack.close()

    def _set_up(self) -> str:
        server = self._stack.enter_context(servers.s3_server())
        server.make_bucket(RUN.removeprefix("s3://").partition("/")[0])
        self._stack.enter_context(mock.patch.dict(os.environ, server.environment))
        example_run.make(RUN)
        return self._stack.enter_context(TemporaryDirectory(prefix="transcripts_"))


_workshop = Workshop()


class Transcript(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        shown = []
        for line in filter(None, self.content):
            try:
                printed = _workshop.run(line)
            except ValueError as error:
                raise self.error(str(error)) from error
            shown.append((_EXITS.sub("", line), printed.rstrip("\n"), _EXITS.search(line)))
        return [self.node(shown)]

    def node(self, shown: list[tuple[str, str, re.Match[str] | None]]) -> nodes.Node:
        lines = []
        for command, printed, exits in shown:
            lines += [f"$ {command}", printed, *([f"[exit code {exits['code']}]"] if exits else [])]
        text = "\n".join(lines)
        return nodes.literal_block(text, text, language="console")


class Screenshot(Transcript):
    def node(self, shown: list[tuple[str, str, re.Match[str] | None]]) -> nodes.Node:
        # As wide as its longest line: a terminal would not cut one either.
        width = max(len(line) for command, printed, _ in shown for line in (f"$ {command}", *printed.splitlines()))
        with open(os.devnull, "w") as nowhere:
            console = Console(record=True, width=min(width, _WIDTH), file=nowhere, force_terminal=True)
            for command, printed, _ in shown:
                console.print(Text.assemble(("$ ", "green"), (command, "bold")))
                console.print(Text(printed))
            name = "_".join(shlex.split(shown[0][0])[:2]).replace("-", "_")
            svg = console.export_svg(title=shlex.split(shown[0][0])[0], unique_id=name)
        # The font would be fetched from elsewhere by each reader.
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
        return nodes.raw("", f'<div class="screenshot">{svg}</div>', format="html")


def _close(app: Sphinx, error: Exception | None) -> None:
    _workshop.close()


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("transcript", Transcript)
    app.add_directive("screenshot", Screenshot)
    app.connect("build-finished", _close)
    return {"parallel_read_safe": False}
