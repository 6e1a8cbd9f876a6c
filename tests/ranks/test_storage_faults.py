"""Saves and restores through a failing S3 server: a short form of `python -m tests.soak.storage_faults`."""

import re

import pytest

from tests.soak import storage_faults


@pytest.fixture(scope="module")
def server(s3_server):
    s3_server.make_bucket("faults")
    return s3_server


@pytest.mark.parametrize("rate", storage_faults.RATES)
def test_saves_and_restores_succeed_while_requests_go_wrong(s3_environment, server, rate):
    worked = storage_faults.now_and_then(server, rate, num_rounds=2)

    assert worked.num_faults > 0


@pytest.mark.parametrize("background", [False, True], ids=["sync", "background"])
def test_when_storage_is_down_the_error_is_clear_training_goes_on_and_the_last_checkpoint_stays(
    s3_environment, server, background
):
    outage = storage_faults.down(server, "503", background)

    # What came last is one of the two: a throttled request, or the deadline of a call that the client library, which
    # tries again by itself, had not ended by then.
    assert re.search("SLOW_DOWN|no answer within", outage.error)
    for said in ("was not committed", "rank 0: ", "rank 1: ", "could not write"):
        assert said in outage.error
