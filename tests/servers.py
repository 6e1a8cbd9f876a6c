"""Real storage servers, each a process of its own on a free port, that end with the test process.

A server's process watches its standard input: that is closed when the tests end, however they end.
"""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A moto S3 server. It keeps all objects in memory, and serves about 65 MB/s."""
    process = subprocess.Popen(
        [sys.executable, "-c", _S3_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, f"the S3 server ended with {process.wait()} before it listened"
        yield S3Server(int(port), process.pid)
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
