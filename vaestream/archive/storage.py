"""Files of an archive on any fsspec store: whole or not there, never in between.

Local files are written beside their place under a temporary name, flushed to the disk and moved.
Object stores show an object only when all of it has arrived. On any other store the temporary
name is uploaded and moved there. Calls to the store are made as `retries` has it.
"""

import errno
import io
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import merge_offset_ranges

from vaestream.archive.retries import LISTING_SECONDS, UNKNOWN_BYTES, may_pass, retrying
from vaestream.errors import ArchiveError, VaestreamError
from vaestream.urls import is_chained, protocol_of, public_text, public_url

_ATOMIC_PROTOCOLS = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "obs", "cos", "r2", "memory"}
)
_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".writing-", ".tmp"
_GAP_BYTES = 8 << 10
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS})
"""How file systems say that they have none for folders, as those of some shares."""


def open_store(url: str, storage_options: dict[str, Any] | None) -> tuple[Any, str]:
    """The fsspec store of `url` and the path in it.

    Raises ArchiveError where there is no such store; the message shows no storage option.
    """
    options = storage_options or {}
    try:
        if is_chained(url):
            fs, root = fsspec.core.url_to_fs(url, **options)
        else:
            kind = _kind(url)
            fs = kind(**{**kind._get_kwargs_from_urls(url), **options})
            root = kind._strip_protocol(url)
    except ArchiveError:
        raise
    except Exception as error:  # as in `store_errors`; the chain is cut for it may show options
        raise ArchiveError(
            f"{public_url(url)}: the store cannot be opened with these storage options "
            f"({type(error).__name__})"
        ) from None
    return fs, root.rstrip("/") or root


def _kind(url: str) -> type[fsspec.AbstractFileSystem]:
    try:
        kind: type[fsspec.AbstractFileSystem] = fsspec.get_filesystem_class(protocol_of(url))
    except (ValueError, ImportError) as error:
        raise ArchiveError(f"{public_url(url)}: {error}") from error
    return kind


def join(root: str, name: str) -> str:
    """The path of `name` in folder `root`."""
    return f"{root.rstrip('/')}/{name}"


def is_temporary(name: str) -> bool:
    """Whether the file name is one of a writer that has not ended."""
    return name.startswith(_TEMPORARY_PREFIX)


def list_names(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Sorted names in a folder, temporary ones too; [] where there is no folder."""

    def ls() -> list[str]:
        fs.invalidate_cache(root)
        paths: list[str] = fs.ls(root, detail=False)
        return paths

    try:
        with store_errors(fs, root):
            paths = retrying(fs, ls, seconds=LISTING_SECONDS)
    except FileNotFoundError:
        return []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)


def file_size(fs: fsspec.AbstractFileSystem, path: str) -> int:
    """Size in bytes as the store has it now. Raises FileNotFoundError."""

    def size() -> int:
        fs.invalidate_cache(path)
        return int(fs.info(path)["size"])

    with store_errors(fs, path):
        return retrying(fs, size)


def exists(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether the file is there now."""
    try:
        file_size(fs, path)
    except FileNotFoundError:
        return False
    return True


def read_bytes(
    fs: fsspec.AbstractFileSystem, path: str, start: int | None = None, end: int | None = None
) -> bytes:
    """The file's bytes from `start` to `end`, by default all. Raises FileNotFoundError."""
    wanted = None
    if start is not None and end is not None and end >= start >= 0:
        wanted = end - start
    with store_errors(fs, path):
        data = retrying(
            fs,
            lambda: bytes(fs.cat_file(path, start=start, end=end)),
            num_bytes=UNKNOWN_BYTES if wanted is None else wanted,
        )
        if wanted is not None and len(data) > wanted:
            raise _no_ranges(fs, path)
        return data


def read_ranges(
    fs: fsspec.AbstractFileSystem, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int]
) -> list[bytes | Exception]:
    """The bytes of many ranges, read at once; an exception in place of each that cannot be read.

    Raises what the store raises where it is none of a single range, and ArchiveError for one that
    does not serve ranges, as HTTP servers may not.
    """
    places = list(zip(paths, starts, ends, strict=True))
    found: list[bytes | Exception] = retrying(
        fs,
        lambda: list(fs.cat_ranges(list(paths), list(starts), list(ends), on_error="return")),
        num_bytes=sum(end - start for _, start, end in places),
    )
    for at, (path, start, end) in enumerate(places):
        answer = found[at]
        if isinstance(answer, Exception) and may_pass(answer):
            try:
                found[at] = read_bytes(fs, path, start, end)
            except (FileNotFoundError, ArchiveError) as error:
                found[at] = error
        elif isinstance(answer, bytes) and len(answer) > end - start:
            raise _no_ranges(fs, path)
    return found


def _no_ranges(fs: fsspec.AbstractFileSystem, path: str) -> ArchiveError:
    return ArchiveError(f"{shown(fs, path)}: the store gives whole files where parts are asked for")


