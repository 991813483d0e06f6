"""Files that hold photos: tars (WebDataset shards too), zips, Parquet with an image column.

Members are read where they lie, each by itself, and never written out under their names.
"""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from vaestream.archive.storage import RangeFile, file_size
from vaestream.errors import ArchiveError, SourceError
from vaestream.pipeline.plan import Cell, Member, SourceObject, Span, ZipMember, escape, utc
from vaestream.pipeline.tables import PARQUET_ENDING, image_cells, is_parquet

_PACKED_TAR_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_TAR_ENDINGS = (".tar", *_PACKED_TAR_ENDINGS)
_ZIP_ENDING = ".zip"
_BLOCK_BYTES = 256 << 10
"""Read ahead in a container: more than a header, less than most photos."""

_LOCAL_BLOCK_BYTES = 16 << 10
_STREAM_BYTES = 4 << 20
"""Read ahead in one that is read from its beginning to its end."""

_BATCH_BYTES = 64 << 20
"""Of a Parquet file's pictures in memory."""

_DAMAGED_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ValueError,  # names that are no text, too
    struct.error,
)

_DAMAGED_TAR = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
"""What the store raises is an ArchiveError where these are caught (`_open`), or one of no file."""


class MemberError(Exception):
    """A member cannot be read, now or ever."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a container holds. kind: protocol by which fsspec reaches it there; "" without one.

    member is None for the container itself, where it cannot be opened; problem: why there is
    nothing to read.
    """

    name: str
    kind: Literal["tar", "zip", ""]
    member: Member | None
    size: int | None = None
    mtime: datetime | None = None
    problem: str | None = None


def is_container(name: str) -> bool:
    """Whether the file name is one of a tar or zip."""
    return name.lower().endswith((*_TAR_ENDINGS, _ZIP_ENDING))


def list_members(fs: AbstractFileSystem, path: str, name: str) -> Iterator[Found]:
    """The members of a tar, zip or Parquet file, in their order; `name` tells which it is.

    A file that is none of these comes as itself, to be kept as it is; one that breaks off, with a
    last entry that says so. Raises what the store raises.
    """
    if is_parquet(name):
        yield from _in_parquet(fs, path, name)
        return
    is_stream = name.lower().endswith(_PACKED_TAR_ENDINGS)
    with _as_the_store_tells(), _open(fs, path, is_stream=is_stream) as file:
        if name.lower().endswith(_ZIP_ENDING):
            yield from _in_zip(file, name)
        else:
            yield from _in_tar(file, name)


def member_url(container: str, found: Found) -> str:
    """The URL by which a member is told: for those of tar and zip, as fsspec opens it."""
    name = escape(found.name)
    return f"{found.kind}://{name}::{container}" if found.kind else f"{container}#{name}"


def container_url(url: str) -> str | None:
    """The container's URL in a member's, None where it is not one's."""
    if url.startswith(("tar://", "zip://")) and "::" in url:
        return url.rpartition("::")[2]
    end = url.lower().find(PARQUET_ENDING + "#")
    return None if end < 0 else url[: end + len(PARQUET_ENDING)]


