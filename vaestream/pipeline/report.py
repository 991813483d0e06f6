"""What a job has made, on one page: `report.html`, beside the manifest and no part of the archive.

`gather` reads the small columns of the parts, one part after the other, and keeps counts and the
few worst photos: what it holds does not grow with the archive.
"""

import hashlib
import heapq
import io
import logging
import os
import re
import threading
import time
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from PIL import Image

from vaestream import __version__, images
from vaestream.archive.layout import column_ranges, read_footer
from vaestream.archive.manifest import REPORT, PartInfo, PartStats
from vaestream.archive.models import model_path
from vaestream.archive.reader import Archive
from vaestream.archive.storage import RangeFile, file_size, join, open_store, put_bytes, remove
from vaestream.errors import DamagedArchiveError, VaestreamError
from vaestream.pipeline.members import (
    MemberError,
    MemberReader,
    container_url,
    list_members,
    member_url,
)
from vaestream.pipeline.plan import SourceObject, Version
from vaestream.pipeline.stores import store_of
from vaestream.pipeline.walk import name_of
from vaestream.urls import protocol_of

WORST = 12
"""Photos of the lowest PSNR that are shown."""

_KINDS, _KEYS = 20, 8
_MOST_KINDS = 1000
_THREADS = 8
_MAX_PIXELS = 64_000_000
_MAX_SOURCE_BYTES = 256 << 20
_SEARCH_SECONDS = 30.0
_SIDE, _CROP, _REGION = 320, 144, 512
_WHOLE_PIXELS = 2_000_000
"""Photos of more are decoded small, with a region of them at full size."""
_PICTURE_BYTES = 22_000
_PROFILE_BYTES = 4096
_COLUMNS = [
    *("key", "codec", "num_bytes", "width", "height", "quality", "psnr"),
    *("source_size", "source_url", "source_sha256", "error"),
]
# What differs from one object to the next in an error that is the same: names and numbers.
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|(?<!\w)(?<!Errno )\d+(?!\w)")

