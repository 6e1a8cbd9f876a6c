"""What is tried again and what is not, in each storage's words; budgets, deadlines, and a proxy that makes trouble."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import random
import threading
import time
from collections.abc import Iterator

import pyarrow.fs
import pytest
import torch

from ray_stateful import Progress, checkpoint
from ray_stateful.errors import RankFailed, SaveFailed, StorageError
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage import deadlines, retries
from ray_stateful.storage.base import Sink
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy, is_transient, write_file
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import Delay, Fail, FaultyStorage, Hang
from tests.proxy import KINDS, Proxy, ProxyFaults, proxy
from tests.servers import S3Server

FAST = RetryPolicy(budget_s=20.0, first_pause_s=0.001, longest_pause_s=0.01)
RESET = ConnectionResetError(errno.ECONNRESET, "reset")

# As pyarrow 26 words them.
TRANSIENT = [
    "AWS Error SLOW_DOWN during UploadPart operation: Please reduce your rate.",
    "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No body.",
    "AWS Error INTERNAL_FAILURE during ListObjectsV2 operation: internal error",
    "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 18, Transferred a partial file",
    "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached",
    "AWS Error UNKNOWN (HTTP status 429) during PutObject operation: Unable to parse",
    "google::cloud::Status(UNAVAILABLE: Retry policy exhausted in GetObjectMetadata: PerformWork() - CURL error [7])",
    "google::cloud::Status(RESOURCE_EXHAUSTED: Retry policy exhausted in InsertObjectMedia: rateLimitExceeded)",
    "google::cloud::Status(INTERNAL: Retry policy exhausted: backendError)",
    "GetProperties for 'http://host/c/f' failed. Azure Error: [ServerBusy] 503 The server is busy.",
    "Azure Error: [OperationTimedOut] 500 Operation could not be completed in time.",
    "Azure Error: [] Fail to get a new connection for: http://host:10000. Could not connect to server",
    "GetProperties failed for 'http://host/c/f'. Azure Error: [] 503 \n\nRequest ID: ",
    "ClientError: An error occurred (SlowDown) when calling the PutObject operation: Please reduce your request rate.",
]
PERMANENT = [
    "When uploading object with key 'g' in bucket 'b': AWS Error ACCESS_DENIED during PutObject operation: Forbidden",
    "AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body. (Request ID: HTTP status 503)",
    "AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: The specified bucket does not exist",
    "AWS Error UNKNOWN (HTTP status 400) during PutObject operation: Unable to parse ExceptionName: InvalidArgument",
    "google::cloud::Status(PERMISSION_DENIED: Permanent error in GetObjectMetadata: forbidden)",
    "google::cloud::Status(UNAUTHENTICATED: Permanent error in InsertObjectMedia)",
    "Azure Error: [AuthorizationPermissionMismatch] 403 This request is not authorized to perform this operation.",
    "Azure Error: [ContainerNotFound] 404 The specified container does not exist.",
    "GetProperties failed for 'http://host/timeout/temporary'. Azure Error: [] 403 Forbidden",
    "something that nobody has seen before",
]


@pytest.mark.parametrize("text", TRANSIENT)
def test_what_passes_is_tried_again(text):
    assert is_transient(OSError(text), "c/f")


@pytest.mark.parametrize("text", PERMANENT)
def test_what_is_meant_is_not_tried_again(text):
    assert not is_transient(OSError(text), "c/f")


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES", "EDQUOT", "ENOENT", "EFBIG"])
def test_a_full_or_denying_disk_is_not_tried_again(code):
    assert not is_transient(OSError(getattr(errno, code), "temporarily 503"), "c/f")


@pytest.mark.parametrize("code", ["ECONNRESET", "ETIMEDOUT", "EPIPE", "ECONNREFUSED", "ESTALE", "EAGAIN"])
def test_a_broken_connection_is_tried_again(code):
    assert is_transient(OSError(getattr(errno, code), "x"), "c/f")


def test_a_disk_that_fails_is_not_tried_again():
    assert not is_transient(OSError(errno.EIO, "Input/output error"), "c/f")


def test_only_errors_of_storage_are_tried_again():
    assert not is_transient(ValueError("connection reset"), "c/f")
    assert not is_transient(StorageError("write", "p", "connection reset"), "c/f")


NAMING = [
    "When uploading object with key 'timeout-sweep/temporary run/x' in bucket 'temporary': AWS Error UNKNOWN",
    "When creating key 'timeout-sweep' in bucket 'temporary': AWS Error UNKNOWN during PutObject operation",
    "could not make temporary/timeout-sweep: nobody knows why",
    "ValueError: bad: 'base/temporary/timeout-sweep/temporary run/x'",
    "http://host/temporary/timeout-sweep/temporary%20run/x: nobody knows why",
]


@pytest.mark.parametrize("text", NAMING)
def test_a_name_that_reads_like_an_error_that_passes_makes_no_error_one(text):
    path = "temporary/timeout-sweep/temporary run/x"
    for error in (OSError(text), OSError(errno.EIO, text, path)):
        assert not is_transient(error, path)


def test_what_an_error_says_counts_also_if_it_is_a_name_as_well():
    assert is_transient(
        OSError("When reading key '503/x' in bucket 'b': AWS Error UNKNOWN (HTTP status 503)"), "b/503/x"
    )
    assert is_transient(OSError("ReadError('Connection reset by peer'), reading b/reset/x"), "b/reset/x")


@pytest.fixture
def inner(tmp_path) -> PyarrowStorage:
    return PyarrowStorage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()))


@pytest.mark.parametrize("call", ["open_sink", "write", "read", "sizes", "directories", "delete"])
@pytest.mark.parametrize("after", [False, True])
def test_every_operation_survives_errors_that_pass(inner, call, after):
    storage = RetryingStorage(FaultyStorage(inner, [Fail(call, num_times=3, error=RESET, after=after)]), FAST)
    storage.write("d/file", b"content")
    with storage.open_sink("d/streamed") as sink:
        sink.write(b"x")

    assert storage.read("d/file") == b"content"
    assert storage.sizes("d") == {"file": 7, "streamed": 1}
    assert storage.directories("") == ["d"]
    storage.delete("d")
    assert inner.directories("") == []
    assert storage.retries.total() == 3


def test_a_denied_operation_is_tried_once_and_says_what_and_where(inner):
    denied = PermissionError(errno.EACCES, "denied")
    faulty = FaultyStorage(inner, [Fail("write", num_times=None, error=denied)])
    with pytest.raises(StorageError, match=r"could not write 'd/file': PermissionError: .*denied") as raised:
        RetryingStorage(faulty, FAST).write("d/file", b"x")

    assert raised.value.__cause__ is denied
    assert faulty.counts()["write"] == 1
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_a_missing_file_is_file_not_found_at_once(inner):
    faulty = FaultyStorage(inner)
    with pytest.raises(FileNotFoundError):
        RetryingStorage(faulty, FAST).read("d/file")

    assert faulty.counts()["read"] == 1


def test_an_outage_is_an_error_when_the_budget_is_spent(inner):
    policy = RetryPolicy(budget_s=0.3, first_pause_s=0.01, longest_pause_s=0.05)
    faulty = FaultyStorage(inner, [Fail("read", num_times=None, error=RESET)])
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"still failing after 0\.3 s.*reset") as raised:
        RetryingStorage(faulty, policy).read("d/file")

    assert raised.value.__cause__ is RESET
    assert time.monotonic() - began < 5.0
    assert faulty.counts()["read"] > 3


def test_there_is_a_pause_before_each_try_and_no_try_begins_after_the_budget(inner, monkeypatch):
    slept, ticks = [], itertools.count()

    class Clock:
        @staticmethod
        def monotonic():
            return sum(slept) + next(ticks) / 100

        @staticmethod
        def sleep(seconds):
            slept.append(seconds)

    monkeypatch.setattr(retries, "time", Clock)
    monkeypatch.setattr(retries, "_draw", lambda: 1.0)
    faulty = FaultyStorage(inner, [Fail("read", num_times=None, error=RESET)])
    with pytest.raises(StorageError, match="still failing after 10 s"):
        RetryingStorage(faulty, RetryPolicy(budget_s=10.0, first_pause_s=1.0, longest_pause_s=4.0)).read("d/file")

    assert slept == [1.0, 2.0, 4.0]
    assert faulty.counts()["read"] == 4


def test_a_hung_call_is_given_up_at_its_deadline_and_tried_again(inner):
    inner.write("d/file", b"content")
    faulty = FaultyStorage(inner, [Hang("read", num_times=2), Hang("sizes", num_times=None)])
    storage = RetryingStorage(faulty, RetryPolicy(attempt_s=0.1, budget_s=0.5, first_pause_s=0.01))
    try:
        assert storage.read("d/file") == b"content"
        with pytest.raises(StorageError, match=r"no answer within 0.1 s"):
            storage.sizes("d")
    finally:
        faulty.release()


def test_a_call_that_was_given_up_leaves_no_thread_once_it_returns(inner, monkeypatch):
    # So that no thread of another test makes these calls.
    monkeypatch.setattr(deadlines, "_idle", [])
    inner.write("d/file", b"content")
    hanging = [Hang("read", nth=nth) for nth in (1, 3, 5)]
    faulty = FaultyStorage(inner, [*hanging, Hang("sink.write", nth=2)])
    storage = RetryingStorage(faulty, RetryPolicy(attempt_s=0.1, first_pause_s=0.01))
    before = set(threading.enumerate())
    try:
        assert [storage.read("d/file") for _ in hanging] == [b"content"] * 3
        write_file(storage, "d/other", stream_parts)
        left = set(threading.enumerate()) - before
        assert len(left) >= 4
    finally:
        faulty.release()

    pause = threading.Event()
    for _ in range(200):
        alive = sum(thread.is_alive() for thread in left)
        # One for the next call.
        if alive <= 1:
            break
        pause.wait(0.05)
    assert alive <= 1


def test_files_that_are_written_one_after_another_take_one_thread(inner, monkeypatch):
    monkeypatch.setattr(deadlines, "_idle", [])
    before = set(threading.enumerate())
    for number in range(3):
        write_file(RetryingStorage(inner), f"d/{number}", stream_parts)

    assert len(set(threading.enumerate()) - before) == 1


def test_a_file_that_is_opened_too_late_is_closed_and_nothing_is_left_of_it(tmp_path, inner, monkeypatch):
    monkeypatch.setattr(deadlines, "_idle", [])
    faulty = FaultyStorage(inner, [Delay("open_sink", delay_s=60.0)])
    storage = RetryingStorage(faulty, RetryPolicy(attempt_s=2.0, first_pause_s=0.01))
    before = set(threading.enumerate())
    try:
        # Each attempt has a path of its own: a late file at the path of a later one could not be told from that.
        write_file(storage, lambda attempt: f"d/file_{attempt}", stream_parts)
        (late, *_) = [thread for thread in threading.enumerate() if thread not in before]
    finally:
        faulty.release()
    late.join(10.0)

    assert not late.is_alive()
    assert faulty.counts()["open_sink"] == 2
    assert os.listdir(tmp_path / "d") == ["file_1"]
    still_open = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [path for path in still_open if path.startswith(str(tmp_path))]


def test_pauses_grow_from_the_first_to_the_longest_and_start_at_zero():
    policy = RetryPolicy(first_pause_s=1.0, longest_pause_s=6.0)
    longest = policy.pauses(lambda: 1.0)
    shortest = policy.pauses(lambda: 0.0)

    assert [next(longest) for _ in range(5)] == [1.0, 2.0, 4.0, 6.0, 6.0]
    assert [next(shortest) for _ in range(5)] == [0.0] * 5


def stream_parts(sink: Sink) -> str:
    for number in range(5):
        sink.write(bytes([number]) * 1000)
    return "streamed"


WHOLE = b"".join(bytes([number]) * 1000 for number in range(5))


@pytest.mark.parametrize("retrying", [False, True])
@pytest.mark.parametrize(("call", "nth"), [("open_sink", 1), ("sink.write", 3), ("publish", 1)])
def test_a_file_that_breaks_off_is_streamed_again_from_its_start(inner, call, nth, retrying):
    faulty = FaultyStorage(inner, [Fail(call, nth=nth, error=RESET)])
    storage = RetryingStorage(faulty, FAST) if retrying else faulty

    assert write_file(storage, "d/file", stream_parts, None if retrying else FAST) == "streamed"
    assert inner.read("d/file") == WHOLE
    assert inner.sizes("d") == {"file": 5000}
    if retrying:
        assert storage.retries == {"write": 1}


@pytest.mark.parametrize(("call", "nth"), [("sink.write", 2), ("publish", 1)])
def test_a_stream_that_hangs_in_a_write_or_when_it_is_closed_is_streamed_again(tmp_path, inner, call, nth):
    faulty = FaultyStorage(inner, [Hang(call, nth=nth)])
    storage = RetryingStorage(faulty, RetryPolicy(attempt_s=0.2, publish_s=0.2, first_pause_s=0.01))
    try:
        write_file(storage, "d/file", stream_parts)
    finally:
        faulty.release()

    assert inner.read("d/file") == WHOLE
    # The one that hung ends as well, and what it has written goes.
    pause = threading.Event()
    for _ in range(1000):
        if os.listdir(tmp_path / "d") == ["file"]:
            break
        pause.wait(0.01)
    assert os.listdir(tmp_path / "d") == ["file"]


def test_the_end_of_a_file_may_take_longer_than_another_call(inner, monkeypatch):
    given = []

    class Line(deadlines.Line):
        def call(self, function, timeout_s, *rest):
            given.append(timeout_s)
            return super().call(function, timeout_s, *rest)

    monkeypatch.setattr(deadlines, "Line", Line)
    write_file(RetryingStorage(inner, RetryPolicy(attempt_s=30.0, publish_s=40.0)), "d/file", stream_parts)

    # It is opened, written to five times, and closed.
    assert given == [30.0] * 6 + [40.0]


def test_a_file_on_a_full_disk_is_streamed_once(inner):
    faulty = FaultyStorage(inner, [Fail("sink.write", nth=2, error=OSError(errno.ENOSPC, "full"))])
    with pytest.raises(StorageError, match=r"could not write 'd/file': .*full"):
        write_file(RetryingStorage(faulty, FAST), "d/file", stream_parts)

    assert faulty.counts()["open_sink"] == 1
    assert inner.sizes("d") == {}


def test_an_error_of_the_producer_is_its_own(inner):
    def producer(sink: Sink) -> None:
        raise KeyError("tensor")

    with pytest.raises(KeyError, match="tensor"):
        write_file(RetryingStorage(inner, FAST), "d/file", producer)
    assert inner.sizes("d") == {}


@pytest.fixture
def between(s3_environment: S3Server) -> Iterator[Proxy]:
    s3_environment.make_bucket("retries")
    with proxy(s3_environment.port) as running:
        yield running


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_an_object_store_that_fails_now_and_then_is_written_and_read_exactly(s3_environment, between, rate):
    resolved, bucket = resolve(s3_environment.uri("retries", between.port))
    storage = RetryingStorage(resolved.inner, RetryPolicy(first_pause_s=0.05))
    between.set_faults(ProxyFaults(rate=rate, kinds=KINDS, seed=3, stall_s=0.2, slow_s=0.05))
    data = os.urandom(11 << 20)
    write_file(storage, f"{bucket}/{rate}/large", lambda sink: sink.write(data))
    for number in range(10):
        storage.write(f"{bucket}/{rate}/small-{number}", data[:number])

    assert storage.read(f"{bucket}/{rate}/large") == data
    for start in range(0, len(data), 1 << 20):
        assert storage.read(f"{bucket}/{rate}/large", start, 1000) == data[start : start + 1000]
    assert len(storage.sizes(f"{bucket}/{rate}")) == 11
    assert between.num_faults() > 0


def test_an_object_store_that_is_down_is_an_error_within_the_budget(s3_environment, between):
    resolved, bucket = resolve(s3_environment.uri("retries", between.port))
    storage = RetryingStorage(resolved.inner, RetryPolicy(budget_s=0.2, first_pause_s=0.05))
    between.set_faults(ProxyFaults(rate=1.0, kinds=("503",)))
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"could not write 'retries/file'.*SLOW_DOWN"):
        storage.write(f"{bucket}/file", b"x")

    assert time.monotonic() - began < 30.0


def test_a_bucket_that_is_not_there_is_tried_once(s3_environment, between):
    resolved, _ = resolve(s3_environment.uri("retries", between.port))
    with pytest.raises(StorageError, match="could not write 'no-such-bucket/file'"):
        resolved.write("no-such-bucket/file", b"x")

    assert resolved.retries.total() == 0


def test_a_try_that_was_given_up_can_not_destroy_what_a_later_one_committed():
    """A write hangs, is given up, the file is written again and committed; then the hanging call returns."""

    class Part:
        value = {"t": torch.arange(5000.0)}

        def state_dict(self):
            return self.value

        def load_state_dict(self, value):
            self.value = value

    filesystem = pyarrow.fs._MockFileSystem()
    hanging = FaultyStorage(PyarrowStorage(filesystem), [Hang("sink.write", path="__0_")])
    run = DirectoryRun(RetryingStorage(hanging), "run", "run")
    # A call is given up after an eighth of this.
    checkpoint.save({"part": Part()}, step=1, run=run, num_files=1, timeout_s=4.0)

    hanging.release()
    for thread in threading.enumerate():
        if thread.name.startswith("storage"):
            thread.join(0.5)

    fresh = Part()
    fresh.value = None
    assert checkpoint.restore({"part": fresh}, run=run).step == 1
    assert torch.equal(fresh.value["t"], Part.value["t"])


def test_a_policy_is_cut_to_what_peers_wait_and_otherwise_kept(inner):
    patient = RetryPolicy(budget_s=100.0, attempt_s=1.0, first_pause_s=0.01)
    storage = RetryingStorage(inner, patient)

    limited = storage.within(40.0)

    assert limited.policy == RetryPolicy(budget_s=10.0, attempt_s=1.0, publish_s=10.0, first_pause_s=0.01)
    assert limited.retries is storage.retries


def test_a_save_and_a_restore_give_storage_up_before_their_peers_give_up_them(inner):
    calls = [Fail(call, num_times=None, error=RESET) for call in ("open_sink", "directories")]
    # Long enough for every test, and too long for a group whose deadline is 0.4 s.
    patient = RetryPolicy(budget_s=2.0, first_pause_s=0.01, longest_pause_s=0.01)
    run = DirectoryRun(RetryingStorage(FaultyStorage(inner, calls), patient), "run", "run")
    part = Progress()

    with pytest.raises(SaveFailed, match=r"still failing after 0\.1 s"):
        checkpoint.save({"part": part}, step=1, run=run, timeout_s=0.4)
    with pytest.raises(RankFailed, match=r"still failing after 0\.1 s"):
        checkpoint.restore({"part": part}, run=run, timeout_s=0.4)


def test_a_storage_that_is_sent_to_another_process_has_its_policy_there(inner):
    policy = RetryPolicy(budget_s=7.0, first_pause_s=0.5)
    assert pickle.loads(pickle.dumps(RetryingStorage(inner, policy))).policy == policy


def test_storage_does_not_draw_from_the_trainings_random_stream(inner):
    before = random.getstate()
    storage = RetryingStorage(FaultyStorage(inner, [Fail("write", error=ConnectionResetError())]), FAST)
    storage.write("d/file", b"x")

    assert storage.retries.total() == 1
    assert random.getstate() == before
