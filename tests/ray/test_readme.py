"""The README's loop, as it stands: pasted into a file, run, and run again on another number of workers."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def the_loop():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def run(script, directory):
    """Run the script with a Ray of its own, as a reader has it.

    Ray notes the newest cluster of a machine in its temporary directory, and the next driver joins that one: here, it
    would be the cluster of the other tests.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # Short: the path of a socket in it has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="rs_", ignore_cleanup_errors=True) as temporary:
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=directory,
            env={**environment, "RAY_TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.filterwarnings("default")
def test_the_readmes_loop_runs_as_it_stands_and_goes_on_with_another_number_of_workers(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(the_loop())
    run(script, tmp_path)

    checkpoints = sorted((tmp_path / "runs" / "first").glob("checkpoint_s*/manifest.json"))
    # One epoch of 10,000 samples in batches of 128 is 79 steps: saved at 20, 40, 60, and at the end.
    assert [path.parent.name[12:22] for path in checkpoints] == [f"{step:010d}" for step in (20, 40, 60, 79)]

    script.write_text(the_loop().replace("num_workers=(1, 8)", "num_workers=1"))
    resumed = run(script, tmp_path)

    assert f"resumed {checkpoints[-1].parent.name} (step 79; written by" in resumed
    assert "epoch 1, sample 0 of 10,000" in resumed
    finished = sorted((tmp_path / "runs" / "first").glob("checkpoint_s*/manifest.json"))[-1]
    assert finished.parent.name[12:22] == f"{2 * 79:010d}"
