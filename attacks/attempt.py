"""Restores from hostile checkpoints, in a process that may be lost: `python -m attacks.attempt [NAME ...]`.

Each is looked at with the command line as well, which may accept it (it opens less of it) but must not break on it.
Writes a line of JSON when an attack begins and one when it was met. A restore that takes longer than the deadline, or
asks for more memory than there is reason to, ends as an attack that succeeded.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from click.testing import CliRunner

from attacks import victim
from attacks.corpus import Attack, Workshop, all_attacks
from ray_stateful import checkpoint, parts
from ray_stateful.cli.main import main as cli
from ray_stateful.errors import CheckpointError
from ray_stateful.ranks import Outcome

DEADLINE_S = 30
COMMANDS = (("inspect", "--tree"), ("verify",), ("plan", "--workers", "3"))
MAX_MEMORY_BYTES = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="attacks to try; by default all")
    chosen = parser.parse_args().names
    attacks = all_attacks()
    with tempfile.TemporaryDirectory() as scratch:
        ours = victim.save(Path(scratch) / "ours")
        theirs = Path(scratch) / "theirs" / "plain"
        # Warnings are for people who look at this output: there is no process group here, and none is meant to be.
        dcp.save(parts.collect(victim.saved_state(), 0, Outcome()), checkpoint_id=theirs)
        weights = victim.save_weights(Path(scratch) / "weights")
        # If an intact one were refused too, a refusal would say nothing.
        for control, original in (("intact", ours), ("intact, plain", theirs), ("intact, initial", weights)):
            nothing = Attack(control, "nothing", lambda _: None, original is theirs, False, original is weights)
            print(json.dumps({"name": control, **attempt(nothing, original, Path(scratch) / control)}), flush=True)
        for number, name in enumerate(chosen or attacks):
            print(json.dumps({"begin": name}), flush=True)
            original = weights if attacks[name].initial else theirs if attacks[name].foreign else ours
            outcome = attempt(attacks[name], original, Path(scratch) / str(number))
            print(json.dumps({"name": name, **outcome}), flush=True)


def attempt(attack: Attack, original: Path, run: Path) -> dict[str, Any]:
    """Make the hostile checkpoint, restore from it, and say what became of that."""
    directory = run / original.name
    shutil.copytree(original, directory)
    workshop = Workshop(directory)
    attack.run(workshop)
    state = victim.fresh_model() if attack.initial else victim.fresh_state()
    # By its default action: a handler in Python would wait for the call into C that never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(DEADLINE_S)
    before, limits = _memory_bytes(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space_bytes() + MAX_MEMORY_BYTES, limits[1]))
    began = time.monotonic()
    error: BaseException | None = None
    try:
        if attack.initial:
            checkpoint.restore(state, initial=str(directory), run=str(run))
        else:
            checkpoint.restore(state, checkpoint=str(directory), run=str(run))
    # Whatever it is: what it was is the finding.
    except BaseException as caught:  # noqa: BLE001
        error = caught
    seconds = time.monotonic() - began
    signal.alarm(DEADLINE_S)
    said = [_command(name, str(directory), *rest) for name, *rest in COMMANDS]
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.alarm(0)
    shutil.rmtree(directory, ignore_errors=True)
    return {
        "commands": [text for text in said if text is not None],
        "error": None if error is None else type(error).__name__,
        "ours": isinstance(error, CheckpointError),
        "text": str(error)[:600],
        "commands_the_terminal": "\x1b" in str(error),
        "ran": workshop.canary.exists(),
        "untouched": victim.is_untouched(state),
        "seconds": seconds,
        "memory_bytes": max(0, _memory_bytes() - before),
    }


def _command(*arguments: str) -> str | None:
    """What is wrong with what a command that looks at the checkpoint did; `None` if it was looked at, or refused."""
    result = CliRunner().invoke(cli, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{arguments[0]}: {type(result.exception).__name__}: {result.exception}"[:600]
    lines = len(result.stderr.splitlines())
    if lines != (1 if result.exit_code == 2 else 0) or "\x1b" in result.output:
        return f"{arguments[0]}: {result.output!r}"[:600]
    return None


def _memory_bytes() -> int:
    """The most memory this process ever had, which only grows."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
