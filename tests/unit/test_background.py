"""A background save of one process: what it keeps, and what it takes when."""

import queue
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from ray_stateful import Checkpointer, background, checkpoint, checkpointer
from ray_stateful.background import BackgroundSaver
from ray_stateful.errors import RankTimeout
from ray_stateful.format import layout
from ray_stateful.ranks import Ranks
from ray_stateful.runs import DirectoryRun
from ray_stateful.stopwatch import Stopwatch
from ray_stateful.storage.local import LocalSink
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Fail, FaultyStorage, Hang


def steps_saved(run):
    return sorted(int(path.parent.name[12:22]) for path in run.glob("*/manifest.json"))


class Cloning:
    """Hands out copies of its own, as FSDP1 does."""

    def __init__(self, fill=0.0):
        self.weight = torch.full((1000,), fill, device="cpu")
        self.handed_out = None

    def state_dict(self):
        clone = self.weight.clone()
        self.handed_out = weakref.ref(clone)
        return {"weight": clone}

    def load_state_dict(self, state_dict):
        self.weight = state_dict["weight"]


class Empty:
    """Has no tensors that what was saved could be put into."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        self.weight = state_dict["weight"]


class Watching:
    """A storage that notes whether what `part` has handed out is still there when files are begun."""

    def __init__(self, inner, part):
        self.inner, self.part, self.still_there = inner, part, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def open_sink(self, path):
        self.still_there.append(self.part.handed_out() is not None)
        return self.inner.open_sink(path)


class Noting(DirectoryRun):
    noted = ()

    def prepare_report(self, metrics):
        Noting.noted = (*Noting.noted, metrics)
        return metrics


class BusySaving:
    """A save whose writing is Python and nothing else. It stands in only for how long the interpreter is held."""

    GIVE_UP_S = 2.0

    def __init__(self):
        self.training_goes_on = self.was_seen = False
        self.clock = Stopwatch()

    def collect(self, staging):
        pass

    def write(self, ranks):
        until = time.monotonic() + self.GIVE_UP_S
        while not self.training_goes_on and time.monotonic() < until:
            pass
        self.was_seen = self.training_goes_on


@pytest.fixture
def no_switching():
    """A thread keeps the interpreter's lock until it waits for something."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(10 * BusySaving.GIVE_UP_S)
    yield
    sys.setswitchinterval(before)


def test_training_goes_on_before_the_thread_that_writes_has_the_interpreter(no_switching):
    saver, saving = BackgroundSaver(Ranks(), timeout_s=10), BusySaving()

    saver.begin(saving)
    saving.training_goes_on = True

    saver.wait()
    assert saving.was_seen


def test_what_was_copied_is_let_go_before_it_is_written(tmp_path):
    part = Cloning(3.0)
    storage, path = resolve(str(tmp_path))
    watching = Watching(storage.inner, part)
    saver = Checkpointer({"part": part}, every_n_steps=1, background=True, run=DirectoryRun(watching, path, path))
    with saver:
        # The second one is not planned anew.
        for _ in range(2):
            saver.step()
            saver.wait()

    assert watching.still_there == [False] * 2
    fresh = Cloning()
    checkpoint.restore({"part": fresh}, run=str(tmp_path))
    assert torch.equal(fresh.weight, part.weight)


def test_waiting_for_a_write_that_hangs_ends_at_the_deadline(tmp_path):
    storage, path = resolve(str(tmp_path))
    slow = FaultyStorage(storage.inner, [Hang("open_sink")])
    run = DirectoryRun(slow, path, path)
    saver = Checkpointer({"part": Cloning()}, every_n_steps=1, background=True, at_end=False, run=run, timeout_s=0.2)
    saver.step()

    with pytest.raises(RankTimeout, match="in 'end a background save': its thread is still writing"):
        saver.wait()
    slow.release()


