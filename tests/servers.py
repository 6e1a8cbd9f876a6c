"""Real storage servers, each a process of its own on a free port, that end with the test process.

A server's process watches its standard input: that is closed when the tests end, however they end.
"""

from __future__ import annotations

import http.server
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow.fs

REGION = "us-east-1"

# What pyarrow, boto3 and Ray's workers need to talk to a server that takes any credentials. Without the second, a
# client asks the metadata service of a cloud machine first, which is not there, for seconds.
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": REGION,
    "AWS_SECRET_ACCESS_KEY": "test",
}

_S3_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

# The emulator serves one request after another as it is shipped. A client that reads ranges keeps one answer open while
# it asks for the next: that waits for ever. Its tables are not made for threads, so only what moves an object's bytes
# to the client is served beside the rest. Nor does it list what marks a directory beside the directory's files, which
# `includeTrailingDelimiter=True` asks for: pyarrow finds directories by that.
_GCS_SERVER = """
import http.server, logging, sys, threading
from functools import partial
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
logging.disable(logging.CRITICAL)
tables = threading.Lock()
class Handler(RequestHandler):
    def do_GET(self):
        if "alt=media" in self.path or not self.path.startswith("/storage/v1/"):
            super().do_GET()
        else:
            with tables:
                super().do_GET()
    def do_POST(self):
        with tables:
            super().do_POST()
    def do_PUT(self):
        # The client waits for this for a second before it sends the rest.
        if self.headers.get("Expect"):
            self.wfile.write(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
        with tables:
            super().do_PUT()
    def do_DELETE(self):
        with tables:
            super().do_DELETE()
class Listing(Storage):
    def _apply_list_delimiter(self, candidates, prefix, delimiter, match_glob):
        files, prefixes = super()._apply_list_delimiter(candidates, prefix, delimiter, match_glob)
        return files + [file for name, file in candidates if name in prefixes], prefixes
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    def handle_error(self, request, client_address):
        pass  # a client that drops an answer
server = Server(("127.0.0.1", 0), partial(Handler, Listing(use_memory_fs=True)))
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_address[1], flush=True)
sys.stdin.read()
"""

# Azurite is a program of Node's, and not from PyPI: the tests that need it run where it is found.
AZURITE = os.environ.get("AZURITE_BLOB") or shutil.which("azurite-blob")
AZURITE_MISSING = "azurite-blob is not installed: `npm install azurite`, and PATH or AZURITE_BLOB that leads to it"

# Of every Azurite, and printed in its manual.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

# Azurite does not watch its standard input; this process does, and ends it.
_AZURE_SERVER = """
import re, subprocess, sys
azurite = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
try:
    for line in azurite.stdout:
        if listening := re.search(r"successfully listens on http://127.0.0.1:(\\d+)", line):
            print(listening[1], flush=True)
            sys.stdin.read()
            break
finally:
    azurite.kill()
    azurite.wait()
"""


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where a running S3 server listens."""

    port: int
    pid: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a process that finds the server through its environment; pyarrow's `S3FileSystem` does, too."""
        return {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint}

    def make_bucket(self, bucket: str) -> str:
        request = urllib.request.Request(f"{self.endpoint}/{bucket}", method="PUT")
        with urllib.request.urlopen(request, timeout=30):
            return bucket

    def uri(self, path: str, port: int | None = None) -> str:
        """`path` ("bucket/directory") as Ray's `storage_path` and pyarrow take it; by way of a proxy at `port`."""
        where = f"endpoint_override=http%3A%2F%2F127.0.0.1%3A{port or self.port}"
        return f"s3://{path}?scheme=http&{where}&region={REGION}"


@dataclass(frozen=True, slots=True)
class GcsServer:
    """Where a running emulator of Google Cloud Storage listens."""

    port: int

    def make_bucket(self, prefix: str) -> str:
        """A new one."""
        bucket = f"{prefix}-{secrets.token_hex(4)}"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/storage/v1/b?project=p",
            data=json.dumps({"name": bucket}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30):
            return bucket

    def uri(self, path: str, port: int | None = None) -> str:
        """`path` ("bucket/directory") as pyarrow takes it; by way of a proxy at `port`."""
        return f"gs://anonymous@{path}?scheme=http&endpoint_override=127.0.0.1%3A{port or self.port}"


@dataclass(frozen=True, slots=True)
class AzureServer:
    """Where a running Azurite listens."""

    port: int

    def filesystem(self, port: int | None = None, account_key: str = AZURITE_KEY) -> pyarrow.fs.FileSystem:
        """The account's filesystem; by way of a proxy at `port`. No URI of pyarrow's takes an account key."""
        where = f"127.0.0.1:{port or self.port}"
        return pyarrow.fs.AzureFileSystem(
            account_name=AZURITE_ACCOUNT,
            account_key=account_key,
            blob_storage_authority=where,
            dfs_storage_authority=where,
            blob_storage_scheme="http",
            dfs_storage_scheme="http",
        )

    def make_container(self, prefix: str) -> str:
        """A new one: of one that is there, Azurite's answer makes the client wait for seconds, now and then."""
        container = f"{prefix}-{secrets.token_hex(4)}"
        self.filesystem().create_dir(container)
        return container


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A moto S3 server. It keeps all objects in memory, and serves about 65 MB/s."""
    with _python_server(_S3_SERVER) as (port, pid):
        yield S3Server(port, pid)


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """An emulator of Google Cloud Storage. It keeps all objects in memory."""
    with _python_server(_GCS_SERVER) as (port, _):
        yield GcsServer(port)


@contextmanager
def azure_server() -> Iterator[AzureServer]:
    """An Azurite blob server. It keeps all objects in memory. `AZURITE` must not be `None`."""
    assert AZURITE is not None
    # The newest API version that a client asks for is always newer than the newest that Azurite knows.
    flags = ["--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with _python_server(_AZURE_SERVER, AZURITE, *flags) as (port, _):
        yield AzureServer(port)


@contextmanager
def _python_server(source: str, *arguments: str) -> Iterator[tuple[int, int]]:
    """The port and process id of a server whose program prints its port, and ends with its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, f"the server ended with {process.wait()} before it listened"
        yield int(port), process.pid
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class _Lying(http.server.BaseHTTPRequestHandler):
    """Takes any object, says that all is well, and has stored the chunked upload's framing as part of it."""

    protocol_version = "HTTP/1.1"
    num_bytes = 0

    def do_PUT(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).num_bytes = len(body) + 50
        self._answer({"ETag": '"0"'}, 0)

    def do_HEAD(self) -> None:
        self._answer({"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, self.num_bytes)

    def do_DELETE(self) -> None:
        self._answer({}, 0)

    def _answer(self, headers: dict[str, str], length: int) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def lying_server() -> Iterator[int]:
    """A server on a free port that keeps more bytes of an object than it was given, as some S3-compatible ones do."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Lying) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