_log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Histogram:
    """Counts of values in bins of width `step` from 0 on; the last bin takes all above it.

    low, high: least and largest of the values themselves, None where there are none.
    """

    step: float
    counts: npt.NDArray[np.int64]
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, step: float, bins: int) -> "Histogram":
        """One without values."""
        return cls(step, np.zeros(bins, np.int64))

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Count finite values, none of them negative."""
        if not len(values):
            return
        bins = np.minimum(values / self.step, len(self.counts) - 1).astype(np.int64)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        low, high = float(values.min()), float(values.max())
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of all lie, to within a step; None without values."""
        if self.low is None or self.high is None:
            return None
        if share >= 1:
            return self.high
        at = int(np.searchsorted(np.cumsum(self.counts), share * self.total))
        return min(max((at + 0.5) * self.step, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG to be shown, width and height in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class WorstPhoto:
    """A photo of low PSNR. psnr: dB. bpp: bits per pixel. width, height: pixels.

    decoded, source: thumbnails. decoded_crop, source_crop: pixels as they are, from where the two
    differ most. Where a picture is missing, decoded_note and source_note say why.
    """

    key: str
    psnr: float
    bpp: float
    quality: float | None
    width: int
    height: int
    num_bytes: int
    source_size: int
    decoded: Picture | None = None
    source: Picture | None = None
    decoded_crop: Picture | None = None
    source_crop: Picture | None = None
    decoded_note: str | None = None
    source_note: str | None = None


@dataclass(slots=True)
class ErrorKind:
    """Errors that differ in names and numbers alone. keys: the first that have it."""

    text: str
    count: int = 0
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a run stood after `seconds`: parts and objects done, megapixels compressed so far."""

    seconds: float
    parts: int
    objects: int
    megapixels: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the job: a moment for each part that it made, seconds in all."""

    seconds: float
    moments: Sequence[Moment]


@dataclass(frozen=True, slots=True)
class Report:
    """The numbers of the page.

    name: the archive's folder. totals: as the manifest has them. archive_bytes: of all parts.
    model_bytes: None where there is no model. bpp, psnr: of each compressed photo. equal: photos
    that decode to their source's very pixels (infinite PSNR, in no histogram). errors: most
    frequent first; other_errors: rows with an error of a kind that is not among them. run: None
    where the report was made from the archive alone.
    """

    name: str
    made: datetime
    version: str
    format_version: int
    model_id: str | None
    settings: Mapping[str, Any]
    totals: PartStats
    parts: int
    archive_bytes: int
    model_bytes: int | None
    bpp: Histogram
    psnr: Histogram
    equal: int
    worst: Sequence[WorstPhoto]
    errors: Sequence[ErrorKind]
    other_errors: int
    run: Run | None = None


def write_report(
    archive: Archive,
    *,
    out: str | os.PathLike[str] | None = None,
    run: Run | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """Make the report of an archive and write it; returns where to.

    out: path or URL of the file, else `report.html` in the archive's folder, where an older one is
    removed first, so that none tells of another archive. storage_options: as for `compress`, for
    the stores of the sources and of `out`. Errors: VaestreamError where parts cannot be read, or
    the report not be written.
    """
    from vaestream.pipeline.report_html import render

    if out is None:
        fs, root = open_store(archive.url, archive.storage_options)
        path = join(root, REPORT)
        remove(fs, path)
        where = join(archive.url, REPORT)
    else:
        where = os.fspath(out)
        fs, path = store_of(where, storage_options)
    page = render(gather(archive, run=run, storage_options=storage_options))
    put_bytes(fs, path, page.encode())
    return where


def gather(
    archive: Archive,
    *,
    run: Run | None = None,
    storage_options: Mapping[str, Any] | None = None,
    worst: int = WORST,
) -> Report:
    """Read the numbers out of the parts' small columns, and the `worst` photos out of the archive
    and from their sources, where these are still what they were.

    Errors: ArchiveError where the store cannot be read, DamagedArchiveError for damaged parts;
    photos that cannot be shown are told of in the report.
    """
    manifest = archive.manifest
    fs, root = open_store(archive.url, archive.storage_options)
    tally, lock = _Tally(worst), threading.Lock()

    def count(part: PartInfo) -> None:
        for table in _tables(fs, root, part):
            with lock:
                tally.add(table)

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for _ in pool.map(count, manifest.parts):
                pass
        except VaestreamError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    with _Sources(storage_options) as sources:
        photos = [_look_at(archive, row, sources) for row in tally.worst]
    kinds = sorted(tally.kinds.values(), key=lambda kind: (-kind.count, kind.text))
    model_bytes = None
    if manifest.model_id is not None:
        with suppress(FileNotFoundError):
            model_bytes = file_size(fs, model_path(root, manifest.model_id))
    return Report(
        name=root.rsplit("/", 1)[-1],
        made=datetime.now(UTC),
        version=__version__,
        format_version=manifest.version,
        model_id=manifest.model_id,
        settings=manifest.settings,
        totals=manifest.totals,
        parts=len(manifest.parts),
        archive_bytes=sum(part.size for part in manifest.parts),
        model_bytes=model_bytes,
        bpp=tally.bpp,
        psnr=tally.psnr,
        equal=tally.equal,
        worst=photos,
        errors=kinds[:_KINDS],
        other_errors=tally.other_errors + sum(kind.count for kind in kinds[_KINDS:]),
        run=run,
    )


def _tables(fs: AbstractFileSystem, root: str, part: PartInfo) -> Iterator[pa.Table]:
    """`_COLUMNS` of a part, row group by row group."""
    path = join(root, part.name)
    try:
        size = file_size(fs, path)
        footer = read_footer(fs, path, size, part.name)
        file = RangeFile(fs, path, size)
        parquet = pq.ParquetFile(file, metadata=footer.metadata, pre_buffer=False)
        for group in range(footer.metadata.num_row_groups):
            file.prefetch(column_ranges(footer.metadata, group, _COLUMNS))
            yield parquet.read_row_group(group, _COLUMNS, use_threads=False).select(_COLUMNS)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DamagedArchiveError(f"{path}: cannot be read ({error}): verify tells more") from error


class _Tally:
    """Counts over tables of `_COLUMNS`, and the rows of the lowest PSNR; the tables' order does not
    show in them."""

    def __init__(self, worst: int) -> None:
        self.bpp = Histogram.of(0.005, 6400)
        self.psnr = Histogram.of(0.05, 2000)
        self.equal = 0
        self.kinds: dict[str, ErrorKind] = {}
        self.other_errors = 0
        self._most = worst
        self.worst: list[dict[str, Any]] = []

    def add(self, table: pa.Table) -> None:
        """Count a table in."""
        broken = table.filter(table["error"].is_valid()).select(["key", "error"])
        for row in broken.to_pylist():
            self._add_error(row["key"], row["error"])
        coded = table.filter(pc.equal(table["codec"], "vae"))
        if not len(coded):
            return
        bits = 8.0 * coded["num_bytes"].to_numpy()
        pixels = coded["width"].to_numpy().astype(np.float64) * coded["height"].to_numpy()
        self.bpp.add(bits / pixels)
        values = coded["psnr"].to_numpy().astype(np.float64)  # what is not measured is a NaN
        finite = np.isfinite(values)
        self.equal += int(np.isposinf(values).sum())
        self.psnr.add(np.maximum(values[finite], 0.0))
        places = np.flatnonzero(finite)
        order = np.argsort(values[places], kind="stable")
        # As many as there may be of equal ones are left to the keys' order, which parts keep.
        lowest = coded.take(pa.array(places[order][: self._most], pa.int64())).to_pylist()
        self.worst = heapq.nsmallest(
            self._most, self.worst + lowest, key=lambda row: (row["psnr"], row["key"])
        )

    def _add_error(self, key: str, error: str) -> None:
        text = _PARTICULAR.sub("…", error)[:300]
        kind = self.kinds.get(text)
        if kind is None:
            if len(self.kinds) == _MOST_KINDS:
                self.other_errors += 1
                return
            kind = self.kinds[text] = ErrorKind(text)
        kind.count += 1
        insort(kind.keys, key)
        del kind.keys[_KEYS:]


class _Sources:
    """Sources, read again; a store that cannot be reached is asked once, and tars are searched for
    their members for `_SEARCH_SECONDS` in all."""

    def __init__(self, storage_options: Mapping[str, Any] | None) -> None:
        self._options = storage_options
        self._gone: set[str] = set()
        self._search_seconds = _SEARCH_SECONDS
        self._members = MemberReader()

    def __enter__(self) -> "_Sources":
        return self

    def __exit__(self, *_: object) -> None:
        self._members.close()

    def read(self, row: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
        """The bytes from which the row was made, or why they are not to be had."""
        url, size = row["source_url"], row["source_size"]
        if size > _MAX_SOURCE_BYTES:
            return None, "source too large to be read again"
        container = container_url(url)
        protocol = protocol_of(container or url)
        if protocol in self._gone:
            return None, "source not read: its store could not be reached"
        try:
            fs, path = store_of(container or url, self._options)
            if container is not None:
                data = self._member(fs, path, container, url, size)
            # The size first: whatever lies there now is not read when it is something else.
            elif fs.info(path).get("size") not in (None, size):
                raise _Gone("source has changed since")
            else:
                data = bytes(fs.cat_file(path))
        except _Gone as gone:
            return None, str(gone)
        except FileNotFoundError:
            return None, "source is no longer there"
        except Exception as error:  # every store has errors of its own
            local = protocol in ("file", "local")
            if not (isinstance(error, PermissionError | MemberError) or local):
                self._gone.add(protocol)
            # Not its text, which may show what a store was opened with.
            return None, f"source cannot be read again ({type(error).__name__})"
        if hashlib.sha256(data).hexdigest() != row["source_sha256"]:
            return None, "source has changed since"
        return data, None

    def _member(
        self, fs: AbstractFileSystem, path: str, container: str, url: str, size: int
    ) -> bytes:
        begin = time.monotonic()
        try:
            for found in list_members(fs, path, name_of(fs, path)):
                if member_url(container, found) == url and found.size in (None, size):
                    version = Version(found.size)
                    item = SourceObject("", 0, path, url, version, found.member)
                    return self._members.read(fs, item, max_bytes=size)
                if time.monotonic() - begin > self._search_seconds:
                    raise _Gone("source not read: to find it in what holds it takes too long")
        finally:
            self._search_seconds -= time.monotonic() - begin
        raise _Gone("source is no longer there")


class _Gone(Exception):
    """What the text says of a source."""


def _look_at(archive: Archive, row: Mapping[str, Any], sources: _Sources) -> WorstPhoto:
    """The photo with its pictures, as far as they are to be had."""
    pixels = row["width"] * row["height"]
    facts: dict[str, Any] = {
        name: row[name] for name in ("key", "psnr", "quality", "width", "height", "num_bytes")
    }
    facts |= {"source_size": row["source_size"], "bpp": 8 * row["num_bytes"] / pixels}
    if pixels > _MAX_PIXELS:
        note = f"not shown: more than {_MAX_PIXELS // 1_000_000} megapixels"
        return WorstPhoto(**facts, decoded_note=note, source_note=note)
    large = pixels > _WHOLE_PIXELS
    decoded: Pixels | None = None
    original: Pixels | None = None
    icc: bytes | None = None
    small: dict[str, Pixels] = {}
    try:
        codec, blob = archive.codec, archive.blob(row["key"])
        icc = archive.payloads([row["key"]])[0].icc
        (decoded,) = codec.decode([blob], max_size=_SIDE if large else None)
        small["decoded"] = _thumbnail(decoded)
    except VaestreamError as error:
        facts["decoded_note"] = f"cannot be decoded: {error}"
    data, facts["source_note"] = sources.read(row)
    if data is not None:
        try:
            loaded = images.load(data, name=row["key"], max_pixels=_MAX_PIXELS)
        except Exception as error:  # only a picture for the page: no reason to have none
            loaded = images.Broken(error=type(error).__name__)
        if isinstance(loaded, images.Photo):
            original = loaded.pixels
            small["source"] = _thumbnail(original)
        else:
            facts["source_note"] = "source is not read as a photo any more"
    facts |= zip(small, _jpegs(list(small.values()), icc), strict=True)
    if decoded is None or original is None:
        return WorstPhoto(**facts)
    if large:
        left, top, width, height = region = _busiest(original)
        original = original[top : top + height, left : left + width]
        with suppress(VaestreamError):  # a damaged tile: verify tells
            (decoded,) = codec.decode([blob], region=region)
    if decoded.shape == original.shape:
        left, top, right, bottom = _where_they_differ(original, decoded)
        if large or (right - left, bottom - top) != (decoded.shape[1], decoded.shape[0]):
            crops = [one[top:bottom, left:right] for one in (original, decoded)]
            facts["source_crop"], facts["decoded_crop"] = _jpegs(crops, icc)
    return WorstPhoto(**facts)


def _busiest(pixels: Pixels) -> tuple[int, int, int, int]:
    """Region (left, top, width, height) of `_REGION` pixels a side, or the picture's where that is
    less, with the most detail in every fourth pixel: there a codec errs most."""
    height, width = pixels.shape[:2]
    side = [min(_REGION, height), min(_REGION, width)]
    if min(side) < 8:
        return 0, 0, side[1], side[0]
    sparse = pixels[::4, ::4].reshape(-(-height // 4), -(-width // 4), -1)[..., :1].astype(np.int16)
    steps = np.abs(np.diff(sparse, axis=0))[:, :-1] + np.abs(np.diff(sparse, axis=1))[:-1]
    row, column = _largest_cell(steps, _REGION // 8)
    top, left = (
        max(0, min(size - own, at * (_REGION // 2) - own // 4))
        for size, own, at in zip((height, width), side, (row, column), strict=True)
    )
    return left, top, side[1], side[0]


def _where_they_differ(one: Pixels, other: Pixels) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of at most `_CROP` pixels a side where the mean difference
    is largest, over cells of a quarter of that."""
    height, width = one.shape[:2]
    cell = _CROP // 4
    if min(height, width) < cell:
        return 0, 0, min(width, _CROP), min(height, _CROP)
    row, column = _largest_cell(np.maximum(one, other) - np.minimum(one, other), cell)
    left = max(0, min(width - _CROP, column * cell - (_CROP - cell) // 2))
    top = max(0, min(height - _CROP, row * cell - (_CROP - cell) // 2))
    return left, top, min(width, left + _CROP), min(height, top + _CROP)


def _largest_cell(values: npt.NDArray[Any], side: int) -> tuple[int, int]:
    """Row and column, in cells of `side` x `side`, of the largest mean of values (H, W, ...); what
    does not fill a cell does not count."""
    tall, wide = (min(side, size) for size in values.shape[:2])
    rows, columns = values.shape[0] // tall, values.shape[1] // wide
    cells = values[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide, -1)
    row, column = divmod(int(cells.mean(axis=(1, 3, 4)).argmax()), columns)
    return row, column


def _thumbnail(pixels: Pixels) -> Pixels:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image)


def _jpegs(pictures: Sequence[Pixels], icc: bytes | None) -> list[Picture]:
    """As JPEGs of one quality, so that what differs is in the pictures, and each of at most
    `_PICTURE_BYTES`, which bounds the page."""
    profile = icc if icc is not None and len(icc) <= _PROFILE_BYTES else None
    found: list[Picture] = []
    for quality in (92, 85, 70, 50, 25, 5):
        found = [_jpeg(pixels, quality, profile) for pixels in pictures]
        if all(len(picture.data) <= _PICTURE_BYTES for picture in found):
            break
    return found


def _jpeg(pixels: Pixels, quality: int, icc: bytes | None) -> Picture:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(file, "JPEG", quality=quality, icc_profile=icc, subsampling=0)
    return Picture(file.getvalue(), image.width, image.height)
