"""Photos out of an archive into files, in any store."""

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from vaestream import images
from vaestream.archive.reader import Archive
from vaestream.archive.schema import RowInfo
from vaestream.archive.storage import join, put_bytes, read_bytes, remove_folder
from vaestream.codec.view import Region, check_view
from vaestream.errors import ArchiveError, DamagedArchiveError, VaestreamError
from vaestream.pipeline.plan import safe_key
from vaestream.pipeline.stores import store_of

Format = Literal["png", "jpeg", "webp", "source"]

_ENDINGS: dict[str, tuple[str, ...]] = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "webp": (".webp",),
}
_NO_MORE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
"""Errors after which no other file can be written either."""
_NOTES = ".vaestream-extract"
"""Folder in the destination for what only a running extraction needs."""
_CHUNK = 256
_WAVE = 1024
"""Chunks that Ray has at a time."""
_BATCH_PIXELS = 32_000_000
_BATCH_BYTES = 64 << 20
_BATCH_ROWS = 64


@dataclass(slots=True)
class Extracted:
    """What became of the rows: decoded and written, source bytes written as they are (those of
    broken objects too), passed over as an interrupted run has written them, and the key and reason
    of each that could not be written."""

    decoded: int = 0
    verbatim: int = 0
    earlier: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Extracted") -> None:
        """Count in what became of other rows."""
        self.decoded += other.decoded
        self.verbatim += other.verbatim
        self.earlier += other.earlier
        self.failures.update(other.failures)


def extract(
    archive: Archive,
    destination: str,
    keys: Sequence[str] = (),
    *,
    format: Format | None = None,
    region: Region | None = None,
    max_size: int | None = None,
    workers: int | None = None,
    address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[Extracted], None] | None = None,
) -> Extracted:
    """Write photos to files below `destination`, a folder or URL; all of them where no keys are
    given. A key that is not in the archive may be a shell pattern (`*` also matches slashes).

    Objects that the archive keeps as their source come out byte for byte under their own name.
    Compressed photos come out in `format`, png when nothing is said; "source" is the format that
    the photo's source had, where that is one of the three, and png otherwise. Their name gets the
    format's ending in place of its own, or behind it where another object of the archive would
    have the same name then. EXIF, XMP and ICC go along; on a local disk the time of modification
    too. Each file is written whole or not at all, and none outside `destination`: names that point
    elsewhere are written as `plan.safe_key` has it.

    region (left, top, width, height in pixels) and max_size (pixels on the longer side) give part
    of each compressed photo, or a smaller one, as `Archive.read` does.

    More than 256 rows are divided among the workers of a Ray job, as many as `cluster.plan_pools`
    says, on the archive's device; fewer, or with workers=0 all, are written by this process. Run
    again after an interruption with the same archive, keys and settings, it goes on where it was.

    Errors: VaestreamError for a region or size that no picture can have, ArchiveError for a key
    that is not there, and for a destination that cannot be written or is full; what is wrong with
    single rows is in the result.
    """
    try:
        check_view(region, max_size)
    except ValueError as error:
        raise VaestreamError(str(error)) from error
    fs, root = store_of(destination, storage_options)
    if isinstance(fs, LocalFileSystem):
        try:
            os.makedirs(root, exist_ok=True)
        except OSError as error:
            raise ArchiveError(f"{root}: cannot be written: {error}") from error
    chosen = _chosen(archive, keys)
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    writer = ChunkWriter(archive, fs, root, _Wanted(format, region, max_size), _CHUNK)
    result = Extracted()
    for part in _in_turn(writer, chunks, workers, address):
        result.add(part)
        if progress is not None:
            progress(result)
    remove_folder(fs, join(root, _NOTES))
    return result