def shown(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The path as people know it: with its protocol, but for local files, and as `public_url`."""
    return path if isinstance(fs, LocalFileSystem) else public_url(str(fs.unstrip_protocol(path)))


@contextmanager
def store_errors(fs: fsspec.AbstractFileSystem, path: str, done: str = "read") -> Iterator[None]:
    """Raise whatever a store raises in the block as ArchiveError: `path` cannot be `done`.

    FileNotFoundError and vaestream's own errors pass. Stores have errors of their own, many of
    them no OSError, so nothing but calls to the store belongs in the block.
    """
    try:
        yield
    except (FileNotFoundError, VaestreamError):
        raise
    except Exception as error:
        told = f"{shown(fs, path)}: cannot be {done}: {type(error).__name__}: {error}"
        raise ArchiveError(public_text(told)) from error


class RangeFile(io.RawIOBase):
    """A file that can be read, each read one ranged read of the store, with nothing cached.

    Every one has a position of its own, so many threads can read one file (fsspec's own file
    objects are shared in some stores, and read ahead in others).

    Give it to pyarrow with pre_buffer=False and use_threads=False (`prefetch` is for what
    pre_buffer would do): a thread of pyarrow's that still holds a Python file when the interpreter
    ends aborts the process (apache/arrow#34314).
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, size: int) -> None:
        self._fs, self._path, self._size, self._at = fs, path, size, 0
        self._blocks: list[tuple[int, bytes]] = []

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Read these ranges (start, end), neighbours together; reads within them are free then.

        What cannot be read is left to the read that wants it.
        """
        within = [(max(0, start), min(end, self._size)) for start, end in ranges]
        spans = [(start, end) for start, end in within if start < end]
        if not spans:
            return
        paths, starts, ends = merge_offset_ranges(
            [self._path] * len(spans), *map(list, zip(*spans, strict=True)), max_gap=_GAP_BYTES
        )
        with store_errors(self._fs, self._path):
            found = read_ranges(self._fs, paths, starts, ends)
        self._blocks = [
            (start, data)
            for start, data in zip(starts, found, strict=True)
            if isinstance(data, bytes)
        ]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._at + len(buffer))
        if end <= self._at:
            return 0
        for start, block in self._blocks:
            if start <= self._at and end <= start + len(block):
                buffer[: end - self._at] = block[self._at - start : end - start]
                length, self._at = end - self._at, end
                return length
        data = read_bytes(self._fs, self._path, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def staged(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[str]:
    """A local file to write, in place under `path` when the block ends, gone when it raises.

    It lies beside `path`, or in the folder for temporary files where that is in another store.
    Raises ArchiveError, naming `path`, for any OSError in the block or of the store.
    """
    local = isinstance(fs, LocalFileSystem)
    parent, name = path.rsplit("/", 1)
    done = "written"
    temporary: str | None = None
    try:
        if local:
            os.makedirs(parent or "/", exist_ok=True)
            temporary = join(parent, _temporary_name(name))
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        else:
            done = f"written in {tempfile.gettempdir()} first"
            handle, temporary = tempfile.mkstemp(_TEMPORARY_SUFFIX, _TEMPORARY_PREFIX)
            os.close(handle)
        yield temporary
        done = "written"
        if local:
            _publish(temporary, path)
            temporary = None
        else:
            _upload(fs, temporary, path)
    except OSError as error:
        told = f"{shown(fs, path)}: cannot be {done}: {error}"
        raise ArchiveError(public_text(told)) from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def put_bytes(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a whole file at once. Raises ArchiveError, naming the path."""
    with staged(fs, path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def remove_temporaries(fs: fsspec.AbstractFileSystem, root: str) -> None:
    """Remove what killed writers left in a folder; call it when no writer is at work there."""
    for name in list_names(fs, root):
        if is_temporary(name):
            remove(fs, join(root, name))


def remove(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Remove a file, if it is there. Raises ArchiveError, naming the path."""
    with suppress(FileNotFoundError), store_errors(fs, path, "removed"):
        retrying(fs, lambda: fs.rm_file(path))


def remove_folder(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Remove a folder and all in it, if it is there. Raises ArchiveError, naming the path."""

    def rm() -> None:
        # Others have written there, which this process's cached listings don't show.
        fs.invalidate_cache()
        fs.rm(path, recursive=True)

    with suppress(FileNotFoundError), store_errors(fs, path, "removed"):
        retrying(fs, rm, seconds=LISTING_SECONDS)


def _publish(temporary: str, path: str) -> None:
    """Move a local file into place so that after a power cut it is there whole or not at all."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or "/", os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(folder)


def _upload(fs: fsspec.AbstractFileSystem, temporary: str, path: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    parent, name = path.rsplit("/", 1)
    atomic = bool(protocols & _ATOMIC_PROTOCOLS)
    target = path if atomic else join(parent, _temporary_name(name))
    wanted = os.path.getsize(temporary)

    def put() -> None:
        if not atomic:
            fs.makedirs(parent, exist_ok=True)
        fs.put_file(temporary, target)
        fs.invalidate_cache(target)
        size = int(fs.info(target)["size"])
        if size != wanted:
            raise OSError(f"the store holds {size} of {wanted} bytes")

    def move() -> None:
        try:
            fs.mv(target, path)
        except FileNotFoundError:
            # Where an earlier call has moved it and only its answer was lost, that is well.
            fs.invalidate_cache(path)
            if int(fs.info(path)["size"]) != wanted:
                raise
        except FileExistsError:
            pass
        # Some stores move nothing onto a file (SMB), and not all of them say so (WebHDFS).
        fs.invalidate_cache(parent)
        if fs.exists(target):
            fs.rm_file(path)
            fs.mv(target, path)

    try:
        retrying(fs, put, num_bytes=wanted)
        if not atomic:
            retrying(fs, move, num_bytes=wanted)
    except Exception as error:  # each store has errors of its own, many of them no OSError
        if not atomic:
            # The next commit clears away what stays.
            with suppress(Exception):
                fs.rm_file(target)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _temporary_name(name: str) -> str:
    # Not all of the name: it may be as long as the store allows.
    return f"{_TEMPORARY_PREFIX}{name[:40]}-{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
