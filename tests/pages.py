"""The documentation's pages as programs: which blocks of code they have, and a page run as one script.

A block of Python or of shell commands is run, or `<!-- not executed: REASON -->` stands before it. Blocks of a page are
run in their order in one process: Python in one namespace, shell in a bash of its own, both in the same directory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

RUN = ("python", "sh")
# What is shown and not run: output, data, differences. A directive of the site, "{...}", is run by `make docs`.
SHOWN = ("", "diff", "json", "text")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>.*)$")
# The pages whose code needs Ray are run in tests/ray, on the cluster that is there.
_IMPORTS_RAY = re.compile(r"^(import|from) ray\b", re.MULTILINE)
_REASON = re.compile(r"<!-- not executed: (?P<reason>\S.*) -->")

# torch says so of every `dcp.save` in a single process, and Ray of its own settings.
_WARNINGS = ("error", "ignore:torch.distributed is disabled:UserWarning", "ignore::DeprecationWarning:ray.data.context")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`line` is that of its first line of code, from 1; `reason` says why it is not run."""

    line: int
    language: str
    code: str
    reason: str | None

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.reason is None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    opened: re.Match[str] | None = None
    first, code, before = 0, list[str](), ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence is not None:
            opened, first, code = fence, number + 1, []
        elif opened is not None and fence is not None and not fence["language"]:
            reason = _REASON.search(before)
            found.append(
                Block(
                    line=first,
                    language=opened["language"].strip(),
                    code="\n".join(code),
                    reason=reason["reason"] if reason else None,
                )
            )
            opened, before = None, ""
        elif opened is not None:
            code.append(line.removeprefix(opened["indent"]))
        elif line.strip():
            before = line
    assert opened is None, f"{name_of(page)}: the block at line {first} has no end"
    return found


def script_of(page: Path) -> str:
    """What of `page` is run, as one script, in which each line of code has the number that it has on the page."""
    lines: list[str] = []
    for block in filter(lambda block: block.is_run, blocks_of(page)):
        lines += [""] * (block.line - 1 - len(lines))
        if block.language == "python":
            lines += block.code.splitlines()
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            lines.append(f"import subprocess as _sp; _sp.run({command!r}, check=True)")
    return "\n".join(lines) + "\n"


def to_be_run(*, with_ray: bool) -> list[Path]:
    """The pages that have something to run, and need Ray for it, or not."""
    scripts = {page: script_of(page) for page in PAGES}
    return [page for page in PAGES if scripts[page].strip() and bool(_IMPORTS_RAY.search(scripts[page])) == with_ray]


def run(page: Path, directory: Path, **environment: str) -> str:
    """Run `page` in `directory`; what it printed."""
    script = directory / f"{page.stem}_md.py"
    script.write_text(script_of(page))
    # The commands of this very environment, whether it was activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, *(f"-W{each}" for each in _WARNINGS), str(script)],
        cwd=directory,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{name_of(page)}, run as a script:\n{done.stdout}\n{done.stderr}"
    return done.stdout