def _in_turn(
    writer: "ChunkWriter", chunks: Sequence[Sequence[str]], workers: int | None, address: str | None
) -> Iterator[Extracted]:
    if workers == 0 or (len(chunks) <= 1 and workers is None and address is None):
        yield from map(writer.write, chunks)
        return
    from vaestream.pipeline.cluster import Device, cluster_nodes, map_rows, plan_pools, ray_session

    with ray_session(address):
        device = writer.archive.device
        kind: Device = "auto" if device == "auto" else "cpu" if device == "cpu" else "cuda"
        (pool, *_) = plan_pools(cluster_nodes(), shards=len(chunks), device=kind, workers=workers)
        for start in range(0, len(chunks), _WAVE):
            rows = [{"keys": json.dumps(chunk)} for chunk in chunks[start : start + _WAVE]]
            for row in map_rows(_ExtractWorker, (writer, pool.device), rows, pool, None):
                told = json.loads(row["told"])
                if "error" in told:
                    raise ArchiveError(told["error"])
                yield Extracted(**told)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What files of compressed photos hold."""

    format: Format | None
    region: Region | None
    max_size: int | None


class ChunkWriter:
    """Writes the files of some rows; picklable. A chunk of `size` rows leaves a note when it is
    written."""

    def __init__(
        self, archive: Archive, fs: AbstractFileSystem, root: str, wanted: _Wanted, size: int
    ) -> None:
        self.archive, self._size = archive, size
        self._fs, self._root, self._wanted = fs, root, wanted
        self._names = _Names(archive, wanted.format)

    def write(self, keys: Sequence[str]) -> Extracted:
        """Write the files of these rows, unless their note says that they are written."""
        index = self.archive.manifest.index_sha256
        chunk = json.dumps([index, asdict(self._wanted), list(keys)]).encode()
        note = join(self._root, f"{_NOTES}/{hashlib.sha256(chunk).hexdigest()[:32]}")
        with suppress(FileNotFoundError, ValueError):
            failures = json.loads(read_bytes(self._fs, note))
            return Extracted(earlier=len(keys) - len(failures), failures=failures)
        result = Extracted()
        for batch in _batches(self.archive, keys, result):
            contents = _contents(self.archive, batch, self._names, self._wanted, result)
            _write(contents, self._names, self._fs, self._root, result)
        if len(keys) == self._size:
            put_bytes(self._fs, note, json.dumps(result.failures).encode())
        return result


class _ExtractWorker:
    """A callable for `cluster.map_rows`: column "keys" (JSON) in, "told" (JSON) out."""

    def __init__(self, writer: ChunkWriter, device: str) -> None:
        import torch

        torch.set_num_threads(1)
        writer.archive.device = device
        self._writer = writer

    def __call__(self, batch: dict[str, "np.ndarray[Any, Any]"]) -> dict[str, list[str]]:
        return {"told": [self._tell(json.loads(keys)) for keys in batch["keys"]]}

    def _tell(self, keys: list[str]) -> str:
        try:
            return json.dumps(asdict(self._writer.write(keys)))
        except ArchiveError as error:
            return json.dumps({"error": str(error)})


class _Names:
    """File names of rows, without two alike."""

    def __init__(self, archive: Archive, format: Format | None) -> None:
        self._format = format
        self._archive = archive

    def format_of(self, row: RowInfo) -> Literal["png", "jpeg", "webp"]:
        """The format of a compressed photo's file."""
        if self._format in (None, "source"):
            source = (row.source_format or "").lower() if self._format else ""
            return source if source in ("jpeg", "webp") else "png"  # type: ignore[return-value]
        return self._format  # type: ignore[return-value]

    def of(self, row: RowInfo) -> str:
        """The path below the destination."""
        path = safe_key(row.key)
        if row.codec == "source" or row.error is not None:
            return path
        endings = _ENDINGS[self.format_of(row)]
        if path.lower().endswith(endings):
            return path
        stem = _stem(row.key)
        # A key with the same stem, or that is it, may get that name behind its own ending.
        alike = [key for key in self._archive.keys_with(stem + ".") if _stem(key) == stem]
        if alike in ([], [row.key]) and (stem == row.key or stem not in self._archive):
            return _stem(path) + endings[0]
        more = endings[0]
        while row.key + more in self._archive:
            more += endings[0]
        return path + more


