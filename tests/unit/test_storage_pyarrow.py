"""What `PyarrowStorage` does beyond the conformance suite: durability, requests, limits, and servers that lie."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ray_stateful.errors import DamagedCheckpoint, StorageError
from ray_stateful.format import layout
from ray_stateful.storage.local import ASIDE_PREFIX, LocalSink
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.reading import read_exactly
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy
from ray_stateful.storage.uris import resolve
from tests.proxy import Proxy, ProxyFaults, proxy
from tests.servers import S3_ENVIRONMENT, S3Server, lying_server


@pytest.fixture
def local(tmp_path: Path) -> PyarrowStorage:
    return PyarrowStorage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()))


@pytest.fixture
def between(s3_environment: S3Server) -> Iterator[Proxy]:
    with proxy(s3_environment.port) as running:
        yield running


@pytest.fixture
def s3(s3_environment: S3Server, between: Proxy) -> PyarrowStorage:
    s3_environment.make_bucket("bucket")
    storage, _ = resolve(s3_environment.uri("bucket", between.port))
    assert isinstance(storage.inner, PyarrowStorage)
    return storage.inner


def test_a_file_being_written_is_no_file_of_the_directory_and_an_abandoned_one_stays_out_of_listings(local, tmp_path):
    with local.open_sink("checkpoint/file") as sink:
        sink.write(b"part")
        (aside,) = os.listdir(tmp_path / "checkpoint")
        assert aside.startswith(ASIDE_PREFIX)
        assert local.sizes("checkpoint") == {}
    (tmp_path / "checkpoint" / f"{ASIDE_PREFIX}of-a-dead-process").write_bytes(b"x")
    (tmp_path / f"{ASIDE_PREFIX}directory").mkdir()

    assert os.listdir(tmp_path / "checkpoint").count("file") == 1
    assert local.sizes("checkpoint") == {"file": 4}
    assert local.directories("") == ["checkpoint"]


_KILLED_WRITER = """
import os, sys
import pyarrow.fs
from ray_stateful.storage.pyarrow import PyarrowStorage
storage = PyarrowStorage(pyarrow.fs.LocalFileSystem())
storage.write(sys.argv[1] + "/manifest.json", b"first")
os.write(1, b"ready")
with storage.open_sink(sys.argv[1] + "/manifest.json") as sink:
    sink.write(b"second, and longer")
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: it kills at an exact system call")
@pytest.mark.parametrize(
    ("call", "when", "found"),
    [("fsync", 4, b"first"), ("rename", 2, b"first"), ("fsync", 5, b"second, and longer")],
    ids=["before the file is on the disk", "before it has its name", "before its name is on the disk"],
)
def test_a_writer_killed_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path, call, when, found):
    """Killed on entering the call, so before what it does."""
    inject = f"inject={call}:signal=KILL:when={when}"
    subprocess.run(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            inject,
            sys.executable,
            "-c",
            _KILLED_WRITER,
            str(tmp_path / "c"),
        ],
        check=False,
        timeout=60,
    )

    assert (tmp_path / "c" / "manifest.json").read_bytes() == found


def test_a_file_and_its_directories_are_flushed_to_the_disk_before_writing_returns(local, tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))
    )

    local.write("run/checkpoint/file", b"x")

    aside = f"{tmp_path}/run/checkpoint/{ASIDE_PREFIX}"
    assert [name if not name.startswith(aside) else "aside" for name in flushed] == [
        str(tmp_path),
        f"{tmp_path}/run",
        "aside",
        f"{tmp_path}/run/checkpoint",
    ]


def test_that_a_manifest_is_gone_is_on_the_disk_before_another_file_is_deleted(local, tmp_path, monkeypatch):
    for name in (layout.MANIFEST, "item"):
        local.write(f"checkpoint/{name}", b"x")
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (flushed.append(os.listdir(f"/proc/self/fd/{descriptor}")), fsync(descriptor))
    )

    local.delete("checkpoint")

    assert flushed == [["item"], []]


