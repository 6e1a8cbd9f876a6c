"""A small S3 server that is faster than its clients: objects lie in memory files and go out by `sendfile`.

Enough of S3 for pyarrow, s3fs and boto3: objects, ranges, multipart uploads, listings, deletion. It signs nothing and
believes every signature. Two more paths are for whoever measures: `GET /-/stats` says what was asked since the last
time, and `PUT /-/latency?ms=30` makes every later request wait that long for its answer.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

REGION = "us-east-1"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": REGION,
    "AWS_SECRET_ACCESS_KEY": "test",
}

_READ_BYTES = 256 << 10


class Body:
    """Bytes in a file of memory, freed with the last reference."""

    def __init__(self) -> None:
        self._file = os.memfd_create("object")
        self.size = 0

    def __del__(self) -> None:
        os.close(self._file)

    def receive(self, reader: BinaryIO) -> None:
        """Append all that `reader` has."""
        # Written, not received into a mapping: that costs a fault for each page, and twice the time.
        while piece := reader.read(_READ_BYTES):
            os.write(self._file, piece)
            self.size += len(piece)

    def send(self, to: socket.socket, start: int, stop: int) -> None:
        while start < stop:
            start += os.sendfile(to.fileno(), self._file, start, stop - start)

    def content(self) -> bytes:
        return os.pread(self._file, self.size, 0)


@dataclass(slots=True)
class Stored:
    """An object: the parts that were uploaded, one after another."""

    bodies: list[Body]
    etag: str
    written_s: float = field(default_factory=time.time)

    @property
    def size(self) -> int:
        return sum(body.size for body in self.bodies)

    def send(self, to: socket.socket, start: int, stop: int) -> None:
        at = 0
        for body in self.bodies:
            first, last = max(start - at, 0), min(stop - at, body.size)
            if first < last:
                body.send(to, first, last)
            at += body.size


@dataclass(slots=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Body


@dataclass(slots=True)
class Answer:
    """What is sent back: `text`, or bytes `start` to `stop` of an object."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    text: bytes = b""
    stored: Stored | None = None
    start: int = 0
    stop: int = 0


