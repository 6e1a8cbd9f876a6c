"""What this machine can do without any checkpoint: the S3 server, the disk, a copy in memory. In the same run."""

from __future__ import annotations

import http.client
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.measuring import Ratio
from benchmarks.peers import Place
from benchmarks.s3_server import S3Server
from benchmarks.settings import Settings

Row = dict[str, Any]

_OBJECT_BYTES = 64 << 20
_CLIENTS = 4


def run(settings: Settings, place: Place, server: S3Server) -> tuple[list[Row], list[Ratio]]:
    rows = []
    server.set_latency(0)
    for what, call, num_bytes in (
        ("one client puts", lambda: _put(server, 0), _OBJECT_BYTES),
        ("four clients put", lambda: _together(_put, server), _CLIENTS * _OBJECT_BYTES),
        ("one client gets", lambda: _get(server, 0), _OBJECT_BYTES),
        ("four clients get", lambda: _together(_get, server), _CLIENTS * _OBJECT_BYTES),
        ("the disk takes, flushed", lambda: _write(place), _OBJECT_BYTES),
    ):
        rates = []
        for repeat in range(settings.repeats):
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            rates.append(num_bytes / seconds)
            rows.append({"part": "limits", "what": what, "seconds": seconds, "bytes": num_bytes, "repeat": repeat})
        print(f"  {what:<28} {min(rates) / 1e6:8.0f} .. {max(rates) / 1e6:.0f} MB/s", flush=True)
    began = time.perf_counter()
    for _ in range(500):
        server.take_stats()
    rows.append({"part": "limits", "what": "500 small requests", "seconds": time.perf_counter() - began, "bytes": 0})
    print(f"  small requests, one by one   {500 / rows[-1]['seconds']:8.0f} a second", flush=True)
    return rows, []


def _together(call: Any, server: S3Server) -> None:
    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(lambda number: call(server, number), range(_CLIENTS)))


def _put(server: S3Server, number: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("PUT", f"/bucket/limits/{number}", body=bytes(_OBJECT_BYTES))
    connection.getresponse().read()
    connection.close()


def _get(server: S3Server, number: int) -> None:
    into = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET /bucket/limits/{number} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        while connection.recv_into(into):
            pass


def _write(place: Place) -> None:
    path = f"{place.directory}_limit"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    content = memoryview(bytes(_OBJECT_BYTES))
    for at in range(0, _OBJECT_BYTES, 4 << 20):
        os.write(descriptor, content[at : at + (4 << 20)])
    os.fsync(descriptor)
    os.close(descriptor)
    os.unlink(path)
