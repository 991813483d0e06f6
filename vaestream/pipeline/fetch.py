"""The bytes of source objects, read ahead while the codec works."""

from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from fsspec import AbstractFileSystem

from vaestream.archive.retries import UNKNOWN_BYTES, may_pass, retrying
from vaestream.errors import SourceError
from vaestream.pipeline.members import MemberError, MemberReader
from vaestream.pipeline.plan import SourceObject, Span
from vaestream.text import describe
from vaestream.urls import public_text

_UNKNOWN_SIZE = 16 << 20
_READINGS = 3
_HOSTS = 3
"""Of the web, how many others must fail for it to be more than a host."""
_REMEMBERED = 64

Witnesses = MutableMapping[tuple[int, str], SourceObject]
"""By store and host (`_host`), an object that could be read."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """An object with its bytes, or with what has kept them from being read."""

    item: SourceObject
    data: bytes | None
    error: str | None = None


def fetch_all(
    objects: Sequence[SourceObject],
    stores: Sequence[AbstractFileSystem],
    *,
    members: MemberReader,
    max_object_bytes: int,
    ahead_bytes: int = 256 << 20,
    threads: int = 8,
    witnesses: Witnesses | None = None,
) -> Iterator[Fetched]:
    """Read `objects`, in their order, from `stores`, some threads ahead of the caller.

    At most `ahead_bytes`, or one object, are held where the sources tell sizes; what has none
    counts as 16 MB. Errors that may pass are tried again (`retries.retrying`). An object that
    cannot be read, or has more than `max_object_bytes`, comes with its error. members: reads those
    of tars and the like. witnesses: what earlier calls have read; this one adds to it.

    Errors: SourceError where it is the store that fails, so that no row says that it is the photo:
    when an object that could be read before no longer can; and when none has been read and those
    that are asked for next cannot be read either, for want of permission or of an answer, or since
    none of what was listed is there. Of the web's many hosts some may fail: there it takes objects
    of several. Also where this machine has no room to unpack a tar in.
    """
    waiting: deque[tuple[SourceObject, int, Future[bytes]]] = deque()
    rest = deque(objects)
    readable: Witnesses = {} if witnesses is None else witnesses
    held = 0
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="fetch-members") as in_turn,
    ):
        try:
            while rest or waiting:
                while rest and len(waiting) < 2 * threads:
                    size = min(_size(rest[0]), max_object_bytes)
                    if waiting and held + size > ahead_bytes:
                        break
                    item = rest.popleft()
                    # `MemberReader` opens a container anew for what comes out of its order.
                    queue = pool if _is_one_call(item) else in_turn
                    store = stores[item.store]
                    future = queue.submit(_read, store, item, members, max_object_bytes)
                    waiting.append((item, size, future))
                    held += size
                item, size, future = waiting.popleft()
                try:
                    fetched = Fetched(item, future.result())
                    if fetched.data:
                        _remember(readable, item)
                except TooLargeError as error:
                    fetched = Fetched(item, None, str(error))
                except MemberError as error:
                    fetched = Fetched(item, None, f"cannot be read: {error}")
                except SourceError:
                    raise
                except Exception as error:  # every store has errors of its own
                    # A store may tell the path as it was given: with a signature, say.
                    told = public_text(describe(error).replace(item.path, item.url))
                    text = f"cannot be read: {told}"
                    fetched = Fetched(item, None, text)
                    others = [(i, f) for i, _, f in waiting if _tells_of(i, item)]
                    known = [one for one in readable.values() if _tells_of(one, item)]
                    fault = _store_fault(stores[item.store], item, error, known, others)
                    if fault is not None:
                        raise SourceError(f"{item.url}: {text}; {fault}") from error
                yield fetched
                held -= size
        finally:
            for _, _, future in waiting:
                future.cancel()


class TooLargeError(Exception):
    """An object has more bytes than may be read."""


def _store_fault(
    fs: AbstractFileSystem,
    item: SourceObject,
    error: Exception,
    known: Sequence[SourceObject],
    others: Sequence[tuple[SourceObject, Future[bytes]]],
) -> str | None:
    """Why it must be the store that fails where one object could not be read; None where it is
    that object alone, or its host. known: what could be read before; others: what is asked for
    next."""
    elsewhere = {*map(_host, known), *(_host(other) for other, _ in others)}
    if _host(item) and len(elsewhere) < _HOSTS:
        return None
    fault: str | None = None
    for witness in known[-_HOSTS:]:
        try:
            retrying(fs, partial(fs.cat_file, witness.path, start=0, end=1))
        except Exception as second:  # every store has errors of its own
            fault = f"nor can {witness.url} any longer: {public_text(describe(second))}"
        else:
            return None
    if fault is not None:
        return fault
    refused, gone = isinstance(error, PermissionError), _is_gone(item, error)
    if not (refused or gone or may_pass(error)):
        return None
    failures = [(other, future.exception()) for other, future in others]
    if any(one is None or (gone and not _is_gone(other, one)) for other, one in failures):
        return None
    if others:
        return f"nor can the next {len(others)}"
    # One object alone may well be closed to us; that it gives no answer says nothing of it.
    return (
        None if refused or gone else "and there is no other to tell whether the store is at fault"
    )


def _remember(readable: Witnesses, item: SourceObject) -> None:
    place = item.store, _host(item)
    readable.pop(place, None)
    readable[place] = item
    if len(readable) > _REMEMBERED:
        del readable[next(iter(readable))]


def _host(item: SourceObject) -> str:
    """Of the web, the host; elsewhere a store is one place, and this is empty."""
    scheme, _, rest = item.path.partition("://")
    return rest.partition("/")[0] if scheme in ("http", "https") else ""


def _tells_of(other: SourceObject, item: SourceObject) -> bool:
    """Whether what becomes of `other` tells whether it is the store's fault that `item` cannot be
    read."""
    host = _host(item)
    return other.store == item.store and (not host or _host(other) != host)


def _is_gone(item: SourceObject, error: BaseException) -> bool:
    """Whether what was listed is not there: the same folder may not be, on this machine."""
    return isinstance(error, FileNotFoundError) and item.version.size is not None


def _size(item: SourceObject) -> int:
    return _UNKNOWN_SIZE if item.version.size is None else item.version.size


def _read(
    fs: AbstractFileSystem, item: SourceObject, members: MemberReader, max_object_bytes: int
) -> bytes:
    if item.problem is not None:
        raise MemberError(item.problem)
    size = item.version.size
    if size is None and item.member is None:
        size = _told_size(fs, item.path)
    if size is not None and size > max_object_bytes:
        raise TooLargeError(_too_large(size, max_object_bytes))

    def read() -> bytes:
        if item.member is not None:
            return members.read(fs, item, max_bytes=max_object_bytes)
        return bytes(fs.cat_file(item.path))

    num_bytes = UNKNOWN_BYTES if size is None else size

    def read_again() -> bytes:
        # The reader of other members limits and repeats its own calls, as others may wait while it
        # makes them.
        return retrying(fs, read, num_bytes=num_bytes) if _is_one_call(item) else read()

    data = read_again()
    for _ in range(_READINGS):
        if size is None or len(data) == size:
            break
        # Cut short on its way, or changed since it was listed: then it comes the same way again.
        size, data = len(data), read_again()
    if len(data) > max_object_bytes:
        raise TooLargeError(_too_large(len(data), max_object_bytes))
    return data


def _is_one_call(item: SourceObject) -> bool:
    """Whether one call to the store gives its bytes, and nothing is opened for it."""
    member = item.member
    return member is None or (isinstance(member, Span) and not member.compressed)


def _told_size(fs: AbstractFileSystem, path: str) -> int | None:
    """What the store says, if it does: what comes without a size may be larger than memory."""
    try:
        size = retrying(fs, lambda: fs.info(path).get("size"))
    except Exception:  # every store has errors of its own; reading tells
        return None
    return None if size is None else int(size)


def _too_large(size: int, limit: int) -> str:
    return (
        f"has {size} bytes, more than the {limit} that are taken (--max-object-bytes); it is not "
        "in the archive"
    )