class MemberReader:
    """Reads members; keeps the container of the last one open. Threads may share it.

    A compressed tar cannot be entered in the middle: it is unpacked to a temporary file first, once
    for all members that are asked for in a row.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: tuple[tuple[str, str | None, object], Any] | None = None

    def read(self, fs: AbstractFileSystem, item: SourceObject, *, max_bytes: int) -> bytes:
        """The bytes of `item`, at most `max_bytes` + 1 of them. Errors: MemberError, and what the
        store raises."""
        member = item.member
        if isinstance(member, Span):
            end = member.offset + min(member.size, max_bytes + 1)
            if member.compressed:
                data = self._unpacked(fs, item, member.offset, end)
            else:
                data = fs.cat_file(item.path, start=member.offset, end=end)
            if len(data) != end - member.offset:
                raise MemberError(f"the tar ends after {len(data)} of its {member.size} bytes")
            return data
        if isinstance(member, ZipMember):
            return self._from_zip(fs, item, member, max_bytes)
        assert isinstance(member, Cell)
        return self._from_cell(fs, item, member)

    def close(self) -> None:
        """Let go of what is open."""
        with self._lock:
            self._drop()

    def _unpacked(self, fs: AbstractFileSystem, item: SourceObject, start: int, end: int) -> bytes:
        with self._lock:
            file: IO[bytes] | None = self._held(item, "tar")
            if file is None:
                # Without a buffer: it is read past Python's file object.
                file = tempfile.TemporaryFile(prefix="vaestream-", buffering=0)  # noqa: SIM115
                try:
                    _unpack(fs, item, file)
                except BaseException:
                    file.close()
                    raise
                self._hold(item, "tar", file)
            return os.pread(file.fileno(), end - start, start)

    def _from_zip(
        self, fs: AbstractFileSystem, item: SourceObject, member: ZipMember, max_bytes: int
    ) -> bytes:
        with self._lock, _as_the_store_tells():
            archive: zipfile.ZipFile | None = self._held(item, "zip")
            if archive is None:
                archive = zipfile.ZipFile(_open(fs, item.path))
                self._hold(item, "zip", archive)
            # By its number, as another may have the same name; but only what was listed.
            entries = archive.infolist()
            if member.number >= len(entries) or entries[member.number].filename != member.name:
                raise MemberError("is not where it was in the zip")
            info = entries[member.number]
            try:
                with archive.open(info) as stream:
                    return stream.read(max_bytes + 1)
            except _DAMAGED_ZIP as error:
                raise MemberError(str(error)) from error
            except OSError as error:
                if info.compress_type == zipfile.ZIP_BZIP2 and error.errno is None:
                    raise MemberError(str(error)) from error
                raise

    def _from_cell(self, fs: AbstractFileSystem, item: SourceObject, cell: Cell) -> bytes:
        with self._lock, _as_the_store_tells():
            rows: _RowGroup | None = self._held(item, cell.group)
            if rows is None:
                rows = _RowGroup(_open(fs, item.path), cell.group, cell.column)
                self._hold(item, cell.group, rows)
            data = rows.value(cell.row)
        if data is None:
            raise MemberError("there is no image in this row")
        return data

    def _held(self, item: SourceObject, what: object) -> Any:
        if self._open is not None and self._open[0] == (item.path, item.version.etag, what):
            return self._open[1]
        return None

    def _hold(self, item: SourceObject, what: object, opened: object) -> None:
        self._drop()
        self._open = (item.path, item.version.etag, what), opened

    def _drop(self) -> None:
        if self._open is not None and hasattr(self._open[1], "close"):
            self._open[1].close()
        self._open = None


class _RowGroup:
    """The values of one column in a row group of a Parquet file, of which a few are in memory at a
    time: a group may have more bytes than memory, or than an Arrow array can."""

    _start: int
    _values: pa.ChunkedArray

    def __init__(self, file: IO[bytes], group: int, column: str) -> None:
        self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=_STREAM_BYTES)
        self._group, self._column = group, column
        metadata = self._file.metadata.row_group(group)
        self._batch_rows = max(
            1, _BATCH_BYTES * metadata.num_rows // (metadata.total_byte_size or 1)
        )
        self._begin()

    def value(self, row: int) -> bytes | None:
        """The value in a row of the group; fast where the rows asked for ascend."""
        if row < self._start:
            self._begin()
        while row >= self._start + len(self._values):
            batch = next(self._batches, None)
            if batch is None:
                raise MemberError("is not where it was in the Parquet file")
            self._start += len(self._values)
            table = pa.Table.from_batches([batch])
            self._values = (table.flatten() if "." in self._column else table).column(0)
        data: bytes | None = self._values[row - self._start].as_py()
        return data

    def _begin(self) -> None:
        self._batches = self._file.iter_batches(
            self._batch_rows, row_groups=[self._group], columns=[self._column], use_threads=False
        )
        self._start, self._values = 0, pa.chunked_array([], pa.binary())


def _open(fs: AbstractFileSystem, path: str, *, is_stream: bool = False) -> io.BufferedReader:
    """A container as a file whose every read is a call to the store that is tried again by itself
    and has a limit of its own. It fails with an ArchiveError, which the readers of tars and zips
    don't take for damage, as they would an OSError."""
    block = _LOCAL_BLOCK_BYTES if isinstance(fs, LocalFileSystem) else _BLOCK_BYTES
    file = RangeFile(fs, path, file_size(fs, path))
    return io.BufferedReader(file, _STREAM_BYTES if is_stream else block)


@contextmanager
def _as_the_store_tells() -> Iterator[None]:
    """Raise what the store has raised in the block, not what `storage` makes of it."""
    try:
        yield
    except ArchiveError as error:
        told = error.__cause__
        if isinstance(told, Exception):
            raise told from told.__cause__
        raise