_END_WITHOUT_WAITING = """
import sys, threading, torch
from ray_stateful import Checkpointer
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Delay, FaultyStorage
from tests.part import Part

class Telling(FaultyStorage):
    def write(self, path, data):
        if "manifest" in path:
            begun.set()
        super().write(path, data)

begun, (storage, path) = threading.Event(), resolve(sys.argv[1])
run = DirectoryRun(Telling(storage.inner, [Delay("write", path="manifest", delay_s=1.0)]), path, path)
saver = Checkpointer({"part": Part({"weight": torch.ones(3)})}, every_n_steps=1, background=True, run=run)
saver.step()
begun.wait(60.0)
sys.exit(3)
"""


def test_a_process_that_ends_without_waiting_is_held_up_for_the_commit_of_its_save_in_flight(tmp_path):
    command = [sys.executable, "-c", _END_WITHOUT_WAITING, str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 3
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1


def test_a_process_that_ends_before_its_save_has_begun_to_write_says_that_it_was_not_finished(tmp_path):
    script = _END_WITHOUT_WAITING.replace("begun.wait(60.0)\n", "")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert list(tmp_path.glob("*/manifest.json")) == []
    assert "a background save was not finished when this process left it" in done.stderr
    assert "call wait()" in done.stderr


def fail_after_a_step(saver, wait_s):
    with saver:
        saver.step()
        saver._background._thread.join(wait_s)
        raise ZeroDivisionError


@pytest.mark.parametrize(("fault", "why"), [(Fail, "denied"), (Hang, "it is still being written")])
def test_a_block_that_fails_says_once_that_its_save_in_flight_was_not_finished(
    tmp_path, monkeypatch, caplog, fault, why
):
    monkeypatch.setattr(background, "_LEAVE_S", 0.2)
    storage, path = resolve(str(tmp_path))
    details = {"error": PermissionError("denied")} if fault is Fail else {}
    faulty = FaultyStorage(storage.inner, [fault("write", path="manifest", **details)])
    saver = Checkpointer({"part": Cloning()}, every_n_steps=1, background=True, run=DirectoryRun(faulty, path, path))
    try:
        with pytest.raises(ZeroDivisionError):
            fail_after_a_step(saver, wait_s=None if fault is Fail else 0.2)
        saver._background.leave()  # as at the end of the process
    finally:
        faulty.release()

    (said,) = [record.getMessage() for record in caplog.records if "was not finished" in record.getMessage()]
    assert why in said
    # The block has ended: there is nothing that its author forgot.
    assert "call wait()" not in said


def test_a_metric_is_what_it_was_at_its_step_although_its_tensor_goes_on(tmp_path):
    storage, path = resolve(str(tmp_path))
    running = torch.tensor(3.0)
    with Checkpointer({"part": Cloning()}, every_n_steps=1, background=True, run=Noting(storage, path, path)) as saver:
        saver.step({"loss": running})
        running.zero_()

    assert Noting.noted == ({"loss": 3.0},)


def test_a_write_that_was_given_up_has_the_values_of_its_own_save_although_another_was_begun(tmp_path, monkeypatch):
    storage, path = resolve(str(tmp_path))
    # The first write hangs, and no second one of its save is possible.
    slow = FaultyStorage(storage.inner, [Fail("open_sink", nth=2, error=PermissionError("denied"))])
    retrying = RetryingStorage(slow, RetryPolicy(attempt_s=0.1, first_pause_s=0.01))
    free, late, write = threading.Event(), queue.Queue(), LocalSink.write

    part = Cloning()

    def hang(sink, data):
        if memoryview(data).nbytes == part.weight.nbytes:
            monkeypatch.setattr(LocalSink, "write", write)
            free.wait(60.0)
            late.put(bytes(data))
        else:
            write(sink, data)

    monkeypatch.setattr(LocalSink, "write", hang)
    saver = Checkpointer(
        {"part": part},
        every_n_steps=1,
        background=True,
        soft_fail=1,
        at_end=False,
        num_files=1,
        run=DirectoryRun(retrying, path, path),
    )
    for fill in (3.0, 4.0):
        part.weight.fill_(fill)
        saver.step()
        saver.wait()
    assert saver._saved_step == 2

    free.set()
    assert late.get(timeout=60.0) == torch.full((1000,), 3.0).numpy().tobytes()


@pytest.mark.parametrize("background", [False, True])
def test_a_default_device_of_the_user_is_not_where_buffers_are_made(tmp_path, background):
    part, fresh = Cloning(3.0), Empty()
    # Any that is not the host; on this one, nothing can be read back.
    with torch.device("meta"):
        with Checkpointer({"part": part}, every_n_steps=1, background=background, run=str(tmp_path)) as saver:
            saver.step()
        checkpoint.restore({"part": fresh}, run=str(tmp_path))

    assert torch.equal(fresh.weight, part.weight)


class Clock:
    """The time that a `Checkpointer` goes by, set by a test. Everything below it goes by the real one."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s


def test_the_interval_of_saves_in_the_background_counts_from_their_beginning_and_not_from_their_end(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpointer, "time", clock := Clock())
    storage, path = resolve(str(tmp_path))
    slow = FaultyStorage(storage.inner, [Hang("open_sink")])
    saver = Checkpointer(
        {"part": Cloning()}, every_s=10, at_end=False, background=True, run=DirectoryRun(slow, path, path)
    )
    with saver:
        for clock.now_s in (9.0, 10.0, 16.0):
            saver.step()
        slow.release()
        saver.wait()
        # Ten seconds after the beginning of the first, four after its end; and once more.
        for clock.now_s in (19.0, 20.0, 21.0, 29.0, 30.0):
            saver.step()
            saver.wait()

    assert steps_saved(tmp_path) == [2, 5, 8]


@pytest.mark.parametrize("asked", [False, True])
def test_a_save_that_is_due_when_the_block_ends_is_made_also_without_one_at_the_end(tmp_path, asked):
    storage, path = resolve(str(tmp_path))
    slow = FaultyStorage(storage.inner, [Hang("open_sink")])
    every = 4 if asked else 2
    saver = Checkpointer(
        {"part": Cloning()}, every_n_steps=every, at_end=False, background=True, run=DirectoryRun(slow, path, path)
    )
    with saver:
        for _ in range(4 + asked):
            saver.step()
        if asked:
            saver.request_save()
        slow.release()

    assert steps_saved(tmp_path) == ([4, 5] if asked else [2, 4])


@pytest.mark.parametrize("asked", [False, True])
def test_a_save_that_was_postponed_is_made_once(tmp_path, asked):
    storage, path = resolve(str(tmp_path))
    slow = FaultyStorage(storage.inner, [Hang("open_sink")])
    saver = Checkpointer(
        {"part": Cloning()}, every_n_steps=2, at_end=False, background=True, run=DirectoryRun(slow, path, path)
    )
    with saver:
        for _ in range(4):
            saver.step()
        slow.release()
        saver.save() if asked else saver.wait()
        for _ in range(3):
            saver.step()
            saver.wait()

    # That of step 4 was due while that of step 2 was in flight.
    assert steps_saved(tmp_path) == ([2, 4, 6] if asked else [2, 5, 6])


def test_a_requested_save_that_fails_in_the_background_as_the_block_ends_is_made_again(tmp_path):
    storage, path = resolve(str(tmp_path))
    faults = [Hang("open_sink"), Fail("write", path=layout.MANIFEST)]
    faulty = FaultyStorage(storage.inner, faults)
    saver = Checkpointer(
        {"part": Cloning()}, at_end=False, background=True, soft_fail=1, run=DirectoryRun(faulty, path, path)
    )
    with saver:
        saver.step()
        saver.request_save()
        saver.step()
        faulty.release()

    assert steps_saved(tmp_path) == [2]
