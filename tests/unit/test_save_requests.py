"""The mailbox between Ray's controller and the training loop. Two threads, as in a worker."""

from __future__ import annotations

import threading

import pytest

from ray_stateful import save_requests
from ray_stateful.save_requests import Held, ask, hold, save_requested, stop_listening, wait_until_held


@pytest.fixture(autouse=True)
def _fresh_mailbox(monkeypatch):
    monkeypatch.setattr(save_requests, "_mailbox", save_requests._Mailbox())


def test_a_request_is_seen_until_it_is_served_and_then_not_again():
    assert save_requested() == 0
    ask(1, "resize", 0.0)
    assert save_requested() == 1
    assert save_requested() == 1
    hold(1, "name")
    assert save_requested() == 0
    ask(2, "resize", 0.0)
    assert save_requested() == 2


def test_whoever_asks_hears_whether_the_training_loop_listens():
    assert not ask(1, "resize", 1.0)
    save_requested()
    assert ask(2, "resize", 1.0)
    stop_listening()
    assert not ask(3, "resize", 1.0)


def test_a_rank_that_holds_says_what_it_saved_and_goes_on_at_the_end_of_its_patience():
    ask(1, "resize", 60.0)
    assert wait_until_held(1, 0.0) is None
    training = threading.Thread(target=hold, args=(1, "checkpoint_s0000000007_abcdef"))
    training.start()

    assert wait_until_held(1, 30.0) == Held(1, "checkpoint_s0000000007_abcdef")
    assert training.is_alive()
    # Its patience is at an end when the limit says so, and not before this thread has looked.
    ask(1, "resize", 0.0)
    training.join(30.0)
    assert not training.is_alive()
    # It trains again: what it saved is no longer all it did.
    assert wait_until_held(1, 0.0) is None


def test_a_rank_may_serve_a_request_that_reaches_it_later_and_takes_its_patience_from_it():
    training = threading.Thread(target=hold, args=(3, None))
    training.start()
    assert wait_until_held(3, 30.0) == Held(3, None)

    ask(3, "resize", 0.1)
    training.join(30.0)
    assert not training.is_alive()
    assert save_requested() == 0


def test_an_answer_to_an_earlier_request_is_none_to_a_later_one():
    ask(1, "resize", 60.0)
    training = threading.Thread(target=hold, args=(1, "name"))
    training.start()
    assert wait_until_held(1, 30.0) is not None
    assert wait_until_held(2, 0.01) is None
    ask(1, "resize", 0.0)
    training.join(30.0)
    assert not training.is_alive()
