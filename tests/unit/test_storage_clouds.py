"""GCS and Azure, by their emulators: a save and its restore, damage, requests, and the words of each error.

What is counted or made to fail goes through a proxy in this process, and the client is in another one: that of GCS
waits for an answer with the interpreter's lock held.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import pyarrow.fs
import pytest
import torch

from ray_stateful import checkpoint
from ray_stateful.runs import DirectoryRun
from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.retries import RetryingStorage, RetryPolicy, is_transient
from ray_stateful.storage.uris import REQUEST_TIMEOUT_S, resolve, with_timeouts
from ray_stateful.testing import run_ranks
from tests import servers
from tests.proxy import Proxy, ProxyFaults, proxy
from tests.soak.kill_points import fresh_state, snapshot, state_of

FAST = RetryPolicy(budget_s=30.0, first_pause_s=0.01, longest_pause_s=0.1)
WRONG_KEY = "A" + servers.AZURITE_KEY[1:]


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket, or container, of a server of this machine; to be sent to a rank."""

    kind: str
    bucket: str
    port: int

    def by_way_of(self, between: Proxy) -> Place:
        return Place(self.kind, self.bucket, between.port)

    def filesystem(self, account_key: str = servers.AZURITE_KEY) -> pyarrow.fs.FileSystem:
        if self.kind == "azure":
            return servers.AzureServer(self.port).filesystem(account_key=account_key)
        # The client's own tries are not what is tested; a second is the least that it takes.
        uri = servers.GcsServer(self.port).uri(self.bucket) + "&retry_limit_seconds=1"
        return pyarrow.fs.FileSystem.from_uri(uri)[0]

    def storage(self) -> PyarrowStorage:
        return PyarrowStorage(with_timeouts(self.filesystem()))

    def run(self) -> DirectoryRun:
        path = f"{self.bucket}/run"
        return DirectoryRun(RetryingStorage(self.storage(), FAST), path, f"{self.kind}://{path}")


@pytest.fixture(params=["gcs", "azure"])
def place(request: pytest.FixtureRequest) -> Place:
    server = request.getfixturevalue(f"{request.param}_server")
    make = server.make_bucket if request.param == "gcs" else server.make_container
    return Place(request.param, make("clouds"), server.port)


@pytest.fixture
def between(place: Place) -> Iterator[Proxy]:
    with proxy(place.port) as running:
        yield running


def on_a_rank(function, *arguments):
    (outcome,) = run_ranks(1, function, *arguments, timeout_s=120)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def save(place, step):
    return checkpoint.save(state_of(step), step=step, run=place.run(), timeout_s=60).name


def restore(place):
    """Which step, and whether each bit is what that step holds."""
    fresh = fresh_state()
    report = checkpoint.restore(fresh, run=place.run(), verify="full", timeout_s=60)
    return report.step, snapshot(fresh) == snapshot(state_of(report.step)), dict(report.rejected)


# Of a save of two item files, an index, the metadata and a manifest: those about a file. GCS has two to write one;
# Azure asks what is there, makes an empty file, sends its one block and commits it. One more asks for the size of the
# first. How often GCS is asked for the directories depends on which of two threads comes first. Of a restore: all.
NUM_REQUESTS = {"gcs": (5 * 2 + 1, 22), "azure": (5 * 4 + 1, 18)}


def test_a_save_and_a_full_restore_are_bit_for_bit_and_take_so_many_requests(place, between):
    on_a_rank(save, place.by_way_of(between), 3)
    num_saving = between.count(r"distcp|\.metadata|index\.arrow|manifest\.json")
    num_before = between.count()

    assert on_a_rank(restore, place.by_way_of(between)) == (3, True, {})
    assert (num_saving, between.count() - num_before) == NUM_REQUESTS[place.kind]


@pytest.mark.parametrize("damage", ["missing", "cut short", "flipped"])
def test_a_damaged_or_missing_file_makes_the_older_checkpoint_the_one_that_is_restored(place, damage):
    save(place, 1)
    name = save(place, 2)
    storage, directory = place.storage(), f"{place.bucket}/run/{name}"
    path = posixpath.join(directory, min(file for file in storage.sizes(directory) if file.endswith(".distcp")))
    whole = storage.read(path)
    if damage == "missing":
        storage.filesystem.delete_file(path)
    else:
        storage.write(path, whole[:-1] if damage == "cut short" else bytes([whole[0] ^ 1]) + whole[1:])

    step, is_exact, rejected = restore(place)
    assert (step, is_exact, list(rejected)) == (1, True, [name])


@dataclass(frozen=True, slots=True)
class Case:
    """What is done while which requests go wrong in which way; and whether the error may pass."""

    operation: str
    fault: str | None
    may_pass: bool
    only: str = ""
    account_key: str = servers.AZURITE_KEY


# Reading a range asks for the file's size, and then for its bytes.
OF_BYTES = r"alt=media|^GET /devstoreaccount1/.*/there$"

