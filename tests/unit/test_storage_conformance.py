"""Every filesystem we name passes the suite that we ship for storages."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow.fs
import pytest

from ray_stateful.storage.pyarrow import PyarrowStorage
from ray_stateful.storage.retries import RetryingStorage
from ray_stateful.storage.uris import resolve
from ray_stateful.testing import FaultyStorage
from ray_stateful.testing.storage_tests import StorageTests
from tests.servers import AzureServer, GcsServer, S3Server


class TestLocal(StorageTests):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> PyarrowStorage:
        self.root = str(tmp_path)
        return PyarrowStorage(pyarrow.fs.LocalFileSystem())


class TestLocalSubtree(StorageTests):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> PyarrowStorage:
        return PyarrowStorage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()))


class TestFsspecLocal(StorageTests):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> PyarrowStorage:
        self.root = str(tmp_path)
        return PyarrowStorage(pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("file"))))


class TestFsspecMemory(StorageTests):
    partial_files_show = True  # its files are in its table from the moment they are opened

    @pytest.fixture
    def storage(self) -> PyarrowStorage:
        return PyarrowStorage(pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("memory"))))


class TestS3(StorageTests):
    """As a URI gives it: with retries and deadlines."""

    @pytest.fixture
    def storage(self, s3_environment: S3Server) -> RetryingStorage:
        storage, self.root = resolve(s3_environment.uri(s3_environment.make_bucket("conformance")))
        return storage


class TestS3Subtree(StorageTests):
    large_bytes = 1 << 20

    @pytest.fixture
    def storage(self, s3_environment: S3Server) -> PyarrowStorage:
        bucket = s3_environment.make_bucket("conformance")
        filesystem, _ = pyarrow.fs.FileSystem.from_uri(s3_environment.uri(bucket))
        return PyarrowStorage(pyarrow.fs.SubTreeFileSystem(f"{bucket}/directory", filesystem))


class TestGcs(StorageTests):
    """As a URI gives it: with retries and deadlines."""

    large_bytes = 9 << 20

    @pytest.fixture
    def storage(self, gcs_server: GcsServer) -> RetryingStorage:
        storage, self.root = resolve(gcs_server.uri(gcs_server.make_bucket("conformance")))
        return storage


class TestGcsSubtree(StorageTests):
    large_bytes = 1 << 20

    @pytest.fixture
    def storage(self, gcs_server: GcsServer) -> PyarrowStorage:
        bucket = gcs_server.make_bucket("subtree")
        filesystem, _ = pyarrow.fs.FileSystem.from_uri(gcs_server.uri(bucket))
        return PyarrowStorage(pyarrow.fs.SubTreeFileSystem(f"{bucket}/directory", filesystem))


class TestAzure(StorageTests):
    """With retries and deadlines."""

    large_bytes = 11 << 20

    @pytest.fixture
    def storage(self, azure_server: AzureServer) -> RetryingStorage:
        self.root = azure_server.make_container("conformance")
        return RetryingStorage(PyarrowStorage(azure_server.filesystem()))


class TestAzureSubtree(StorageTests):
    large_bytes = 1 << 20

    @pytest.fixture
    def storage(self, azure_server: AzureServer) -> PyarrowStorage:
        container = azure_server.make_container("subtree")
        return PyarrowStorage(pyarrow.fs.SubTreeFileSystem(f"{container}/directory", azure_server.filesystem()))


class TestFaultyWithoutFaults(StorageTests):
    large_bytes = 1 << 20

    @pytest.fixture
    def storage(self, tmp_path: Path) -> FaultyStorage:
        return FaultyStorage(PyarrowStorage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())))
