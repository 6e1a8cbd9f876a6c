"""When one process saves: requests from anywhere, and what a failed save does to the ones that follow."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from ray_stateful import Checkpointer, GlobalBatchSampler, Progress, checkpointer, save, save_requests
from ray_stateful.errors import UnsupportedState
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Delay, Fail, FaultyStorage
from tests.part import Part, opened

# Where a signal's handler may find the training thread: in the loop's own lines, and in those of a lock.
_PLACES = {checkpointer.__file__, threading.__file__}


def saver_of(run, faults=(), **settings):
    storage, path = resolve(str(run))
    run = DirectoryRun(FaultyStorage(storage.inner, faults), path, path)
    return Checkpointer({"part": Part({"weight": torch.ones(3)})}, run=run, **settings)


def interrupted_step(saver, at):
    """A step, with a request before its `at`-th line, made by this very thread; and whether there is such a line."""
    passed = 0

    def trace(frame, event, argument):
        nonlocal passed
        if frame.f_code.co_filename not in _PLACES:
            return None
        if event == "line":
            passed += 1
            if passed == at:
                saver.request_save()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        report = saver.step()
    finally:
        sys.settrace(before)
    return report, passed >= at


def test_a_run_that_goes_on_without_a_restore_is_warned_that_its_steps_will_be_lost(tmp_path, caplog):
    saver = saver_of(tmp_path, orphans_after_s=None)
    saver.step_count = 59
    saver.step()
    saver.save()
    for restores in (True, False):
        again = saver_of(tmp_path, orphans_after_s=None, every_n_steps=1)
        if restores:
            again.restore()
        again.step()
        for thread in threading.enumerate():
            if thread.name == "newest":
                thread.join(30.0)
        warned = [record.message for record in caplog.records if "without a restore" in record.message]
        assert len(warned) == (not restores)
    assert "step 1 was saved without a restore" in warned[0]


def test_a_run_is_not_warned_of_the_steps_that_it_has_saved_itself(tmp_path, caplog):
    slow = [Delay("directories", delay_s=60.0)]
    saver = saver_of(tmp_path, slow, orphans_after_s=None, every_n_steps=1)
    for _ in range(2):
        saver.step()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "newest"]
    saver._run.storage.release()
    thread.join(30.0)

    assert not thread.is_alive()
    assert not [record for record in caplog.records if "without a restore" in record.message]


def test_a_first_start_says_that_there_was_nothing_to_restore(tmp_path, capsys):
    assert saver_of(tmp_path).restore() is None
    assert "has no checkpoint yet: nothing was restored" in capsys.readouterr().out


def test_a_checkpoint_is_no_run(tmp_path):
    report = saver_of(tmp_path).save()
    with pytest.raises(ValueError, match="is a checkpoint by its name; its run is the directory it is in"):
        Checkpointer({"part": Part({"n": 1})}, run=report.uri)


@pytest.mark.parametrize(("state", "said"), [([1], "an object of type list"), ({"a": 1}, "an object of type int")])
def test_what_is_no_state_is_refused_in_words(tmp_path, state, said):
    with pytest.raises(UnsupportedState, match=said):
        save(state, step=1, run=str(tmp_path))


def test_a_step_that_is_no_whole_number_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"step is 1\.5; .* whole numbers"):
        save({"part": Part({"n": 1})}, step=1.5, run=str(tmp_path))


def test_a_request_of_a_signal_handler_is_served_by_this_step_or_the_next_wherever_it_interrupts(tmp_path):
    saver = saver_of(tmp_path, orphans_after_s=None)
    at, is_there = 1, True
    while is_there:
        report, is_there = interrupted_step(saver, at)
        saved = [report is not None, saver.step() is not None, saver.step() is not None]
        # By one of them, and by no other one.
        assert saved in ([True, False, False], [False, True, False]) or not is_there, at
        at += 1
    assert at > 20


def test_a_resize_is_heard_while_the_last_step_is_saved_and_not_after_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(save_requests, "_mailbox", save_requests._Mailbox())
    heard = []
    with saver_of(tmp_path, orphans_after_s=None) as saver:
        saver.step()
        save = saver.save
        saver.save = lambda metrics: heard.append(save_requests.ask(1, "resize", 1.0)) or save(metrics)

    assert heard == [True]
    assert not save_requests.ask(2, "resize", 1.0)


def test_a_request_whose_save_failed_and_was_forgiven_is_made_again_at_the_next_step(tmp_path):
    saver = saver_of(tmp_path, [Fail("open_sink")], every_n_steps=1000, soft_fail=1)
    saver.request_save()

    assert [saver.step() is not None for _ in range(4)] == [False, True, False, False]


def test_a_checkpoint_has_the_samples_of_the_part_that_has_counted_most(tmp_path):
    batches = GlobalBatchSampler(100, global_batch_size=8, micro_batch_size=8)
    # Nobody has told the progress of any samples.
    saver = Checkpointer({"batches": batches, "progress": Progress()}, every_n_steps=1, run=str(tmp_path))

    assert opened(saver.step()).manifest.samples == 8


def test_the_interval_of_seconds_begins_with_a_restore(tmp_path, monkeypatch):
    now = [100.0]
    saver_of(tmp_path).save()
    monkeypatch.setattr(checkpointer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    saver = saver_of(tmp_path, every_s=60.0, orphans_after_s=None)

    now[0] += 50.0
    saver.restore()
    saved = []
    for _ in range(3):
        now[0] += 20.0
        saved.append(saver.step() is not None)
    assert saved == [False, False, True]


def test_after_a_failed_save_the_interval_of_seconds_begins_anew(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpointer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    saver = saver_of(tmp_path, [Fail("open_sink", num_times=None)], every_s=60.0, soft_fail=2)

    failed = []
    for _ in range(130):
        now[0] += 1.0
        # At consecutive steps, storage that fails for a moment would use up all that may fail.
        saver.step()
        failed.append(saver._num_failed)
    assert failed == [0] * 59 + [1] * 60 + [2] * 11
