"""What an archive's report tells, from the small columns of its parts: one part after the other,
keeping counts and the few worst photos, so that what is held does not grow with the archive."""

import heapq
import re
import threading
from bisect import insort
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from vaestream import __version__
from vaestream.archive.layout import column_ranges, read_footer
from vaestream.archive.manifest import PartInfo
from vaestream.archive.models import model_path
from vaestream.archive.reader import Archive
from vaestream.archive.storage import RangeFile, file_size, join, open_store
from vaestream.errors import DamagedArchiveError, VaestreamError
from vaestream.pipeline.report.facts import ErrorKind, Histogram, Report, Run
from vaestream.pipeline.report.photos import look_at
from vaestream.pipeline.report.sources import SourcesAgain

WORST = 12
"""Photos of the lowest PSNR that are shown."""

_KINDS, _KEYS = 20, 8
_MOST_KINDS = 1000
_THREADS = 8
_COLUMNS = [
    *("key", "codec", "num_bytes", "width", "height", "quality", "psnr"),
    *("source_size", "source_url", "source_sha256", "error"),
]
# What differs from one object to the next in an error that is the same: names and numbers.
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|(?<!\w)(?<!Errno )\d+(?!\w)")


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
    with SourcesAgain(storage_options) as sources:
        photos = [look_at(archive, row, sources) for row in tally.worst]
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
