"""Calls that end by a deadline: what they leave behind, and what a call that ends too late leaves."""

import weakref

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
