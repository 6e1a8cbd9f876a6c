"""The examples that are jobs, on a cluster with a job server; and those whose machines come and go, on their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ray.job_submission import JobStatus, JobSubmissionClient

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from history import read_attempts, steps_lost, surviving

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SAVE_EVERY = 10
BECAUSE_OF_ITS_NAME = "because a run of this name has been here before"


def _environment(**more: str) -> dict[str, str]:
    # Of the other tests' cluster, if that is up.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # By default, a head asks for a token if there is one, and every `ray.init()` of a cluster leaves one to its user.
    own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return {**inherited, **own, **more}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait(what: str, happened: Callable[[], object], timeout_s: float = 120.0) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.1)):
        if happened():
            return
        pause.wait(0.1)
    raise TimeoutError(f"{timeout_s:.0f} s without {what}")


ALONE = {"elastic.py": ["--short"], "preemption.py": []}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the examples print that start a cluster of their own: nothing but that, no warnings.

    Side by side, as each waits for workers to start most of the time.
    """
    where = tmp_path_factory.mktemp("alone")
    running = {
        example: subprocess.Popen(
            [sys.executable, str(EXAMPLES / example), *arguments],
            env=_environment(),
            cwd=where,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for example, arguments in ALONE.items()
    }
    found = {}
    try:
        for example, process in running.items():
            output, errors = process.communicate(timeout=220)
            assert process.returncode == 0, output + errors
            assert errors == ""
            found[example] = output
    finally:
        for process in running.values():
            # As Ctrl-C does: the example ends what it has started.
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=60)
    return {**found, "picture": str(where / "elastic.png")}


