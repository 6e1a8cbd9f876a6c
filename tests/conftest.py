"""Fixtures that tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import servers

pytest.register_assert_rewrite("ray_stateful.testing.storage_tests")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[servers.S3Server]:
    """A real S3 server, started once. Use a bucket of your own: `s3_server.make_bucket(...)`."""
    with servers.s3_server() as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> servers.S3Server:
    """The server, with credentials for it in the environment, which processes started by the test inherit."""
    for name, value in servers.S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[servers.GcsServer]:
    """An emulator of Google Cloud Storage, started once. Use a bucket of your own."""
    with servers.gcs_server() as server:
        yield server


@pytest.fixture(scope="session")
def azure_server() -> Iterator[servers.AzureServer]:
    """An Azurite, started once. Use a container of your own."""
    if servers.AZURITE is None:
        # From npm, and not from PyPI: what installs the tests can't install it.
        pytest.skip(servers.AZURITE_MISSING)
    with servers.azure_server() as server:
        yield server
