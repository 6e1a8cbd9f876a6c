"""The conformance suite of `Storage`: subclass it, give it a fixture, and pytest runs it against your storage.

    class TestMyStorage(StorageTests):
        @pytest.fixture
        def storage(self):
            return MyStorage(...)

With `pytest.register_assert_rewrite("ray_stateful.testing.storage_tests")` in a conftest.py, before the import, a
failure shows what was compared.

Every test works below a directory of its own, `base`, and leaves nothing that another one sees. A storage may keep
files in memory, in a bucket or on a disk; the name of a test is the sentence that must be true of it.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from typing_extensions import Buffer

from ray_stateful.errors import StorageError
from ray_stateful.storage.base import Storage

# What the protocol asks for; and what a layer above it raises instead once it has given up.
REFUSED = (OSError, StorageError)


class Interrupted(Exception):
    """What a writer in these tests fails with: an error that does not come from the storage."""


class StorageTests:
    """A storage that passes these can hold checkpoints.

    Attributes:
        root: A directory that the storage may write in; on an object store, its bucket.
        large_bytes: How much the test of a large file writes; more than the storage sends in one request.
        aborted_files_vanish: Whether a file whose writing failed leaves nothing at all.
        partial_files_show: Whether a part of a file can be seen before all of it is written. Such a storage holds
            checkpoints only because of their manifest, and is named as an exception where it is tested.
    """

    root = ""
    large_bytes = 24 << 20
    aborted_files_vanish = True
    partial_files_show = False

    @pytest.fixture
    def storage(self) -> Storage:
        # For the author of a subclass: pytest's own error would not say what to provide.
        raise NotImplementedError("give the subclass a fixture called `storage`")

    @pytest.fixture
    def base(self, storage: Storage) -> Iterator[str]:
        base = f"{self.root}/conformance-{secrets.token_hex(6)}" if self.root else f"conformance-{secrets.token_hex(6)}"
        yield base
        storage.delete(base)

    def test_a_small_file_reads_as_it_was_written(self, storage: Storage, base: str) -> None:
        contents: list[Buffer] = [b"", b"x", bytes(range(256)), bytearray(b"mutable"), memoryview(b"a view")[2:]]
        for number, data in enumerate(contents):
            storage.write(f"{base}/file-{number}", data)

            assert storage.read(f"{base}/file-{number}") == bytes(data)

    def test_a_streamed_file_reads_as_it_was_written(self, storage: Storage, base: str) -> None:
        parts: list[Buffer] = [b"", b"head", memoryview(bytes(range(256)) * 5000), bytearray(b"tail")]
        with storage.open_sink(f"{base}/streamed") as sink:
            for part in parts:
                sink.write(part)

        assert storage.read(f"{base}/streamed") == b"".join(bytes(part) for part in parts)

    def test_a_streamed_file_without_a_byte_is_an_empty_file(self, storage: Storage, base: str) -> None:
        with storage.open_sink(f"{base}/empty"):
            pass

        assert storage.read(f"{base}/empty") == b""
        assert dict(storage.sizes(base)) == {"empty": 0}

    def test_a_written_buffer_may_be_reused_at_once(self, storage: Storage, base: str) -> None:
        buffer = bytearray(1 << 20)
        with storage.open_sink(f"{base}/reused") as sink:
            for value in range(4):
                buffer[:] = bytes([value]) * len(buffer)
                sink.write(buffer)

        read = storage.read(f"{base}/reused")
        assert read == b"".join(bytes([value]) * len(buffer) for value in range(4))

    def test_a_large_file_reads_as_it_was_written_whole_and_in_ranges(self, storage: Storage, base: str) -> None:
        block = secrets.token_bytes(1 << 20)
        num_blocks = self.large_bytes >> 20
        with storage.open_sink(f"{base}/large") as sink:
            for number in range(num_blocks):
                sink.write(number.to_bytes(8, "big"))
                sink.write(block)
        expected = b"".join(number.to_bytes(8, "big") + block for number in range(num_blocks))

        assert storage.read(f"{base}/large") == expected
        at = len(expected) // 2 - 1000
        assert storage.read(f"{base}/large", at, 3_000_000) == expected[at : at + 3_000_000]
        assert storage.sizes(base)["large"] == len(expected)

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, None), (3, None), (0, 4), (3, 4), (9, 1), (0, 0), (5, 0), (10, None), (10, 5)]
    )
    def test_a_range_is_that_range(self, storage: Storage, base: str, offset: int, length: int | None) -> None:
        storage.write(f"{base}/digits", b"0123456789")

        stop = None if length is None else offset + length
        assert storage.read(f"{base}/digits", offset, length) == b"0123456789"[offset:stop]

    def test_a_range_ends_where_the_file_ends(self, storage: Storage, base: str) -> None:
        storage.write(f"{base}/digits", b"0123456789")

        assert storage.read(f"{base}/digits", 7, 100) == b"789"
        assert storage.read(f"{base}/digits", 40, 1) == b""
        assert storage.read(f"{base}/digits", 0, 1 << 60) == b"0123456789"

    @pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, -1)])
    def test_a_negative_range_is_refused(self, storage: Storage, base: str, offset: int, length: int) -> None:
        storage.write(f"{base}/digits", b"0123456789")

        with pytest.raises(REFUSED, match="not negative"):
            storage.read(f"{base}/digits", offset, length)

    def test_threads_read_ranges_of_one_file_at_once(self, storage: Storage, base: str) -> None:
        data = secrets.token_bytes(1 << 20)
        storage.write(f"{base}/shared", data)
        starts = [(number * 7919) % (len(data) - 5000) for number in range(64)]

        with ThreadPoolExecutor(max_workers=8) as pool:
            read = list(pool.map(lambda start: storage.read(f"{base}/shared", start, 5000), starts))

        assert read == [data[start : start + 5000] for start in starts]

    def test_threads_write_files_of_one_directory_at_once(self, storage: Storage, base: str) -> None:
        def stream(number: int) -> None:
            with storage.open_sink(f"{base}/new/file-{number}") as sink:
                for _ in range(8):
                    sink.write(bytes([number]) * 10_000)

        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(stream, range(8)))

        assert dict(storage.sizes(f"{base}/new")) == {f"file-{number}": 80_000 for number in range(8)}
        assert all(storage.read(f"{base}/new/file-{number}", 79_999) == bytes([number]) for number in range(8))

    def test_a_missing_file_is_file_not_found(self, storage: Storage, base: str) -> None:
        storage.write(f"{base}/there", b"x")

        for length in (None, 5):
            with pytest.raises(FileNotFoundError):
                storage.read(f"{base}/not-there", 0, length)
            with pytest.raises(FileNotFoundError):
                storage.read(f"{base}/no-directory/not-there", 0, length)

    def test_a_file_does_not_appear_before_it_is_complete(self, storage: Storage, base: str) -> None:
        with storage.open_sink(f"{base}/pending") as sink:
            sink.write(b"x" * 100_000)
            # An empty file can be told from a whole one by its size; a part of a file can't.
            assert self.partial_files_show or storage.sizes(base).get("pending", 0) == 0

        assert dict(storage.sizes(base)) == {"pending": 100_000}

    def test_an_error_while_writing_leaves_no_file_that_looks_whole(self, storage: Storage, base: str) -> None:
        with pytest.raises(Interrupted), storage.open_sink(f"{base}/interrupted") as sink:  # noqa: PT012 - the body is the test
            sink.write(b"x" * 100_000)
            raise Interrupted

        assert storage.sizes(base).get("interrupted", 0) < 100_001
        if self.aborted_files_vanish:
            assert dict(storage.sizes(base)) == {}

    def test_an_interrupted_file_can_be_written_again(self, storage: Storage, base: str) -> None:
        with suppress(Interrupted), storage.open_sink(f"{base}/again") as sink:
            sink.write(b"first try, longer than the second")
            raise Interrupted
        with storage.open_sink(f"{base}/again") as sink:
            sink.write(b"second try")

        assert storage.read(f"{base}/again") == b"second try"
        assert dict(storage.sizes(base)) == {"again": 10}

    def test_a_file_written_again_is_the_new_one(self, storage: Storage, base: str) -> None:
        storage.write(f"{base}/file", b"old and long")
        assert storage.read(f"{base}/file", 0, 3) == b"old"
        storage.write(f"{base}/file", b"new")

        assert storage.read(f"{base}/file") == b"new"
        assert storage.read(f"{base}/file", 0, 100) == b"new"
        assert dict(storage.sizes(base)) == {"file": 3}

    def test_a_listing_has_what_lies_directly_in_the_directory(self, storage: Storage, base: str) -> None:
        for path in ("b", "a", ".hidden", "sub/c", "sub/deeper/d", "other/e"):
            storage.write(f"{base}/{path}", path.encode())

        assert dict(storage.sizes(base)) == {"a": 1, "b": 1, ".hidden": 7}
        assert storage.directories(base) == ["other", "sub"]
        assert storage.directories(f"{base}/sub") == ["deeper"]
        assert dict(storage.sizes(f"{base}/sub")) == {"c": 5}

    def test_a_directory_that_is_not_there_lists_as_empty(self, storage: Storage, base: str) -> None:
        storage.write(f"{base}/file", b"x")

        assert dict(storage.sizes(f"{base}/none")) == {}
        assert storage.directories(f"{base}/none") == []
        assert dict(storage.sizes(f"{base}/fil")) == {}

    def test_names_that_begin_alike_are_different_directories(self, storage: Storage, base: str) -> None:
        storage.write(f"{base}/checkpoint_1/file", b"x")
        storage.write(f"{base}/checkpoint_10/file", b"xy")
        storage.delete(f"{base}/checkpoint_1")

        assert storage.directories(base) == ["checkpoint_10"]
        assert storage.read(f"{base}/checkpoint_10/file") == b"xy"

    def test_a_deleted_directory_is_gone_with_all_in_it(self, storage: Storage, base: str) -> None:
        for path in ("manifest.json", "__0_0.distcp", ".metadata", "sub/deeper/file"):
            storage.write(f"{base}/gone/{path}", b"x")
        storage.write(f"{base}/kept", b"x")
        assert storage.read(f"{base}/gone/__0_0.distcp", 0, 1) == b"x"
        storage.delete(f"{base}/gone")

        assert storage.directories(base) == []
        assert dict(storage.sizes(f"{base}/gone")) == {}
        assert dict(storage.sizes(base)) == {"kept": 1}
        with pytest.raises(FileNotFoundError):
            storage.read(f"{base}/gone/__0_0.distcp", 0, 1)

    def test_deleting_what_is_not_there_succeeds(self, storage: Storage, base: str) -> None:
        storage.delete(f"{base}/never")
        storage.write(f"{base}/once/file", b"x")
        storage.delete(f"{base}/once")
        storage.delete(f"{base}/once")

        assert storage.directories(base) == []

    @pytest.mark.parametrize("path", ["../outside", "in/../../outside", ".."])
    def test_a_path_that_leads_outside_is_refused(self, storage: Storage, base: str, path: str) -> None:
        with pytest.raises(REFUSED, match=r"\.\."):
            storage.write(f"{base}/{path}", b"x")
        with pytest.raises(REFUSED, match=r"\.\."):
            storage.read(f"{base}/{path}")
        with pytest.raises(REFUSED, match=r"\.\."):
            storage.delete(f"{base}/{path}")

    @pytest.mark.parametrize("path", ["", "/", "."])
    def test_the_root_is_not_deleted(self, storage: Storage, path: str) -> None:
        with pytest.raises(REFUSED, match="root"):
            storage.delete(path)

    def test_a_pickled_storage_sees_the_same_files(self, storage: Storage, base: str) -> None:
        storage.write(f"{base}/file", b"content")
        copy = pickle.loads(pickle.dumps(storage))

        assert copy.read(f"{base}/file") == b"content"