def _stem(path: str) -> str:
    """Without the ending, unless it is too long or odd to be one."""
    stem, ending = os.path.splitext(path)
    return stem if len(ending) <= 6 and ending[1:].isalnum() else path


def _chosen(archive: Archive, keys: Sequence[str]) -> list[str]:
    if not keys:
        return list(archive)
    chosen: dict[str, None] = {}
    for key in keys:
        matches = [key] if key in archive else [one for one in archive if fnmatchcase(one, key)]
        if not matches:
            raise ArchiveError(f"{archive.name}: no photo {key!r}")
        chosen.update(dict.fromkeys(matches))
    return list(chosen)


def _batches(archive: Archive, keys: Sequence[str], result: Extracted) -> Iterator[list[RowInfo]]:
    """Rows that fit into memory together: read in one go, decoded in one go. Those that a damaged
    part does not tell go to the failures."""
    batch: list[RowInfo] = []
    pixels = size = 0
    for key in keys:
        try:
            row = archive.row(key)
        except DamagedArchiveError as error:
            result.failures[key] = str(error)
            continue
        more = (row.width or 0) * (row.height or 0) if row.codec == "vae" else 0
        full = pixels + more > _BATCH_PIXELS or size + row.num_bytes > _BATCH_BYTES
        if batch and (full or len(batch) == _BATCH_ROWS):
            yield batch
            batch, pixels, size = [], 0, 0
        batch.append(row)
        pixels += more
        size += row.num_bytes
    if batch:
        yield batch


def _write(
    contents: Iterable[tuple[RowInfo, bytes]],
    names: _Names,
    fs: Any,
    root: str,
    result: Extracted,
) -> None:
    for row, data in contents:
        if row.unread:
            result.failures[row.key] = str(row.error)
            continue
        name = names.of(row)
        try:
            path = _place(fs, root, name)
            put_bytes(fs, path, data)
            if isinstance(fs, LocalFileSystem) and row.source_mtime is not None:
                stamp = row.source_mtime.timestamp()
                os.utime(path, (stamp, stamp))
        except (ArchiveError, OSError, ValueError) as error:
            if getattr(error.__cause__, "errno", None) in _NO_MORE:
                raise
            # A name the store does not take, or a file where a folder must be: only this row's.
            result.failures[row.key] = str(error)
            continue
        if row.codec == "vae":
            result.decoded += 1
        else:
            result.verbatim += 1


def _contents(
    archive: Archive,
    batch: Sequence[RowInfo],
    names: _Names,
    wanted: _Wanted,
    result: Extracted,
) -> Iterator[tuple[RowInfo, bytes]]:
    """Rows with the bytes of their files; damaged ones go to the failures."""
    coded = [row for row in batch if row.codec == "vae"]
    plain = [row for row in batch if row.codec != "vae"]
    try:
        blobs = archive.blobs([row.key for row in plain])
        pixels = archive.read(
            [row.key for row in coded], region=wanted.region, max_size=wanted.max_size
        )
        extras = archive.payloads([row.key for row in coded])
    except (VaestreamError, ValueError) as error:
        if len(batch) == 1:
            result.failures[batch[0].key] = str(error)
            return
        for row in batch:
            yield from _contents(archive, [row], names, wanted, result)
        return
    yield from zip(plain, blobs, strict=True)
    for row, array, extra in zip(coded, pixels, extras, strict=True):
        file = io.BytesIO()
        try:
            images.save(
                array, file, names.format_of(row), exif=extra.exif, xmp=extra.xmp, icc=extra.icc
            )
        except (OSError, ValueError) as error:
            result.failures[row.key] = f"cannot be written as {names.format_of(row)}: {error}"
            continue
        yield row, file.getvalue()


def _place(fs: Any, root: str, name: str) -> str:
    path = join(root, name)
    if isinstance(fs, LocalFileSystem):
        # A link below the destination may lead out of it.
        folder, inside = os.path.realpath(root), os.path.realpath(os.path.dirname(path))
        if inside != folder and not inside.startswith(folder.rstrip("/") + "/"):
            raise ArchiveError(f"{path}: leads out of {root}")
    return path
