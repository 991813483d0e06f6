"""Calls to a store: given up when no answer comes, and tried again where that may help.

A call that fails for a reason that may pass (no connection, no answer, an answer that says that
the store is overloaded or has failed) is tried again after a pause. Pauses grow exponentially, and
each is drawn evenly from zero to its bound, so that many workers that fail at once do not come back
at once. A call that fails for a lasting reason (nothing there, no permission, no space) is not.

Stores have retries and time-outs of their own below these, or they have none: this is what holds
for all of them.
"""

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vaestream.errors import VaestreamError

T = TypeVar("T")

LISTING_SECONDS = 1800.0
"""How long a call may take that lists objects, however many."""

UNKNOWN_BYTES = 128 << 20
"""What a call is taken to move (see `retrying`) where nobody knows."""

_TRIES = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
_PATIENCE = 300.0
_ANSWER_SECONDS = 60.0
_SLOWEST = 256 << 10

_LASTING_STATUS = frozenset({501, 505, 507})
_PASSING_STATUS = frozenset({408, 425, 429})
_PASSING_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_LASTING = (
    VaestreamError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_LASTING_ERRNO = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EINVAL,
        errno.ELOOP,
        errno.EMSGSIZE,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOSYS,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
    }
)


def retrying(
    fs: fsspec.AbstractFileSystem,
    call: Callable[[], T],
    *,
    num_bytes: int = 0,
    seconds: float | None = None,
) -> T:
    """The result of `call`, which talks to `fs` and may safely be made more than once.

    num_bytes: how many the call moves, or a bound on that. seconds: after which a call without a
    result is given up; by default a minute and what the bytes take at 256 KiB/s. Local files have
    no such limit: there a second call would hang as the first one does. In all there are at most
    six calls, and none begins more than five minutes after the first.

    Raises what the last call has raised; TimeoutError where it gave no result. A call that was
    given up may still go on behind this and even succeed: make only calls for which that is well.
    """
    limit = _ANSWER_SECONDS + num_bytes / _SLOWEST if seconds is None else seconds
    begin = time.monotonic()
    pauses = _pauses()
    while True:
        try:
            return call() if isinstance(fs, LocalFileSystem) else within(limit, call)
        except Exception as error:  # each store has errors of its own
            pause = next(pauses, None)
            if pause is None or not may_pass(error):
                raise
            if time.monotonic() - begin + pause > _PATIENCE:
                raise
        time.sleep(pause)


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError when there is none after so many seconds."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: what hangs must not keep the process from ending, as a pool's thread would.
    threading.Thread(target=work, name="store-call", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            return future.result()
    raise TimeoutError(f"no answer within {seconds:.0f} s")


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    What a server has answered decides, where the error or its cause tells; then the error's own
    kind. Of unknown errors it is assumed: a few calls in vain cost less than a photo.
    """
    for one in _chain(error):
        code, status = _answer(one)
        if code in _PASSING_CODES:
            return True
        if status is not None and status >= 400:
            return status in _PASSING_STATUS or (status >= 500 and status not in _LASTING_STATUS)
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, _LASTING) or "Credential" in type(error).__name__:
        return False
    return not (isinstance(error, OSError) and error.errno in _LASTING_ERRNO)


def _pauses() -> Iterator[float]:
    bound = _FIRST_PAUSE
    for _ in range(_TRIES - 1):
        # Spreads processes over time: nothing that is written depends on it.
        yield random.uniform(0.0, bound)
        bound = min(2 * bound, _LONGEST_PAUSE)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__


def _answer(error: BaseException) -> tuple[str | None, int | None]:
    """The error code and HTTP status that a server has answered with, as clients note them:
    `response` as a mapping (botocore) or an object (requests), `status` (aiohttp), `code` (gcsfs),
    `status_code` and `error_code` (azure)."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        code = (response.get("Error") or {}).get("Code")
        status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
        return (None if code is None else str(code)), _status(status)
    code = getattr(error, "error_code", None)
    places = ((error, "status"), (error, "status_code"), (response, "status_code"), (error, "code"))
    found = (_status(getattr(place, name, None)) for place, name in places)
    told = next((status for status in found if status is not None), None)
    return (code if isinstance(code, str) else None), told


def _status(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 100 <= value < 600:
        return int(value)
    return None
