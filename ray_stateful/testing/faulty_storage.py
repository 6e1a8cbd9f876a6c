"""A storage that fails on demand: a fault is data, and happens at the n-th call of a kind.

Nothing here is random, and nothing waits except the faults whose point is to wait. A pickled copy counts from zero:
every process counts its own calls.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch.distributed as dist
from typing_extensions import Buffer, Self

from ray_stateful.storage.base import Sink, Storage

CALLS = ("open_sink", "sink.write", "publish", "write", "read", "sizes", "directories", "delete")
_CALLS_WITH_DATA = ("sink.write", "write", "read")


@dataclass(frozen=True, slots=True)
class Fault:
    """When something goes wrong; the subclass says what.

    Attributes:
        call: One of `CALLS`: a method of the storage; `sink.write`, a write to an open file; `publish`, its closing.
        nth: Of the calls that match, the first that goes wrong; counted from 1.
        num_times: How many in a row go wrong; `None` for all from there on.
        rank: The rank on which it happens; `None` for each. Without a process group the rank is 0.
        path: Only calls match whose path contains this.
    """

    call: str
    nth: int = 1
    num_times: int | None = 1
    rank: int | None = None
    path: str = ""

    def __post_init__(self) -> None:
        if self.call not in CALLS:
            raise ValueError(f"call is {self.call!r}; it is one of {', '.join(CALLS)}")
        if isinstance(self, Truncate | Flip) and self.call not in _CALLS_WITH_DATA:
            needs = f"{type(self).__name__} needs a call that carries data, one of {_CALLS_WITH_DATA}"
            raise ValueError(f"{needs}; {self.call!r} carries none")

    def due(self, count: int) -> bool:
        """Whether the `count`-th matching call goes wrong."""
        return count >= self.nth and (self.num_times is None or count < self.nth + self.num_times)


@dataclass(frozen=True, slots=True)
class Fail(Fault):
    """Raise `error`; with `after`, only once the call has done its work, as if nothing but the reply were lost."""

    error: OSError = field(default_factory=lambda: OSError("a fault was asked for here"))
    after: bool = False


@dataclass(frozen=True, slots=True)
class Delay(Fault):
    """Take `delay_s` seconds longer."""

    delay_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Hang(Fault):
    """Do nothing until `FaultyStorage.release` is called, or `hang_s` seconds are over; then raise `TimeoutError`."""

    hang_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Truncate(Fault):
    """Silently lose all bytes of this call but the first `keep_bytes`."""

    keep_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Flip(Fault):
    """Silently flip one bit of the bytes of this call. `byte` counts from the end if it is negative."""

    byte: int = 0
    bit: int = 0


class FaultyStorage:
    """`inner`, except for `faults`.

    Attributes:
        calls: Every call so far, in order: its kind and its path.
    """

    def __init__(self, inner: Storage, faults: Sequence[Fault] = ()) -> None:
        self.inner = inner
        self.faults = tuple(faults)
        self.calls: list[tuple[str, str]] = []
        self._counts: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._released = threading.Event()

    def __reduce__(self) -> tuple[type[FaultyStorage], tuple[Storage, tuple[Fault, ...]]]:
        return type(self), (self.inner, self.faults)

    @property
    def max_file_bytes(self) -> int | None:
        limit: int | None = getattr(self.inner, "max_file_bytes", None)
        return limit

    def counts(self) -> Counter[str]:
        """How often each kind of call was made."""
        with self._lock:
            return Counter(call for call, _ in self.calls)

    def release(self) -> None:
        """End every `Hang` and `Delay`, those to come included."""
        self._released.set()

    def open_sink(self, path: str) -> Sink:
        fault = self.begin("open_sink", path)
        sink = self.inner.open_sink(path)
        if isinstance(fault, Fail):
            with sink:
                raise fault.error
        return _FaultySink(self, path, sink)

    def write(self, path: str, data: Buffer) -> None:
        fault = self.begin("write", path)
        self.inner.write(path, altered(data, fault))
        self.end(fault)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        fault = self.begin("read", path)
        data = bytes(altered(self.inner.read(path, offset, length), fault))
        self.end(fault)
        return data

    def sizes(self, path: str) -> Mapping[str, int]:
        fault = self.begin("sizes", path)
        sizes = self.inner.sizes(path)
        self.end(fault)
        return sizes

    def directories(self, path: str) -> list[str]:
        fault = self.begin("directories", path)
        names = self.inner.directories(path)
        self.end(fault)
        return names

    def delete(self, path: str) -> None:
        fault = self.begin("delete", path)
        self.inner.delete(path)
        self.end(fault)

    def begin(self, call: str, path: str) -> Fault | None:
        """Count a call, and carry out its fault if that comes before it; return the fault for what comes later."""
        due = None
        with self._lock:
            self.calls.append((call, path))
            for number, fault in enumerate(self.faults):
                if fault.call == call and fault.path in path and fault.rank in (None, _rank()):
                    self._counts[number] += 1
                    if due is None and fault.due(self._counts[number]):
                        due = fault
        if isinstance(due, Delay):
            # Not a wait for anything: the time is the fault.
            self._released.wait(due.delay_s)
        elif isinstance(due, Hang):
            self._released.wait(due.hang_s)
            raise TimeoutError(f"{call} of {path!r} hung")
        elif isinstance(due, Fail) and not due.after:
            raise due.error
        return due

    @staticmethod
    def end(fault: Fault | None) -> None:
        """Carry out a fault that comes after the call."""
        if isinstance(fault, Fail):
            raise fault.error


class _FaultySink:
    def __init__(self, storage: FaultyStorage, path: str, inner: Sink) -> None:
        self._storage, self._path, self._inner = storage, path, inner

    def write(self, data: Buffer) -> None:
        fault = self._storage.begin("sink.write", self._path)
        self._inner.write(altered(data, fault))
        self._storage.end(fault)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._inner.__exit__(kind, error, trace)
            return
        try:
            fault = self._storage.begin("publish", self._path)
        except OSError as failure:
            self._inner.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._inner.__exit__(None, None, None)
        self._storage.end(fault)


def altered(data: Buffer, fault: Fault | None) -> Buffer:
    """`data` as `fault` leaves it."""
    if isinstance(fault, Truncate):
        return bytes(data)[: fault.keep_bytes]
    if isinstance(fault, Flip):
        flipped = bytearray(data)
        if flipped:
            flipped[fault.byte % len(flipped)] ^= 1 << fault.bit
        return bytes(flipped)
    return data


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
