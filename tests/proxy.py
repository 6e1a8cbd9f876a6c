"""An HTTP proxy in front of a storage server that lets requests go wrong, at a rate or by number, from a seed.

It speaks just enough HTTP/1.1: requests and replies with a length or in chunks, one after another on a connection.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO

# What can happen to a request:
#   503              the server is throttling; the request is not done
#   500              the server failed; the request is not done
#   reset            the connection is reset; the request is not done
#   stall            nothing comes back for `stall_s`, then a reset; the request is not done
#   slow_first_byte  the request is done, and answered after `slow_s`
#   lost_reply       the request is done, and the connection reset instead of an answer
#   short_reply      the request is done, and the connection closed in the middle of the answer
# and, not among those that pass,
#   403              the client may not; the request is not done
KINDS = ("503", "500", "reset", "stall", "slow_first_byte", "lost_reply", "short_reply")

_ERROR_BODIES = {
    "503": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    "403": b"<Error><Code>AccessDenied</Code><Message>Access denied.</Message></Error>",
    "500": b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyFaults:
    """Which requests go wrong, and how.

    Attributes:
        rate: Of the matching requests, the share that does.
        kinds: One of them each time, by chance.
        only: A pattern that "METHOD /path?query" matches for the request to be one of those.
        nth: The matching requests that go wrong whatever the rate; counted from 1.
        latency_s: Of every request, also of those that go well.
    """

    rate: float = 0.0
    kinds: tuple[str, ...] = ("503", "reset", "stall", "slow_first_byte")
    only: str = ""
    nth: frozenset[int] = frozenset()
    seed: int = 0
    latency_s: float = 0.0
    slow_s: float = 0.2
    stall_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that came by: "METHOD /path?query", the bytes of its body and of the answer's, and what happened."""

    line: str
    bytes_in: int
    bytes_out: int
    fault: str | None


@dataclass(slots=True)
class Proxy:
    """A running proxy.

    Attributes:
        requests: All that came by, in the order in which they were answered.
    """

    port: int
    requests: list[Seen] = field(default_factory=list)
    _faults: ProxyFaults = field(default_factory=ProxyFaults)
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _num_matching: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: threading.Event = field(default_factory=threading.Event)

    def set_faults(self, faults: ProxyFaults) -> None:
        """From here on, `faults`; matching requests are counted anew."""
        with self._lock:
            self._faults, self._random, self._num_matching = faults, random.Random(faults.seed), 0

    def count(self, pattern: str = "") -> int:
        """How many requests came by whose "METHOD /path?query" `pattern` matches."""
        with self._lock:
            return sum(re.search(pattern, seen.line) is not None for seen in self.requests)

    def num_faults(self) -> int:
        with self._lock:
            return sum(seen.fault is not None for seen in self.requests)

    def _fault_for(self, line: str) -> tuple[str | None, ProxyFaults]:
        with self._lock:
            faults = self._faults
            if re.search(faults.only, line) is None:
                return None, faults
            self._num_matching += 1
            by_chance = self._random.random() < faults.rate
            kind = self._random.choice(faults.kinds)
            return (kind if by_chance or self._num_matching in faults.nth else None), faults

    def _note(self, seen: Seen) -> None:
        with self._lock:
            self.requests.append(seen)