ERRORS = [
    Case("read", "503", True),
    Case("read", "503", True, only=OF_BYTES),
    Case("read", "reset", True, only=OF_BYTES),
    Case("list", "500", True),
    Case("list", "403", False),
    Case("write", "reset", True),
    Case("write", "down", True),
    Case("read missing", None, False),
    Case("write without a bucket", None, False),
]
# The emulator of GCS takes any credentials; Azurite looks at them.
WRONG_KEYS = [Case(operation, None, False, account_key=WRONG_KEY) for operation in ("read", "write", "list")]


def provoke(cases, places):
    """On each rank, its case: what came of it, and what that is taken for."""
    case, place = cases[torch.distributed.get_rank()], places[torch.distributed.get_rank()]
    storage, bucket = PyarrowStorage(place.filesystem(case.account_key)), place.bucket
    try:
        if case.operation.startswith("write"):
            with storage.open_sink(f"{bucket if case.operation == 'write' else 'no-such-bucket'}/new") as sink:
                sink.write(b"x")
        elif case.operation == "list":
            storage.sizes(f"{bucket}/directory")
        else:
            storage.read(f"{bucket}/{'there' if case.operation == 'read' else 'not-there'}", 3, 3)
    except OSError as error:
        return is_transient(error, bucket), f"{type(error).__name__}: {error}"
    return None, "no error"


def test_errors_are_told_apart_in_the_words_of_each_cloud(place):
    place.storage().write(f"{place.bucket}/there", b"0123456789")
    cases = ERRORS + (WRONG_KEYS if place.kind == "azure" else [])
    with contextlib.ExitStack() as stack:
        places = []
        for case in cases:
            if case.fault == "down":
                places.append(Place(place.kind, place.bucket, 9))  # nobody listens there
            elif case.fault is None:
                places.append(place)
            else:
                faults = ProxyFaults(rate=1.0, kinds=(case.fault,), only=case.only)
                places.append(place.by_way_of(stack.enter_context(proxy(place.port, faults))))
        outcomes = run_ranks(len(cases), provoke, cases, places, timeout_s=120)

    assert [(case, case.may_pass) for case in cases] == [
        (case, outcome[0]) for case, outcome in zip(cases, outcomes, strict=True)
    ], outcomes


@pytest.mark.parametrize("place", ["gcs"], indirect=True)
def test_a_file_of_gcs_whose_first_bytes_do_not_come_is_read_at_the_next_try(place, between):
    place.storage().write(f"{place.bucket}/there", b"0123456789")
    # All that the client says of it is that the file is closed.
    between.set_faults(ProxyFaults(only="alt=media", nth=frozenset({1}), kinds=("503",)))

    content, num_retries = on_a_rank(read_with_retries, place.by_way_of(between))
    assert content == b"345"
    assert num_retries >= 1


def read_with_retries(place):
    storage = place.run().storage
    return storage.read(f"{place.bucket}/there", 3, 3), storage.retries["read"]


def test_a_storage_of_gcs_does_not_try_again_by_itself_for_longer_than_a_request_may_take():
    storage, _ = resolve("gs://anonymous@bucket/run?scheme=http&endpoint_override=127.0.0.1%3A9")
    as_given, _ = resolve("gs://anonymous@bucket/run?scheme=http&retry_limit_seconds=3")

    def limit(storage):
        return storage.inner.filesystem.__reduce__()[1][0]["retry_time_limit"]

    assert limit(storage) == timedelta(seconds=REQUEST_TIMEOUT_S)
    assert limit(as_given) == timedelta(seconds=3)


def test_a_directory_of_a_filesystem_gives_up_on_requests_as_soon_as_the_filesystem_does():
    gcs = pyarrow.fs.GcsFileSystem(anonymous=True)
    s3 = pyarrow.fs.S3FileSystem(anonymous=True, region="us-east-1")
    bare_gcs, bare_s3 = (with_timeouts(filesystem) for filesystem in (gcs, s3))
    for filesystem, expected in ((gcs, bare_gcs), (s3, bare_s3)):
        assert not filesystem.equals(expected)
        inner = pyarrow.fs.SubTreeFileSystem("bucket/runs", filesystem)
        found = with_timeouts(pyarrow.fs.SubTreeFileSystem("run", inner))
        assert (found.base_path, found.base_fs.base_path) == ("run/", "bucket/runs/")
        assert found.base_fs.base_fs.__reduce__() == expected.__reduce__()


@pytest.mark.parametrize("place", ["azure"], indirect=True)
def test_deleting_a_directory_of_azure_asks_for_no_lease_on_a_manifest_that_is_not_there(place, between):
    through = place.by_way_of(between)
    place.storage().write(f"{place.bucket}/orphan/__0_0.distcp", b"x")
    place.storage().write(f"{place.bucket}/checkpoint/manifest.json", b"x")
    on_a_rank(delete, through, "orphan")
    assert between.count("comp=lease") == 0

    on_a_rank(delete, through, "checkpoint")
    assert between.count(r"^PUT .*manifest\.json\?comp=lease") >= 1
    assert place.storage().directories(place.bucket) == []


def delete(place, name):
    place.storage().delete(f"{place.bucket}/{name}")
