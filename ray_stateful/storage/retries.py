"""What is tried again, how often, and when it is over.

Storage answers "later" (throttling), fails in passing (a server's 5xx, a reset connection, no answer in time), or means
it (denied, missing, full). Only the first two are tried again, at random intervals that grow, until a budget of time is
spent. pyarrow has words of its own for each of them; they are all here.
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from typing_extensions import Buffer, Self

from ray_stateful.errors import StorageError
from ray_stateful.storage import deadlines
from ray_stateful.storage.base import Sink, Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to go on trying.

    Attributes:
        budget_s: Of one operation, or of one whole file, from its first failure on. No try is begun after it.
        attempt_s: Of one call into the storage. One that takes longer counts as failed in passing.
        publish_s: Of ending a file, when all that a disk or a client has buffered of it is sent on.
        first_pause_s: The longest that the first pause can be; each pause is drawn anew from zero to its longest.
        longest_pause_s: What that grows to, doubling each time.
    """

    budget_s: float = 120.0
    attempt_s: float = 60.0
    publish_s: float = 600.0
    first_pause_s: float = 0.2
    longest_pause_s: float = 10.0

    def within(self, timeout_s: float) -> RetryPolicy:
        """This policy, cut to give up before peers, who wait for `timeout_s`, give up on this rank."""
        return replace(
            self,
            budget_s=min(self.budget_s, timeout_s / 4),
            attempt_s=min(self.attempt_s, timeout_s / 8),
            publish_s=min(self.publish_s, timeout_s / 4),
        )

    def pauses(self, draw: Callable[[], float]) -> Iterator[float]:
        """The pauses between tries, without end. `draw` gives numbers from 0 to 1."""
        longest = self.first_pause_s
        while True:
            # From zero, not around a middle: ranks that were throttled together come back apart.
            yield draw() * longest
            longest = min(2 * longest, self.longest_pause_s)


# Of the system, and not the stream of `random`: that is the training's, and a save must not move it. Nor a stream of
# our own: forked processes would draw the same pauses from it.
_draw = random.SystemRandom().random

_PERMANENT_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EBADMSG,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
    }
)
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOBUFS,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)

# Looked for first: "AWS Error ACCESS_DENIED ... HTTP status 403" is not to be taken for the 5xx in its request id.
_PERMANENT_WORDS = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_\w+|NO_SUCH_\w+|RESOURCE_NOT_FOUND|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT)"
    r"|HTTP status (400|401|403|404|405|409|411|412|413|416)\b"
    r"|Azure Error: \[\w*\] (400|401|403|404|405|409|411|412|413|416)\b"
    r"|\b(PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE)\b"
    r"|\b(AccessDenied|AuthenticationFailed|AuthorizationFailure|AuthorizationPermissionMismatch|ContainerNotFound"
    r"|InvalidAccessKeyId|NoSuchBucket|NoSuchKey|SignatureDoesNotMatch|QuotaExceeded)\b"
)
_TRANSIENT_WORDS = re.compile(
    # S3, by the AWS SDK's names, by HTTP status, and by what curl met.
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|THROTTLING|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|BANDWIDTH_LIMIT_EXCEEDED|REQUEST_LIMIT_EXCEEDED|CLIENT_SIGNING_FAILURE)"
    r"|HTTP status (408|425|429|5\d\d)\b"
    r"|curlCode: (5|6|7|16|18|28|35|52|55|56|92)\b"
    r"|\b(SlowDown|ServiceUnavailable|InternalError|RequestTimeout|ThrottlingException|TooManyRequests|RequestThrottled)\b"
    # GCS, by the status codes of google-cloud-cpp.
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|ABORTED)\b"
    # Azure, by its error codes, and by what its transport says.
    r"|\b(ServerBusy|OperationTimedOut|InternalServerError)\b|\b(429|500|502|503|504) [A-Z]"
    r"|Azure Error: \[\w*\] (408|429|5\d\d)\b"
    r"|Fail(ed)? to (get a new connection|send|poll)|Error while (polling|sending|reading)|Connection (was )?closed"
    # What sockets say, by way of anything.
    r"|[Cc]onnection (reset|refused|aborted|timed out)|[Bb]roken pipe|[Tt]imed? ?out|[Tt]emporar(il)?y",
)


def is_transient(error: BaseException | None) -> bool:
    """Whether trying again may help. What is not known is taken for permanent: a checkpoint is soon saved again."""
    if not isinstance(error, OSError):
        return False
    if isinstance(error, ConnectionError | TimeoutError | InterruptedError):
        return True
    if error.errno in _PERMANENT_ERRNOS or error.errno in _TRANSIENT_ERRNOS:
        return error.errno in _TRANSIENT_ERRNOS
    text = str(error)
    return _PERMANENT_WORDS.search(text) is None and _TRANSIENT_WORDS.search(text) is not None


