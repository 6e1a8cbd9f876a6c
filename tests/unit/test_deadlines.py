"""Calls that end by a deadline: what they leave behind, and what a call that ends too late leaves."""

import os
import weakref

import pytest

from ray_stateful.storage import deadlines


class Result:
    pass


def test_who_keeps_a_call_keeps_nothing_of_what_it_returned():
    calls = []

    def function():
        calls.append(deadlines.this_call())
        return Result()

    result = deadlines.call(function, 10.0, "here")
    left = weakref.ref(result)
    del result

    assert left() is None
    assert len(calls) == 1


class LooksTaken(list):
    """Idle workers as a thread sees them if the last one is taken by another thread right after it has looked."""

    def __len__(self):
        return 1


def test_a_worker_that_another_thread_takes_first_is_no_error(monkeypatch):
    monkeypatch.setattr(deadlines, "_idle", LooksTaken())

    assert deadlines.call(lambda: "done", 10.0, "here") == "done"


# Newer Pythons warn of what is tested here: a fork leaves every thread but one behind.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_workers_that_were_left_behind():
    deadlines.call(lambda: None, 10.0, "here")
    child = os.fork()
    if child == 0:
        try:
            deadlines.call(lambda: None, 5.0, "there")
        except TimeoutError:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