@dataclass(frozen=True)
class Head:
    """A Ray of its own with a job server, on whose machine `ray_stateful` can't be imported."""

    address: str
    client: JobSubmissionClient

    def submit(self, *arguments: str) -> str:
        """Run `submit.py` to its end; what it printed."""
        return self.run([sys.executable, str(EXAMPLES / "job" / "submit.py"), "--address", self.address, *arguments])

    def run(self, command: list[str]) -> str:
        done = subprocess.run(command, env=_environment(), cwd=ROOT, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Short: the path of a socket below it has 107 characters at most.
    directory = Path(tempfile.mkdtemp(prefix="rs_"))
    other = directory / "other" / "ray_stateful"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('not what the job has brought along')\n")
    path = os.pathsep.join([str(other.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    dashboard, client_server = _free_port(), _free_port()
    ports = {"port": 0, "dashboard-port": dashboard, "ray-client-server-port": client_server}
    # Any free ones; by default, all Rays of a machine take them from one range.
    ports |= {"dashboard-agent-listen-port": 0, "min-worker-port": 0, "max-worker-port": 0}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "4"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    environment = _environment(
        PYTHONPATH=path,
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
        # It would wait for half a minute for jobs to leave.
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--temp-dir", str(directory)], stdout=log, stderr=log, env=environment, cwd=directory
        )
    address = f"http://127.0.0.1:{dashboard}"

    def answers() -> bool:
        assert process.poll() is None, (directory / "log").read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    try:
        _wait("a job server", answers)
        yield Head(address, JobSubmissionClient(address))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
            shutil.rmtree(directory, ignore_errors=True)  # a process of Ray's may be writing its last log line


def _committed(run: Path) -> dict[int, Path]:
    """Step to directory of the whole checkpoints of a run."""
    return {int(path.parent.name[12:22]): path.parent for path in run.glob("checkpoint_s*/manifest.json")}


def _the_command_line() -> list[str]:
    """`ray job submit`, as the README of the example has it."""
    (block,) = re.findall(r"```sh\n(.*?)```", (EXAMPLES / "job" / "README.md").read_text(), re.DOTALL)
    return shlex.split(block)


def test_a_job_that_was_stopped_is_gone_on_with_by_another_on_other_workers_with_the_package_it_brings(head, tmp_path):
    run, notes = tmp_path / "bytes", tmp_path / "notes"
    training = ["--name", "bytes", "--storage-path", str(tmp_path), "--save-every", str(SAVE_EVERY)]
    training += ["--history", str(notes), "--text-bytes", "20001", "--dim", "64", "--num-layers", "2"]

    first = head.submit("--no-wait", "--", *training, "--num-workers", "2", "--steps", "1000000").strip()
    _wait("a checkpoint", lambda: _committed(run) or head.client.get_job_status(first).is_terminal())
    assert head.client.stop_job(first), head.client.get_job_logs(first)[-8000:]
    _wait("the job's end", lambda: head.client.get_job_status(first).is_terminal())
    assert head.client.get_job_status(first) == JobStatus.STOPPED, head.client.get_job_logs(first)[-8000:]
    assert BECAUSE_OF_ITS_NAME not in head.client.get_job_logs(first)
    workers = read_attempts(notes)[0].pids.values()
    _wait("the workers' end", lambda: not any(map(psutil.pid_exists, workers)))
    last = max(_committed(run))

    command = _the_command_line()
    assert command[:4] == ["ray", "job", "submit", "--address"]
    command[:1], command[4] = [str(Path(sys.executable).parent / "ray")], head.address
    script = command.index("train_fsdp.py")
    log = head.run([*command[: script + 1], *training, "--num-workers", "3", "--steps", str(last + 5)])

    assert BECAUSE_OF_ITS_NAME in log
    assert "choose another RunConfig(name=...)" in log
    assert f"resumed {_committed(run)[last].name} (step {last}; written by 2 workers, now 3)" in log
    stopped, went_on = read_attempts(notes)
    assert [stopped.world_size, went_on.world_size] == [2, 3]
    assert went_on.began == last
    assert steps_lost([stopped, went_on])[0] <= SAVE_EVERY
    assert [point.step for point in surviving([stopped, went_on])] == list(range(1, last + 6))


# PEFT 0.21 asks transformers 5.24 for what that calls otherwise now.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# `no_dist` says that it is, and torch says so again.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_an_adapter_is_tuned_on_two_workers_and_on_one_and_peft_loads_what_was_saved_bit_for_bit(head, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict

    adapter = tmp_path / "adapter"
    training = ["--name", "lora", "--storage-path", str(tmp_path), "--save-every", "4"]

    def tune(*arguments: str) -> str:
        return head.submit("--script", "finetune_lora.py", "--", *training, *arguments)

    tune("--num-workers", "2", "--steps", "6")
    log = tune("--num-workers", "1", "--steps", "12", "--adapter", str(adapter))

    run = tmp_path / "lora"
    assert sorted(_committed(run)) == [4, 6, 8, 12]
    assert f"resumed {_committed(run)[6].name} (step 6; written by 2 workers, now 1)" in log
    (losses,) = re.findall(r"loss on unseen text ([0-9.]+) without it, ([0-9.]+) with", log)
    assert float(losses[1]) < float(losses[0])

    import finetune_lora

    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(finetune_lora.build_base(), str(adapter)))
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8
    # As torch reads it, which knows nothing of the export.
    saved = {f"model.{name}": torch.empty_like(value) for name, value in loaded.items()}
    dcp.load(saved, checkpoint_id=str(_committed(run)[12]), no_dist=True)
    assert len(loaded) == 2 * 7 * 2 + 1
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in loaded.items())
    assert all(value.any() for value in loaded.values())


def test_machines_join_and_are_lost_and_what_is_planned_costs_no_step(printed):
    ran = printed["elastic.py"]

    assert re.search(r"2 -> 3 workers, machine joins: had trained step (\d+), went on after step \1: 0 steps lost", ran)
    assert "3 -> 2 workers, machine lost" in ran
    assert "0 steps lost to 1 planned change, with ResizeGuard" in ran
    assert "each once per epoch" in ran
    assert Path(printed["picture"]).read_bytes().startswith(b"\x89PNG")


def test_a_machine_that_is_announced_to_go_costs_no_more_than_what_came_after_the_save_for_it(printed):
    ran = printed["preemption.py"]

    assert re.search(r"saved checkpoint_s\d+_[0-9a-f]{6} \(step \d+\), [0-9.]+ s before the deadline", ran)
    assert "written by 2 workers, now 1" in ran
    assert "each once per epoch" in ran
