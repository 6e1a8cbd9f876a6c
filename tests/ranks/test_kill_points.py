"""A save that is killed at an I/O call costs no checkpoint: a short form of `python -m tests.soak.kill_points`."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_after_a_kill_at_any_io_call_the_run_resumes_bit_for_bit_from_the_newest_commit():
    # In a process of its own: lives are forked from it, and this one may have threads.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.soak.kill_points", "--short"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = re.search(r"^([0-9]+) kills in .*, each resumed bit for bit from the newest commit$", done.stdout, re.M)
    assert found is not None
    # Two or three fewer where strace is not installed.
    assert int(found[1]) >= 25, done.stdout