@contextmanager
def proxy(server_port: int, faults: ProxyFaults | None = None) -> Iterator[Proxy]:
    """A proxy on a free port of this machine, in threads of this process, in front of `server_port`."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        running = Proxy(listener.getsockname()[1])
        running.set_faults(faults or ProxyFaults())
        clients: set[socket.socket] = set()
        acceptor = threading.Thread(target=_accept, args=(running, listener, server_port, clients), daemon=True)
        acceptor.start()
        try:
            yield running
        finally:
            running._closed.set()
            # Closing a listener does not wake a thread that waits in accept; this does.
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for client in list(clients):
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)


def _accept(running: Proxy, listener: socket.socket, server_port: int, clients: set[socket.socket]) -> None:
    while not running._closed.is_set():
        try:
            client, _ = listener.accept()
        except OSError:
            return
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        clients.add(client)
        threading.Thread(target=_serve, args=(running, client, server_port, clients), daemon=True).start()


def _serve(running: Proxy, client: socket.socket, server_port: int, clients: set[socket.socket]) -> None:
    # A client that goes away in the middle of a request is what some of the faults make it do.
    with client, client.makefile("rb") as reader, suppress(OSError, EOFError):
        while _serve_one(running, client, reader, server_port):
            pass
    clients.discard(client)


def _serve_one(running: Proxy, client: socket.socket, reader: BinaryIO, server_port: int) -> bool:
    head = _read_head(reader)
    if not head:
        return False
    method, target = head[0].split(" ")[:2]
    line = f"{method} {target}"
    headers = _headers(head)
    if headers.get("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = _read_body(reader, headers, has_body=True, until_closed=False)
    kind, faults = running._fault_for(line)
    wait_s = faults.latency_s + (faults.slow_s if kind == "slow_first_byte" else 0.0)
    # The time is the fault; it ends early only when the proxy does.
    if wait_s and running._closed.wait(wait_s):
        return False
    if kind == "stall":
        running._closed.wait(faults.stall_s)
    if kind in ("reset", "stall"):
        running._note(Seen(line, len(body), 0, kind))
        _reset(client)
        return False
    if kind in _ERROR_BODIES:
        running._note(Seen(line, len(body), 0, kind))
        answer = b"" if method == "HEAD" else _ERROR_BODIES[kind]
        # An empty answer that says it is XML ends a process that reads it with Azure's client.
        content_type = "Content-Type: application/xml\r\n" if answer else ""
        client.sendall(
            f"HTTP/1.1 {kind} Fault\r\n{content_type}Content-Length: {len(answer)}\r\n\r\n".encode() + answer
        )
        return True
    answer_head, answer, whole = _forward(server_port, method, head, body)
    if kind == "lost_reply":
        running._note(Seen(line, len(body), 0, kind))
        _reset(client)
        return False
    if kind == "short_reply":
        whole = whole[: len(answer_head) + len(answer) // 2]
    running._note(Seen(line, len(body), len(answer), kind))
    client.sendall(whole)
    return kind != "short_reply"


def _forward(server_port: int, method: str, head: list[str], body: bytes) -> tuple[bytes, bytes, bytes]:
    """The server's answer: its head, its body, and both as they are passed on."""
    kept = [
        line
        for line in head[1:]
        if not line.lower().startswith(("connection:", "expect:", "transfer-encoding:", "content-length:"))
    ]
    sent = [head[0], *kept, "Connection: close"]
    if body or method in ("POST", "PUT"):
        sent.append(f"Content-Length: {len(body)}")
    with socket.create_connection(("127.0.0.1", server_port)) as server:
        server.sendall(("\r\n".join(sent) + "\r\n\r\n").encode("latin-1") + body)
        reader = server.makefile("rb")
        answer_head = _read_head(reader)
        if not answer_head:
            raise EOFError("the server closed the connection without an answer")
        status = int(answer_head[0].split(" ")[1])
        headers = _headers(answer_head)
        has_body = method != "HEAD" and status not in (204, 304)
        answer = _read_body(reader, headers, has_body=has_body, until_closed=True)
    dropped = ("connection:", "transfer-encoding:") + (("content-length:",) if has_body else ())
    lines = [line for line in answer_head if not line.lower().startswith(dropped)]
    if has_body:
        lines.append(f"Content-Length: {len(answer)}")
    passed_on = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return passed_on, answer, passed_on + answer


def _read_head(reader: BinaryIO) -> list[str]:
    lines: list[str] = []
    while line := reader.readline():
        text = line.decode("latin-1").rstrip("\r\n")
        if not text:
            return lines
        lines.append(text)
    return []


def _headers(head: list[str]) -> dict[str, str]:
    pairs = (line.partition(":") for line in head[1:])
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _read_body(reader: BinaryIO, headers: dict[str, str], *, has_body: bool, until_closed: bool) -> bytes:
    if not has_body:
        return b""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        parts = []
        while size := int(reader.readline().split(b";")[0], 16):
            parts.append(_exactly(reader, size))
            reader.readline()
        while reader.readline().strip():
            pass
        return b"".join(parts)
    if "content-length" in headers:
        return _exactly(reader, int(headers["content-length"]))
    return reader.read() if until_closed else b""


def _exactly(reader: BinaryIO, size: int) -> bytes:
    data = reader.read(size)
    if len(data) != size:
        raise EOFError("the connection was closed in the middle of a body")
    return data


def _reset(client: socket.socket) -> None:
    # Closed with a linger of zero, a socket sends a reset. It is closed when the last file object on it is.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
