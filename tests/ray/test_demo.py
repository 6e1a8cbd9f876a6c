"""`make demo` in little: a real cluster, a killed process, three groups of workers, and the verdict on all of it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture
def another_ray():
    """What people have on their machine: a Ray whose dashboard is where Ray looks first."""
    with socket.socket() as taken:
        with suppress(OSError):  # if that fails, there is one
            taken.bind(("127.0.0.1", 8265))
            taken.listen()
        yield


def test_demo_kills_resizes_stops_and_resumes_and_the_loss_does_not_notice(tmp_path, another_ray):
    picture = tmp_path / "demo.png"

    ran = subprocess.run(
        [sys.executable, str(DEMO), "--short", "--picture", str(picture)],
        capture_output=True,
        text=True,
        timeout=220,
        cwd=tmp_path,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Nothing but what the demo says: no warnings, of Ray's or ours.
    assert ran.stderr == ""
    assert re.search(r"killed worker 1 \(pid \d+\)", ran.stdout)
    assert "written by 2 workers, now 3" in ran.stdout
    assert "written by 3 workers, now 1" in ran.stdout
    assert "global batch 16 kept as 6 + 5 + 5" in ran.stdout
    assert "each once per epoch" in ran.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
