"""`FaultyStorage` does what its faults say, at the call they name, and nothing else."""

from __future__ import annotations

import errno
import pickle
import threading

import pyarrow.fs
import pytest
import torch.distributed as dist

from ray_stateful.storage.base import Storage
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.testing import Delay, Fail, FaultyStorage, Flip, Hang, Truncate, run_ranks
from ray_stateful.testing.faulty_storage import CALLS


@pytest.fixture
def inner(tmp_path) -> Storage:
    return PyarrowStorage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()))


def make_each_call(storage: Storage) -> None:
    with storage.open_sink("d/streamed") as sink:
        sink.write(b"streamed")
    storage.write("d/written", b"written")
    storage.read("d/written")
    storage.sizes("d")
    storage.directories("")
    storage.delete("d")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_each_kind_of_call_fails_at_its_turn_and_only_then(inner, call, after):
    full = OSError(errno.ENOSPC, "full")
    storage = FaultyStorage(inner, [Fail(call, nth=2, error=full, after=after)])
    make_each_call(storage)
    with pytest.raises(OSError, match="full") as raised:
        make_each_call(storage)
    make_each_call(storage)

    assert raised.value is full
    assert storage.counts()[call] == 3


def test_a_file_whose_publishing_fails_is_not_there_and_one_whose_reply_is_lost_is(inner):
    storage = FaultyStorage(inner, [Fail("publish"), Fail("publish", nth=2, after=True)])
    for name in ("failed", "lost"):
        with pytest.raises(OSError, match="asked for"), storage.open_sink(f"d/{name}") as sink:
            sink.write(b"x")

    assert inner.sizes("d") == {"lost": 1}


def test_bytes_are_lost_and_bits_flipped_silently(inner):
    storage = FaultyStorage(
        inner,
        [Truncate("write", keep_bytes=3), Flip("read", nth=2, byte=-1), Truncate("sink.write", nth=2, path="big")],
    )
    storage.write("d/file", b"01234")
    with storage.open_sink("d/big") as sink:
        sink.write(b"ab")
        sink.write(b"cd")
        sink.write(b"ef")

    assert storage.read("d/file") == b"012"
    assert storage.read("d/file") == b"013"
    assert storage.read("d/big") == b"abef"


def test_a_hanging_call_ends_when_it_is_released(inner):
    storage = FaultyStorage(inner, [Hang("sizes"), Delay("directories", delay_s=3600)])
    threading.Timer(0.05, storage.release).start()
    with pytest.raises(TimeoutError, match="hung"):
        storage.sizes("d")

    assert storage.directories("") == []


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"sink.write", "write", "read"}))
def test_a_fault_of_data_in_a_call_without_data_is_refused(call):
    with pytest.raises(ValueError, match=rf"Flip needs a call that carries data, .*; {call!r} carries none"):
        Flip(call)


def test_a_fault_of_an_unknown_call_is_refused():
    with pytest.raises(ValueError, match=r"open_sink, sink\.write"):
        Fail("open")


def test_faults_cross_processes_and_counting_starts_anew(inner):
    storage = FaultyStorage(inner, [Fail("read", nth=2)])
    storage.write("file", b"x")
    storage.read("file")
    copy = pickle.loads(pickle.dumps(storage))

    assert copy.faults[0].due(2)
    assert copy.read("file") == b"x"


def write_on_each_rank(storage: FaultyStorage) -> str:
    storage.write(f"rank-{dist.get_rank()}", b"x")
    return "written"


def test_a_fault_of_one_rank_happens_on_that_rank_alone(inner):
    outcomes = run_ranks(3, write_on_each_rank, FaultyStorage(inner, [Fail("write", rank=1)]))

    assert [type(outcome) for outcome in outcomes] == [str, OSError, str]
    assert inner.sizes("") == {"rank-0": 1, "rank-2": 1}
