"""The bytes of source objects, read ahead while the codec works."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from vaestream.errors import SourceError
from vaestream.pipeline.members import MemberError, MemberReader
from vaestream.pipeline.plan import SourceObject

_PAUSES = (0.5, 2.0, 8.0)
_LASTING = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    MemberError,
)
_UNKNOWN_SIZE = 16 << 20
_OUTAGE = 8


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
) -> Iterator[Fetched]:
    """Read `objects`, in their order, from `stores`, some threads ahead of the caller.

    At most `ahead_bytes`, or one object, are held. Errors that may pass are tried again. An object
    that cannot be read, or has more than `max_object_bytes`, comes with its error. Errors:
    SourceError when eight could not be read and none could: then it is the store that fails, and
    no row should say that it is the photo.
    """
    waiting: deque[tuple[SourceObject, int, Future[bytes]]] = deque()
    rest = deque(objects)
    held = read = 0
    failures: list[str] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        try:
            while rest or waiting:
                while rest and len(waiting) < 2 * threads:
                    size = min(_size(rest[0]), max_object_bytes)
                    if waiting and held + size > ahead_bytes:
                        break
                    item = rest.popleft()
                    future = pool.submit(_read, stores[item.store], item, members, max_object_bytes)
                    waiting.append((item, size, future))
                    held += size
                item, size, future = waiting.popleft()
                try:
                    fetched = Fetched(item, future.result())
                    read += 1
                except TooLargeError as error:
                    fetched = Fetched(item, None, str(error))
                    read += 1
                except MemberError as error:
                    fetched = Fetched(item, None, f"cannot be read: {error}")
                    read += 1
                except Exception as error:  # every store has errors of its own
                    text = f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
                    fetched = Fetched(item, None, text)
                    if not isinstance(error, _LASTING):
                        failures.append(f"{item.url}: {text}")
                        if not read and len(failures) == _OUTAGE:
                            raise SourceError(failures[-1]) from error
                yield fetched
                held -= size
        finally:
            for _, _, future in waiting:
                future.cancel()


class TooLargeError(Exception):
    """An object has more bytes than may be read."""


def _size(item: SourceObject) -> int:
    return _UNKNOWN_SIZE if item.version.size is None else item.version.size


def _read(
    fs: AbstractFileSystem, item: SourceObject, members: MemberReader, max_object_bytes: int
) -> bytes:
    if item.problem is not None:
        raise MemberError(item.problem)
    if item.version.size is not None and item.version.size > max_object_bytes:
        raise TooLargeError(
            f"has {item.version.size} bytes, more than the {max_object_bytes} that are taken "
            "(--max-object-bytes); it is not in the archive"
        )
    for pause in (*_PAUSES, None):
        try:
            if item.member is not None:
                data = members.read(fs, item, max_bytes=max_object_bytes)
            else:
                data = fs.cat_file(item.path)
        except _LASTING:
            raise
        except Exception:
            if pause is None:
                raise
            time.sleep(pause)
        else:
            break
    if len(data) > max_object_bytes:
        raise TooLargeError(
            f"has {len(data)} bytes, more than the {max_object_bytes} that are taken "
            "(--max-object-bytes); it is not in the archive"
        )
    return data