def test_a_file_of_which_the_disk_has_less_than_was_written_is_an_error_that_says_so_and_leaves_nothing(tmp_path):
    sink = LocalSink(str(tmp_path / "file"))
    sink.write(b"12345")
    (aside,) = tmp_path.iterdir()
    os.truncate(aside, 3)

    with pytest.raises(OSError, match="wrote 5 bytes and 3 are there"):
        sink.__exit__(None, None, None)

    assert os.listdir(tmp_path) == []


def test_a_failing_disk_write_is_an_error_that_says_so_and_leaves_nothing(tmp_path):
    code = f"""
import resource, signal, pyarrow.fs
from ray_stateful.storage.pyarrow import PyarrowStorage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
storage = PyarrowStorage(pyarrow.fs.LocalFileSystem())
try:
    storage.write({str(tmp_path)!r} + "/d/file", bytes(5000))
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "27"
    assert os.listdir(tmp_path / "d") == []


def test_a_directory_in_which_others_delete_and_write_is_deleted_and_one_that_is_denied_tried_once(
    local, tmp_path, monkeypatch
):
    errors = [OSError(errno.ENOTEMPTY, "not empty"), FileNotFoundError(errno.ENOENT, "gone")]
    real, calls = shutil.rmtree, []

    def rmtree(path):
        calls.append(path)
        if errors:
            raise errors.pop()
        real(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    local.write("checkpoint/file", b"x")
    local.delete("checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert len(calls) == 3

    local.write("checkpoint/file", b"x")
    errors.append(PermissionError(errno.EACCES, "denied"))
    with pytest.raises(PermissionError):
        local.delete("checkpoint")
    assert len(calls) == 4


def test_deleting_follows_no_link_out_of_the_directory(local, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_bytes(b"x")
    local.write("checkpoint/file", b"x")
    (tmp_path / "checkpoint" / "link").symlink_to(tmp_path / "outside")
    local.delete("checkpoint")

    assert (tmp_path / "outside" / "kept").exists()
    assert not (tmp_path / "checkpoint").exists()


def test_a_link_is_not_deleted_nor_anything_behind_it(local, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / layout.MANIFEST).write_bytes(b"x")
    (tmp_path / "checkpoint").symlink_to(tmp_path / "outside")

    with pytest.raises(OSError, match="is a link"):
        local.delete("checkpoint")
    assert (tmp_path / "outside" / layout.MANIFEST).exists()


def test_a_leading_slash_does_not_lead_out_of_a_subtree(local, tmp_path):
    local.write("/a/file", b"x")

    assert (tmp_path / "a" / "file").read_bytes() == b"x"


def test_a_small_file_is_one_request_and_the_size_of_the_first_is_looked_at(s3, between):
    s3.write("bucket/small/file", b"x" * 1000)
    s3.write("bucket/small/other", b"x" * 1000)

    assert [seen.line for seen in between.requests] == [
        "PUT /bucket/small/file",
        "HEAD /bucket/small/file",
        "PUT /bucket/small/other",
    ]


def test_the_size_of_the_first_file_in_parts_is_looked_at_also_after_a_small_one(s3, between):
    s3.write("bucket/parts/small", b"x")
    for name in ("first", "second"):
        with s3.open_sink(f"bucket/parts/{name}") as sink:
            sink.write(bytes(10 << 20))

    assert between.count("HEAD /bucket/parts/small") == between.count("HEAD /bucket/parts/first") == 1
    assert between.count("HEAD /bucket/parts/second") == 0


def test_of_files_that_are_written_at_the_same_time_the_size_of_one_is_looked_at(s3, between):
    together = threading.Barrier(6)

    def write(number):
        together.wait(20)
        s3.write(f"bucket/together/{number}", b"x" * 1000)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))

    assert between.count("PUT /bucket/together/") == 6
    assert between.count("HEAD /bucket/together/") == 1


def test_ranges_of_one_file_ask_for_its_size_once(s3, between):
    s3.write("bucket/ranges/file", bytes(100_000))
    for start in range(0, 50_000, 10_000):
        s3.read("bucket/ranges/file", start, 1000)

    assert between.count(r"GET /bucket/ranges/file") == 5
    assert between.count(r"HEAD /bucket/ranges/file") == 2


def test_an_open_that_hangs_is_given_up_and_the_file_opened_again_by_all_who_wait_for_it(s3, between):
    s3.write("bucket/hung/file", bytes(100_000))
    between.set_faults(ProxyFaults(only="HEAD /bucket/hung/file", nth=frozenset({1}), kinds=("stall",), stall_s=60.0))
    storage = RetryingStorage(s3, RetryPolicy(attempt_s=1.0, budget_s=3.0, first_pause_s=0.01))
    with ThreadPoolExecutor(max_workers=4) as pool:
        parts = list(pool.map(lambda start: storage.read("bucket/hung/file", start, 1000), range(0, 4000, 1000)))

    assert parts == [bytes(1000)] * 4
    # One that looked at what was written, the one that hangs, and one for all who tried again.
    assert between.count(r"HEAD /bucket/hung/file") == 2


def test_a_file_that_another_process_grew_is_read_to_its_new_end(s3, s3_environment):
    other, _ = resolve(s3_environment.uri("bucket"))
    s3.write("bucket/grown/file", b"short")
    assert s3.read("bucket/grown/file", 0, 5) == b"short"
    other.write("bucket/grown/file", b"longer than before")

    assert s3.read("bucket/grown/file", 0, 100) == b"longer than before"


class CutOffFile(MemoryFile):
    """A file whose answers are cut off until there were `num_cut_off` of all files."""

    def read(self, size=-1):
        data = super().read(size)
        return data[: len(data) // 2] if self.fs.num_cut_off > next(self.fs.num_read) else data


class CutOff(MemoryFileSystem):
    """Files in memory; of the first `num_cut_off` answers, only the first half arrives."""

    cachable = False
    num_cut_off = 0

    def _open(self, path, mode="rb", **kwargs):
        file = super()._open(path, mode, **kwargs)
        if mode == "rb":
            file = CutOffFile(self, path, file.getvalue())
        return file


def test_an_answer_that_is_cut_off_is_asked_for_again_and_no_damage():
    filesystem = CutOff()
    filesystem.num_read = itertools.count()
    storage = RetryingStorage(
        PyarrowStorage(pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))), RetryPolicy(first_pause_s=0.01)
    )
    content = os.urandom(1000)
    storage.write("cut-off/file", content)

    filesystem.num_cut_off = 2
    assert read_exactly(storage, "cut-off", "file", 100, 900) == content[100:900]
    assert storage.retries == {"read": 2}
    # There is no more of it: that is damage, and no retry would help.
    with pytest.raises(DamagedCheckpoint, match="ends 100 bytes before byte 1,100"):
        read_exactly(storage, "cut-off", "file", 100, 1100)
    assert storage.retries == {"read": 2}


@pytest.mark.parametrize("path", ["bucket/lost/small", "bucket/lost/large"])
def test_a_lost_reply_to_the_completing_request_is_not_a_failed_write(s3, between, path):
    completing = r"PUT .*small" if path.endswith("small") else r"POST .*uploadId"
    # The client tries three times by itself; each of its replies is lost.
    between.set_faults(ProxyFaults(only=completing, nth=frozenset({1, 2, 3}), kinds=("lost_reply",)))
    data = os.urandom(1000 if path.endswith("small") else 11 << 20)
    if path.endswith("small"):
        s3.write(path, data)
    else:
        with s3.open_sink(path) as sink:
            sink.write(data)

    assert between.num_faults() >= 1
    assert s3.read(path) == data


def test_a_failed_write_of_an_object_leaves_the_old_one(s3, between):
    s3.write("bucket/old/file", b"old")
    between.set_faults(ProxyFaults(rate=1.0, only="PUT ", kinds=("reset",)))
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        s3.write("bucket/old/file", b"new")

    assert s3.read("bucket/old/file") == b"old"


def test_a_server_that_stores_something_else_is_found_out_each_time(monkeypatch):
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with lying_server() as port:
        storage, path = resolve(S3Server(port, os.getpid()).uri("bucket/file"))
        for _ in range(2):
            with pytest.raises(StorageError, match="wrote 1,000 bytes, and the storage has 1,1"):
                storage.write(path, bytes(1000))


def test_a_file_larger_than_the_storage_takes_is_refused_before_it_is_sent(s3, between):
    assert s3.max_file_bytes == 10_000 * (10 << 20)

    def write_too_much() -> None:
        with s3.open_sink("bucket/huge/file") as sink:
            sink._size = s3.max_file_bytes - 10  # as if so much had been written
            sink.write(bytes(11))

    with pytest.raises(OSError, match="split it"):
        write_too_much()
    assert between.count("POST") == 0


_SLOW_WRITER = """
import resource, sys
from ray_stateful.storage.uris import resolve
storage, path = resolve(sys.argv[1])
storage = storage.inner
storage.write(path + "/warm", bytes(12 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = bytes(4 << 20)
with storage.open_sink(path + "/large") as sink:
    for _ in range(32):
        sink.write(part)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_memory_stays_bounded_while_a_slow_server_is_behind(s3_environment, between):
    s3_environment.make_bucket("slow")
    between.set_faults(ProxyFaults(latency_s=0.2))
    uri = s3_environment.uri("slow", between.port)
    done = subprocess.run(
        [sys.executable, "-c", _SLOW_WRITER, uri], capture_output=True, text=True, timeout=120, check=True
    )

    # 128 MiB are written; without backpressure most of them wait in memory.
    assert int(done.stdout) < 100


def test_neither_text_nor_error_of_a_storage_shows_its_secret():
    filesystem = pyarrow.fs.S3FileSystem(
        access_key="AKIAEXAMPLE", secret_key="the-secret", endpoint_override="127.0.0.1:9", scheme="http"
    )
    storage = PyarrowStorage(filesystem)

    assert "secret" not in repr(storage) + str(storage) + str(vars(storage))


def test_a_storage_survives_pickling_with_its_files_open(s3):
    s3.write("bucket/pickled/file", b"0123456789")
    s3.read("bucket/pickled/file", 1, 2)

    assert pickle.loads(pickle.dumps(s3)).read("bucket/pickled/file", 1, 2) == b"12"


@pytest.mark.parametrize("uri", ["{}", "file://{}"])
def test_a_path_of_this_machine_and_its_uri_are_the_same_place(tmp_path, uri):
    storage, path = resolve(uri.format(tmp_path))
    storage.write(f"{path}/file", b"x")

    assert (tmp_path / "file").read_bytes() == b"x"
    assert storage.max_file_bytes is None


def test_a_gz_file_is_stored_as_it_is(s3):
    s3.write("bucket/gz/file.gz", b"not compressed")

    assert s3.read("bucket/gz/file.gz") == b"not compressed"
    assert s3.sizes("bucket/gz") == {"file.gz": 14}


def test_a_first_read_past_the_end_opens_the_object_once_and_a_later_one_sees_that_it_grew(s3_server, s3_environment):
    opened = []

    class Counting(PyarrowStorage):
        def _open_file(self, path):
            opened.append(path)
            return super()._open_file(path)

    inner, path = resolve(s3_server.uri(f"{s3_server.make_bucket('once')}/object"))
    storage = Counting(inner.inner.filesystem)
    inner.write(path, b"short")

    assert storage.read(path, 0, 1000) == b"short"
    assert len(opened) == 1
    inner.write(path, b"longer than that")
    assert storage.read(path, 0, 1000) == b"longer than that"