class RetryingStorage:
    """`inner`, with transient errors tried again and every call under a deadline.

    What fails for good is a `StorageError`, its cause chained; a missing file stays a `FileNotFoundError` where it is
    read. A sink is not tried again, as what was streamed is gone: its errors stay `OSError`s, and `write_file` streams
    again.

    Attributes:
        retries: How often each operation was tried again, by name.
    """

    def __init__(self, inner: Storage, policy: RetryPolicy | None = None) -> None:
        self.inner = inner
        self.policy = policy or RetryPolicy()
        self.retries: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[RetryingStorage], tuple[Storage, RetryPolicy]]:
        return RetryingStorage, (self.inner, self.policy)

    def __repr__(self) -> str:
        return f"RetryingStorage({self.inner!r})"

    def within(self, timeout_s: float) -> RetryingStorage:
        """The same storage, which gives up before peers that wait for `timeout_s` do; retries are counted together."""
        limited = RetryingStorage(self.inner, self.policy.within(timeout_s))
        limited.retries, limited._taken, limited._lock = self.retries, self._taken, self._lock
        return limited

    @property
    def max_file_bytes(self) -> int | None:
        limit: int | None = getattr(self.inner, "max_file_bytes", None)
        return limit

    def open_sink(self, path: str) -> Sink:
        sink = self._retried("open", path, lambda: self.inner.open_sink(path))
        return DeadlineSink(sink, path, self.policy)

    def write(self, path: str, data: Buffer) -> None:
        self._retried("write", path, lambda: self.inner.write(path, data))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._retried("read", path, lambda: self.inner.read(path, offset, length))

    def sizes(self, path: str) -> Mapping[str, int]:
        return self._retried("list", path, lambda: self.inner.sizes(path))

    def directories(self, path: str) -> list[str]:
        return self._retried("list", path, lambda: self.inner.directories(path))

    def delete(self, path: str) -> None:
        self._retried("delete", path, lambda: self.inner.delete(path))

    def note_retry(self, operation: str) -> None:
        with self._lock:
            self.retries[operation] += 1

    def take_retries(self) -> Mapping[str, int]:
        """The retries since this was last called, by name: each is given once."""
        with self._lock:
            new = self.retries - self._taken
            self._taken.update(new)
            return new

    def _retried(self, operation: str, path: str, function: Callable[[], T]) -> T:
        return retried(operation, path, function, self.policy, self.note_retry)


def write_file(
    storage: Storage,
    path: str | Callable[[int], str],
    producer: Callable[[DeadlineSink], T],
    policy: RetryPolicy | None = None,
) -> T:
    """Stream one file: `producer` writes all of it to the sink it is given, and again from its start to a new one.

    Args:
        path: Of the file; or of the file that a try writes, given its number from 0. A try that hangs is given up,
            but may still end, and publish or delete what it finds under its name: only a name of its own makes that
            harmless.
        policy: By default, that of `storage` if it is a `RetryingStorage`.

    Returns:
        What `producer` returned, of the try that succeeded.

    Raises:
        StorageError: the file can't be written, or the budget is spent.
    """
    if isinstance(storage, RetryingStorage):
        # One budget for the file, and not that of opening it within that of the file.
        inner, limits, note_retry = storage.inner, policy or storage.policy, storage.note_retry
    else:
        inner, limits, note_retry = storage, policy or RetryPolicy(), _ignore

    tries = itertools.count()

    def stream() -> T:
        number = next(tries)
        where = path if isinstance(path, str) else path(number)
        opened = deadlines.call(lambda: inner.open_sink(where), limits.attempt_s, where)
        with DeadlineSink(opened, where, limits) as sink:
            return producer(sink)

    return retried("write", path if isinstance(path, str) else path(0), stream, limits, note_retry, in_thread=False)


def retried(
    operation: str,
    path: str,
    function: Callable[[], T],
    policy: RetryPolicy,
    note_retry: Callable[[str], None],
    *,
    in_thread: bool = True,
) -> T:
    """`function()`, tried again as `policy` says.

    Args:
        operation: A verb, for the error: "could not read ...".
        in_thread: Whether each try is a single call into the storage, with the deadline of one.
    """
    deadline: float | None = None
    for pause in policy.pauses(_draw):
        try:
            return deadlines.call(function, policy.attempt_s, path) if in_thread else function()
        except FileNotFoundError as error:
            if operation == "read":
                raise
            raise StorageError(operation, path, _describe(error)) from error
        except OSError as error:
            if not is_transient(error):
                raise StorageError(operation, path, _describe(error)) from error
            deadline = time.monotonic() + policy.budget_s if deadline is None else deadline
            if time.monotonic() + pause >= deadline:
                cause = f"still failing after {policy.budget_s:g} s: {_describe(error)}"
                raise StorageError(operation, path, cause) from error
            note_retry(operation)
            logger.warning("trying to %s %r again in %.1f s: %s", operation, path, pause, _describe(error))
        # Not to add to the load that the storage just complained of.
        time.sleep(pause)
    raise AssertionError("pauses have no end")


class DeadlineSink:
    """A sink whose calls end in time, made one after another by one thread."""

    def __init__(self, inner: Sink, path: str, policy: RetryPolicy) -> None:
        self._inner, self._path, self._policy = inner, path, policy
        self._line = deadlines.Line()

    def write(self, data: Buffer) -> None:
        self.write_all([data])

    def write_all(self, parts: Sequence[Buffer]) -> None:
        """Append `parts`, in their order, within the deadline of one call."""

        def write() -> None:
            for part in parts:
                self._inner.write(part)

        self._line.call(write, self._policy.attempt_s, self._path)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line.stuck:
            # Dropped once the hanging call returns. Only then: a stream is not to be closed while it is written to.
            self._line.post(lambda: self._inner.__exit__(kind, error, trace))
            self._line.end()
            return
        try:
            self._line.call(lambda: self._inner.__exit__(kind, error, trace), self._policy.publish_s, self._path)
        finally:
            self._line.end()


def _ignore(operation: str) -> None:
    """Nobody counts."""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
