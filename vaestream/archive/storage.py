"""Files of an archive on any fsspec store: whole or not there, never in between.

Local files are written beside their place under a temporary name, flushed to the disk and moved.
Object stores show an object only when all of it has arrived. On any other store the temporary
name is uploaded and moved there.
"""

import io
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import merge_offset_ranges

from vaestream.errors import ArchiveError, VaestreamError

_ATOMIC_PROTOCOLS = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "obs", "cos", "r2", "memory"}
)
_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".writing-", ".tmp"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_GAP_BYTES = 8 << 10
_CHAIN = re.compile(rf"::{_SCHEME.pattern}")


def protocol_of(url: str) -> str:
    """The protocol in front of `://`; "file" where there is none."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else "file"


def is_chained(url: str) -> bool:
    """Whether `url` is a store inside another, as zip://a::s3://b; "::" alone is part of a name."""
    return _CHAIN.search(url) is not None


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
            f"{url}: the store cannot be opened with these storage options ({type(error).__name__})"
        ) from None
    return fs, root.rstrip("/") or root


def _kind(url: str) -> type[fsspec.AbstractFileSystem]:
    try:
        kind: type[fsspec.AbstractFileSystem] = fsspec.get_filesystem_class(protocol_of(url))
    except (ValueError, ImportError) as error:
        raise ArchiveError(f"{url}: {error}") from error
    return kind


def join(root: str, name: str) -> str:
    """The path of `name` in folder `root`."""
    return f"{root.rstrip('/')}/{name}"


def is_temporary(name: str) -> bool:
    """Whether the file name is one of a writer that has not ended."""
    return name.startswith(_TEMPORARY_PREFIX)


def list_names(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Sorted names in a folder, temporary ones too; [] where there is no folder."""
    try:
        with store_errors(root):
            fs.invalidate_cache(root)
            paths = fs.ls(root, detail=False)
    except FileNotFoundError:
        return []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)


def file_size(fs: fsspec.AbstractFileSystem, path: str) -> int:
    """Size in bytes as the store has it now. Raises FileNotFoundError."""
    with store_errors(path):
        fs.invalidate_cache(path)
        return int(fs.info(path)["size"])


def read_bytes(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    with store_errors(path):
        data: bytes = fs.cat_file(path)
    return data


@contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Raise whatever a store raises in the block as ArchiveError that names `path`.

    FileNotFoundError and vaestream's own errors pass. Stores have errors of their own, many of
    them no OSError, so nothing but calls to the store belongs in the block.
    """
    try:
        yield
    except (FileNotFoundError, VaestreamError):
        raise
    except Exception as error:
        raise ArchiveError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


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
        with store_errors(self._path):
            found = self._fs.cat_ranges(paths, starts, ends, on_error="return")
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
        with store_errors(self._path):
            data: bytes = self._fs.cat_file(self._path, start=self._at, end=end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def staged(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[str]:
    """A local file to write, in place under `path` when the block ends, gone when it raises.

    Raises ArchiveError, naming `path`, for any OSError in the block or of the store.
    """
    local = isinstance(fs, LocalFileSystem)
    parent, name = path.rsplit("/", 1)
    temporary: str | None = None
    try:
        if local:
            os.makedirs(parent or "/", exist_ok=True)
            temporary = join(parent, _temporary_name(name))
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        else:
            handle, temporary = tempfile.mkstemp(_TEMPORARY_SUFFIX, _TEMPORARY_PREFIX)
            os.close(handle)
        yield temporary
        if local:
            _publish(temporary, path)
            temporary = None
        else:
            _upload(fs, temporary, path)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be written: {error}") from error
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
            with suppress(FileNotFoundError):
                fs.rm_file(join(root, name))


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
    finally:
        os.close(folder)


def _upload(fs: fsspec.AbstractFileSystem, temporary: str, path: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    parent, name = path.rsplit("/", 1)
    atomic = bool(protocols & _ATOMIC_PROTOCOLS)
    target = path if atomic else join(parent, _temporary_name(name))
    try:
        if not atomic:
            fs.makedirs(parent, exist_ok=True)
        fs.put_file(temporary, target)
        size = file_size(fs, target)
        if size != os.path.getsize(temporary):
            raise OSError(f"the store holds {size} of {os.path.getsize(temporary)} bytes")
        if not atomic:
            fs.mv(target, path)
    except OSError:
        raise
    except Exception as error:  # each store has errors of its own, many of them no OSError
        raise OSError(f"{type(error).__name__}: {error}") from error


def _temporary_name(name: str) -> str:
    # Not all of the name: it may be as long as the store allows.
    return f"{_TEMPORARY_PREFIX}{name[:40]}-{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
