"""Which errors of a storage are tried again, how often, and for how long.

An error is transient (throttling, a server's 5xx, a reset connection, no answer in time) or permanent (denied, missing,
full). Only transient errors are tried again, at random intervals that grow, until a time budget is spent. pyarrow words
each of them in its own way; all of its wordings that we know are here.
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
    """How long to go on trying, in seconds.

    Attributes:
        budget_s: For one operation, or one whole file, from its first failure on. No attempt begins after it.
        attempt_s: For one call into the storage. A call that takes longer counts as a transient error.
        publish_s: For closing a file, when everything that a disk or a client has buffered of it is sent on.
        first_pause_s: The upper limit of the first pause; each pause is drawn between zero and its limit.
        longest_pause_s: What the upper limit grows to, doubling with each pause.
    """

    budget_s: float = 120.0
    attempt_s: float = 60.0
    publish_s: float = 600.0
    first_pause_s: float = 0.2
    longest_pause_s: float = 10.0

    def within(self, timeout_s: float) -> RetryPolicy:
        """This policy, shortened so that this rank gives up before its peers, which wait `timeout_s` s for it, do."""
        return replace(
            self,
            budget_s=min(self.budget_s, timeout_s / 4),
            attempt_s=min(self.attempt_s, timeout_s / 8),
            publish_s=min(self.publish_s, timeout_s / 4),
        )

    def pauses(self, draw: Callable[[], float]) -> Iterator[float]:
        """The pauses between attempts in seconds, without end. `draw` returns random numbers from 0 to 1."""
        longest = self.first_pause_s
        while True:
            # From zero up, not around a mean: ranks that were throttled together must not come back together.
            yield draw() * longest
            longest = min(2 * longest, self.longest_pause_s)


# The system's random numbers, not those of `random`: that stream belongs to training, and a save must not advance it.
# Nor a stream of our own: forked processes would draw the same pauses from it.
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

# Searched for first: "AWS Error ACCESS_DENIED ... HTTP status 403" must not be taken for the 5xx in its request id.
_PERMANENT_WORDS = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_\w+|NO_SUCH_\w+|RESOURCE_NOT_FOUND|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT)"
    r"|HTTP status (400|401|403|404|405|409|411|412|413|416)\b"
    r"|Azure Error: \[\w*\] (400|401|403|404|405|409|411|412|413|416)\b"
    r"|\b(PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE)\b"
    r"|\b(AccessDenied|AuthenticationFailed|AuthorizationFailure|AuthorizationPermissionMismatch|ContainerNotFound"
    r"|InvalidAccessKeyId|NoSuchBucket|NoSuchKey|SignatureDoesNotMatch|QuotaExceeded)\b"
)
_TRANSIENT_WORDS = re.compile(
    # S3, by the AWS SDK's names, by HTTP status, and by curl's error codes.
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|THROTTLING|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|BANDWIDTH_LIMIT_EXCEEDED|REQUEST_LIMIT_EXCEEDED|CLIENT_SIGNING_FAILURE)"
    r"|HTTP status (408|425|429|5\d\d)\b"
    r"|curlCode: (5|6|7|16|18|28|35|52|55|56|92)\b"
    r"|\b(SlowDown|ServiceUnavailable|InternalError|RequestTimeout|ThrottlingException|TooManyRequests|RequestThrottled)\b"
    # GCS, by the status codes of google-cloud-cpp.
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|ABORTED)\b"
    # Azure, by its error codes, and by the messages of its transport.
    r"|\b(ServerBusy|OperationTimedOut|InternalServerError)\b|\b(429|500|502|503|504) [A-Z]"
    r"|Azure Error: \[\w*\] (408|429|5\d\d)\b"
    r"|Fail(ed)? to (get a new connection|send|poll)|Error while (polling|sending|reading)|Connection (was )?closed"
    # Messages of sockets, whatever passes them on.
    r"|[Cc]onnection (reset|refused|aborted|timed out)|[Bb]roken pipe|[Tt]imed? ?out|[Tt]emporar(il)?y",
)


# What is quoted or has a slash in it may be a path, also one below a directory that we do not know of, or a URL.
_MAYBE_PATHS = re.compile(r"'[^'\s]*'|\"[^\"\s]*\"|(?<![^\s'\"])[^\s'\"/]*/[^\s'\"]*")


def is_transient(error: BaseException | None, path: str) -> bool:
    """Whether trying again may help. An unknown error counts as permanent: another checkpoint is saved soon anyway.

    Args:
        path: What the call that failed was about.
    """
    if not isinstance(error, OSError):
        return False
    if isinstance(error, ConnectionError | TimeoutError | InterruptedError):
        return True
    if error.errno in _PERMANENT_ERRNOS or error.errno in _TRANSIENT_ERRNOS:
        return error.errno in _TRANSIENT_ERRNOS
    text = _without(path, str(error))
    return _PERMANENT_WORDS.search(text) is None and _TRANSIENT_WORDS.search(text) is not None


def _without(path: str, text: str) -> str:
    """`text` without what names `path`, its key, or a directory above it: a run may be called `timeout-sweep`."""
    # Whole first, as names may have spaces in them.
    for name in (path, path.partition("/")[2]):
        text = text.replace(name, "") if "/" in name else text
    names = set(path.split("/")) - {""}
    return _MAYBE_PATHS.sub(lambda found: "" if names & set(found[0].strip("'\":,;.()").split("/")) else found[0], text)


class RetryingStorage:
    """Storage `inner`, with transient errors tried again and a deadline for every call.

    An error that is permanent, or lasts longer than the budget, is raised as a `StorageError`, with its cause chained;
    only reading a missing file still raises `FileNotFoundError`. A sink can't try again, as what was streamed is gone:
    its errors stay `OSError`s, and `write_file` streams the file again.

    Attributes:
        retries: How often each operation was tried again, by the operation's name.
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
        """The same storage with `RetryPolicy.within(timeout_s)`; both count their retries together."""
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
        """The number of retries since the last call of this method, by the operation's name."""
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
    """Stream one file; after a transient error, stream it again from its start.

    Args:
        path: Of the file; or a function from the number of an attempt, counted from 0, to the path that it writes. An
            attempt that hangs is given up, but may still end, and publish or delete what it finds at its path: only a
            path of its own makes that harmless.
        producer: Writes the whole file to the sink that it is given; called once per attempt, with a new sink.
        policy: By default, that of `storage` if it is a `RetryingStorage`.

    Returns:
        What `producer` returned in the attempt that succeeded.

    Raises:
        StorageError: the file can't be written, or the budget is spent.
    """
    if isinstance(storage, RetryingStorage):
        # `inner`, so that there is one budget for the file, and not another for opening it within that.
        inner, limits, note_retry = storage.inner, policy or storage.policy, storage.note_retry
    else:
        inner, limits, note_retry = storage, policy or RetryPolicy(), _ignore

    tries = itertools.count()

    def stream() -> T:
        number = next(tries)
        where = path if isinstance(path, str) else path(number)
        # A file that is opened too late is dropped, unless a later attempt may have written to the same path.
        if_late = None if isinstance(path, str) else _drop
        opened = deadlines.call(lambda: inner.open_sink(where), limits.attempt_s, where, if_late)
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
    """`function()`, tried again after transient errors as `policy` says.

    Args:
        operation: A verb, for the error: "could not read ...".
        in_thread: Whether each attempt is a single call into the storage, to be made under the deadline of one.

    Raises:
        FileNotFoundError: there is no such file, and `operation` is "read".
        StorageError: the error is permanent, or the budget is spent.
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
            if not is_transient(error, path):
                raise StorageError(operation, path, _describe(error)) from error
            deadline = time.monotonic() + policy.budget_s if deadline is None else deadline
            if time.monotonic() + pause >= deadline:
                cause = f"still failing after {policy.budget_s:g} s: {_describe(error)}"
                raise StorageError(operation, path, cause) from error
            note_retry(operation)
            logger.warning("trying to %s %r again in %.1f s: %s", operation, path, pause, _describe(error))
        # Trying again at once would add to the load that the storage just complained about.
        time.sleep(pause)
    raise AssertionError("pauses have no end")


class DeadlineSink:
    """A sink whose calls have deadlines; one thread makes them, one after another."""

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
            # Closed only once the hanging call returns: a stream must not be closed while it is written to.
            self._line.post(lambda: self._inner.__exit__(kind, error, trace))
            self._line.end()
            return
        try:
            self._line.call(lambda: self._inner.__exit__(kind, error, trace), self._policy.publish_s, self._path)
        finally:
            self._line.end()


def _drop(sink: Sink) -> None:
    """End a sink that was opened after its deadline: nobody will write to it, and its file would stay open for ever."""
    error = TimeoutError(errno.ETIMEDOUT, "opened after the deadline")
    sink.__exit__(type(error), error, None)


def _ignore(operation: str) -> None:
    """Count nothing: a plain storage has no counter of retries."""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