class Store:
    """The objects of all buckets, and what was asked for."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, dict[int, Body]] = {}
        self.buckets: set[str] = set()
        self.latency_s = 0.0
        self.stats: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._numbers = itertools.count(1)

    def answer(self, request: Request) -> Answer:
        if request.path.startswith("-/"):
            return self._control(request)
        bucket, _, key = request.path.partition("/")
        if not key:
            return self._bucket(request, bucket)
        if "uploadId" in request.query or "uploads" in request.query:
            return self._multipart(request)
        if request.method == "PUT":
            source = request.headers.get("x-amz-copy-source")
            bodies = [request.body] if source is None else self.objects[unquote(source).lstrip("/")].bodies
            etag = self._etag()
            with self.lock:
                self.objects[request.path] = Stored(bodies, etag)
            text = f"<CopyObjectResult><ETag>{etag}</ETag></CopyObjectResult>".encode() if source else b""
            return Answer(headers={"ETag": etag}, text=text)
        if request.method == "DELETE":
            with self.lock:
                self.objects.pop(request.path, None)
            return Answer(204)
        return self._get(request)

    def _get(self, request: Request) -> Answer:
        stored = self.objects.get(request.path)
        if stored is None:
            return _error(404, "NoSuchKey")
        size = stored.size
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "ETag": stored.etag,
            "Last-Modified": formatdate(stored.written_s, usegmt=True),
        }
        wanted = request.headers.get("range")
        if wanted is None:
            return Answer(200, headers, stored=stored, stop=size)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        if first:
            start, stop = int(first), min(size, int(last) + 1 if last else size)
        else:
            start, stop = max(0, size - int(last)), size
        if start >= stop:
            return _error(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(206, headers, stored=stored, start=start, stop=stop)

    def _multipart(self, request: Request) -> Answer:
        if "uploads" in request.query:
            upload = f"upload-{next(self._numbers)}"
            with self.lock:
                self.uploads[upload] = {}
            bucket, _, key = request.path.partition("/")
            return _xml(
                "InitiateMultipartUploadResult",
                f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>",
            )
        upload = request.query["uploadId"]
        if request.method == "PUT":
            with self.lock:
                self.uploads[upload][int(request.query["partNumber"])] = request.body
            return Answer(headers={"ETag": self._etag()})
        with self.lock:
            parts = self.uploads.pop(upload, {})
        if request.method == "DELETE":
            return Answer(204)
        etag = self._etag()
        with self.lock:
            self.objects[request.path] = Stored([parts[number] for number in sorted(parts)], etag)
        return _xml("CompleteMultipartUploadResult", f"<ETag>{etag}</ETag>")

    def _bucket(self, request: Request, bucket: str) -> Answer:
        if request.method == "PUT":
            self.buckets.add(bucket)
            return Answer()
        if not bucket:
            names = "".join(f"<Bucket><Name>{name}</Name></Bucket>" for name in sorted(self.buckets))
            return _xml("ListAllMyBucketsResult", f"<Buckets>{names}</Buckets>")
        if request.method == "HEAD":
            return Answer(200 if bucket in self.buckets else 404, {"x-amz-bucket-region": REGION})
        if request.method == "POST" and "delete" in request.query:
            text = request.body.content().decode()
            for part in text.split("<Key>")[1:]:
                with self.lock:
                    self.objects.pop(f"{bucket}/{part.partition('</Key>')[0]}", None)
            return _xml("DeleteResult", "")
        if "location" in request.query:
            return _xml("LocationConstraint", "")
        return self._list(bucket, request.query)

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        if bucket not in self.buckets:
            return _error(404, "NoSuchBucket")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        limit = int(query.get("max-keys", "1000"))
        after = query.get("continuation-token") or query.get("start-after", "")
        with self.lock:
            names = sorted(path.partition("/")[2] for path in self.objects if path.startswith(f"{bucket}/{prefix}"))
        entries: dict[str, str] = {}
        cut = ""
        for name in names:
            rest = name[len(prefix) :]
            folded = prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else ""
            entry = folded or name
            if entry <= after or entry in entries:
                continue
            if len(entries) == limit:
                cut = max(entries)
                break
            if folded:
                entries[folded] = f"<CommonPrefixes><Prefix>{escape(folded)}</Prefix></CommonPrefixes>"
            else:
                stored = self.objects[f"{bucket}/{name}"]
                when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.written_s))
                entries[name] = (
                    f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified>"
                    f"<ETag>{stored.etag}</ETag><Size>{stored.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
        token = f"<NextContinuationToken>{escape(cut)}</NextContinuationToken>" if cut else ""
        head = (
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(entries)}</KeyCount>"
            f"<MaxKeys>{limit}</MaxKeys><IsTruncated>{'true' if cut else 'false'}</IsTruncated>{token}"
        )
        return _xml("ListBucketResult", head + "".join(entries.values()))

    def _control(self, request: Request) -> Answer:
        if request.path == "-/latency":
            self.latency_s = float(request.query["ms"]) / 1000
            return Answer()
        with self.lock:
            stats, self.stats = self.stats, Counter()
        return Answer(text=json.dumps(stats).encode())

    def count(self, request: Request, num_bytes: int) -> None:
        with self.lock:
            self.stats["requests"] += 1
            self.stats[request.method] += 1
            self.stats["bytes_out"] += num_bytes
            self.stats["bytes_in"] += request.body.size

    def _etag(self) -> str:
        return f'"{next(self._numbers):032x}"'


def _xml(name: str, content: str) -> Answer:
    space = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    text = f'<?xml version="1.0" encoding="UTF-8"?><{name} {space}>{content}</{name}>'
    return Answer(headers={"Content-Type": "application/xml"}, text=text.encode())


def _error(status: int, code: str) -> Answer:
    answer = _xml("Error", f"<Code>{code}</Code><Message>{code}</Message>")
    return Answer(status, answer.headers, answer.text.replace(b' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"', b""))


def _serve(store: Store, client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = client.makefile("rb", buffering=_READ_BYTES)
    with client, reader, suppress(ConnectionError, EOFError):
        while True:
            request = _read(client, reader)
            if request is None:
                return
            answer = store.answer(request)
            is_control = request.path.startswith("-/")
            if store.latency_s and not is_control:
                # What was asked for: the way to an object store and back.
                time.sleep(store.latency_s)
            length = answer.stop - answer.start if answer.stored else len(answer.text)
            has_body = request.method != "HEAD"
            if not is_control:
                store.count(request, length if has_body else 0)
            lines = [f"HTTP/1.1 {answer.status} OK", f"Content-Length: {length}", "x-amz-request-id: 0"]
            lines += [f"{name}: {value}" for name, value in answer.headers.items()]
            head = ("\r\n".join(lines) + "\r\n\r\n").encode()
            if answer.stored and has_body:
                # Held back until the body follows: a head by itself is a packet and a wakeup by itself.
                client.sendall(head, socket.MSG_MORE)
                answer.stored.send(client, answer.start, answer.stop)
            else:
                client.sendall(head + answer.text if has_body else head)
            if request.headers.get("connection", "").lower() == "close":
                return


def _read(client: socket.socket, reader: BinaryIO) -> Request | None:
    first = reader.readline().decode("latin-1").split()
    if len(first) < 2:
        return None
    headers = {}
    while line := reader.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    path, _, query = first[1].partition("?")
    is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    whole = _Chunks(reader) if is_chunked else _Limited(reader, int(headers.get("content-length", "0")))
    content = io.BufferedReader(whole, _READ_BYTES)
    # Chunks of their own, inside of HTTP's.
    is_signed = "aws-chunked" in headers.get("content-encoding", "")
    body = Body()
    body.receive(io.BufferedReader(_Chunks(content), _READ_BYTES) if is_signed else content)
    while content.read(_READ_BYTES):
        pass
    decoded = unquote(path).lstrip("/")
    return Request(first[0], decoded, dict(parse_qsl(query, keep_blank_values=True)), headers, body)


class _Limited(io.RawIOBase):
    """The next `size` bytes of a stream."""

    def __init__(self, stream: BinaryIO, size: int = 0) -> None:
        self._stream = stream
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        with memoryview(into) as whole, whole[: self._left] as view:
            got: int = self._stream.readinto(view) if view.nbytes else 0  # type: ignore[attr-defined]  # it has one
            if got < view.nbytes:
                raise EOFError("the connection was closed in the middle of a body")
        self._left -= got
        return got


class _Chunks(_Limited):
    """The content of chunks, each with its size in front, up to an empty one and the trailers behind it."""

    _ended = False

    def readinto(self, into: Any) -> int:
        if not self._left and not self._ended:
            self._left = int(self._stream.readline().split(b";")[0], 16)
            self._ended = not self._left
            while self._ended and self._stream.readline().strip():
                pass
        got = super().readinto(into)
        if got and not self._left:
            self._stream.readline()
        return got


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    store = Store()
    listener = socket.create_server(("127.0.0.1", arguments.port), backlog=256)
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(store, client), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    # Ends with whoever started it, however that ends.
    sys.stdin.read()


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where a running server listens, and its two extra paths. Crosses processes."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, path: str) -> str:
        where = quote(self.endpoint, safe="")
        return f"s3://{path}?scheme=http&endpoint_override={where}&region={REGION}"

    def make_bucket(self, bucket: str) -> None:
        self._ask("PUT", bucket)

    def set_latency(self, milliseconds: float) -> None:
        self._ask("PUT", f"-/latency?ms={milliseconds}")

    def take_stats(self) -> dict[str, int]:
        """Requests and bytes since the last time."""
        return {"requests": 0, "bytes_in": 0, "bytes_out": 0, **json.loads(self._ask("GET", "-/stats"))}

    def _ask(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(f"{self.endpoint}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.s3_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield S3Server(int(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


if __name__ == "__main__":
    main()