def _unpack(fs: AbstractFileSystem, item: SourceObject, file: IO[bytes]) -> None:
    """The tar's own bytes, as far as it is whole, into a temporary file.

    Errors: SourceError where this machine has no room for them, and what the store raises.
    """
    with _as_the_store_tells(), _open(fs, item.path, is_stream=True) as packed:
        try:
            with _decompressed(packed) as stream:
                # A little at a time: as much of it as there is before the damage.
                while chunk := stream.read1(_BLOCK_BYTES):
                    _append(file, chunk)
        except FileNotFoundError:
            raise
        except _DAMAGED_TAR:  # of which the listing has told
            return


def _append(file: IO[bytes], data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        folder = tempfile.gettempdir()
        raise SourceError(f"{folder}: no room to unpack a compressed tar in: {error}") from error


def _decompressed(file: IO[bytes]) -> gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    """A stream of the tar's own bytes."""
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"BZh"):
        return bz2.open(file)
    if magic.startswith(b"\xfd7zXZ"):
        return lzma.open(file)
    return gzip.open(file)


def _in_tar(file: IO[bytes], name: str) -> Iterator[Found]:
    try:
        tar = tarfile.open(fileobj=file, mode="r:*")  # noqa: SIM115
    except FileNotFoundError:
        raise
    except _DAMAGED_TAR:
        yield Found(name.rpartition("/")[2], "", None)
        return
    compressed = tar.fileobj is not file
    places: dict[str, tuple[int, int]] = {}
    count = 0
    problem: str | None = None
    with tar:
        while True:
            try:
                info = tar.next()
                if info is None:
                    problem = _end(tar, compressed=compressed)
                    break
            except FileNotFoundError:
                raise
            except _DAMAGED_TAR as error:
                problem = str(error)
                break
            tar.members.clear()  # type: ignore[attr-defined]
            if info.isdir():
                continue
            count += 1
            place = (info.offset_data, info.size) if info.isreg() else None
            if info.islnk() or info.issym():
                folder = info.name.rpartition("/")[0] if info.issym() else ""
                target = os.path.normpath(os.path.join(folder, info.linkname))
                place = places.get(target)
                if place is None:
                    problem = f"is a link to {escape(target)}, which does not come before it"
            elif place is None or info.issparse():
                place, problem = None, "is neither a file nor a link"
            if place is not None:
                places[os.path.normpath(info.name)] = place
            yield Found(
                info.name,
                "tar",
                Span(*place, compressed) if place else None,
                place[1] if place else None,
                utc(info.mtime) if info.mtime else None,
                problem,
            )
            problem = None
    if problem is not None:
        # Checksums of a compressed one come after what they are of.
        what = f"{count} members, some of which may be, too" if compressed else f"{count} members"
        told = f"the tar is damaged after {what}, what follows is not read: {problem}"
        yield Found(name.rpartition("/")[2], "", None, problem=told)


def _end(tar: tarfile.TarFile, *, compressed: bool) -> str | None:
    """Why the tar ends here, where it should not: tarfile takes a damaged header for the end.

    Raises `_DAMAGED_TAR` for what the last checksum of a compressed one tells.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if any(block):
        return "bad header"
    try:
        while compressed and tar.fileobj.read(_BLOCK_BYTES):
            pass
    except gzip.BadGzipFile as error:
        # What is no gzip any more after the end is nothing, to bz2, lzma and gzip's program, too.
        if not str(error).startswith("Not a gzipped file"):
            raise
    return None


def _in_parquet(fs: AbstractFileSystem, path: str, name: str) -> Iterator[Found]:
    count = 0
    try:
        for key, cell in image_cells(fs, path):
            yield Found(key, "", cell)
            count += 1
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        told = f"the Parquet file is damaged after {count} rows, what follows is not read: {error}"
        yield Found(name.rpartition("/")[2], "", None, problem=told)


def _in_zip(file: IO[bytes], name: str) -> Iterator[Found]:
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGED_ZIP:
        yield Found(name.rpartition("/")[2], "", None)
        return
    with archive:
        for number, info in enumerate(archive.infolist()):
            if info.is_dir():
                continue
            problem = "is encrypted" if info.flag_bits & 1 else None
            member = ZipMember(number, info.filename)
            yield Found(info.filename, "zip", member, info.file_size, problem=problem)
