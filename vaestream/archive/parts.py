"""Parts of an opened archive by their row groups: small columns, and what another tool has written
anew, so that it lies elsewhere than the index says."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from vaestream.archive.layout import Footer, column_ranges, read_footer
from vaestream.archive.manifest import PartInfo
from vaestream.archive.schema import INFO_COLUMNS, RowInfo, metadata_crc32, to_infos
from vaestream.archive.spans import missing_part
from vaestream.archive.storage import RangeFile, file_size, join, shown
from vaestream.errors import DamagedArchiveError

PAYLOADS = ("exif", "xmp", "icc")
"""Columns of `Payloads`."""

_CACHED_ROWS = 1 << 16
"""Rows whose small columns stay in memory: in the order of keys, parts may take turns."""
_CACHED_PARTS = 1 << 10
"""Parts whose footers do, some 64 KB each."""
_CACHED_COLUMNS = 4

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Payloads:
    """EXIF, XMP and ICC of a photo as Pillow's `save(exif=, xmp=, icc_profile=)` takes them."""

    exif: bytes | None
    xmp: bytes | None
    icc: bytes | None

    def fit(self, row: Mapping[str, Any]) -> bool:
        """Whether they are those that were written, as the index's row tells."""
        values = (self.exif, self.xmp, self.icc)
        lengths = [None if value is None else len(value) for value in values]
        return (
            lengths == [row[f"{name}_length"] for name in PAYLOADS]
            and metadata_crc32(*values) == row["metadata_crc32"]
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A part's footer, and for a part that was written anew the place of each key in it."""

    footer: Footer
    places: dict[str, tuple[int, int]] | None


class Parts:
    """The parts of the archive in folder `root`. Threads may share it.

    Rows of the index are given as dictionaries of its columns. All raise DamagedArchiveError where
    a part is not what the manifest says, or what is asked for is not in it.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str, infos: Iterable[PartInfo]) -> None:
        self._fs, self._root = fs, root
        self._infos = {info.name: info for info in infos}
        self._parts: _Recent[str, _Part] = _Recent(_CACHED_PARTS)
        self._groups: _Recent[tuple[str, int], list[RowInfo]] = _Recent(_CACHED_ROWS, len)
        self._columns: _Recent[tuple[str, int, str], pa.ChunkedArray] = _Recent(_CACHED_COLUMNS)

    def is_known_anew(self, name: str) -> bool:
        """Whether the part has been found to be written anew: the index's ranges are wrong then."""
        part = self._parts.known(name)
        return part is not None and part.places is not None

    def info(self, row: Mapping[str, Any]) -> RowInfo:
        """All that is known of the photo but its bytes, from the small columns of its row group,
        which are read once for all rows in it."""
        name, key = row["part"], row["key"]
        part = self._part(name)
        group: int = row["row_group"]
        at: int = row["row"]
        if part.places is not None:
            if key not in part.places:
                raise DamagedArchiveError(f"{name}: row {key} is missing")
            group, at = part.places[key]

        def infos() -> list[RowInfo]:
            return to_infos(self._read_group(name, part.footer, group, INFO_COLUMNS))

        return self._groups.get((name, group), infos)[at]

    def blob(self, row: Mapping[str, Any]) -> bytes:
        """A blob whose bytes are not at the index's range any more."""
        name, key = row["part"], row["key"]
        damaged = DamagedArchiveError(f"{name}: photo {key}: its SHA-256 does not fit")
        try:
            data = self._value(name, key, "image.bytes")
        except DamagedArchiveError as error:
            raise damaged from error
        if data is None or hashlib.sha256(data).digest() != row["sha256"]:
            raise damaged
        return bytes(data)

    def payloads(self, row: Mapping[str, Any]) -> Payloads:
        """Payloads whose bytes are not at the index's ranges any more."""
        name, key = row["part"], row["key"]
        damaged = DamagedArchiveError(
            f"{name}: photo {key}: the checksum of its EXIF, XMP and ICC does not fit"
        )
        try:
            found = Payloads(*(self._value(name, key, column) for column in PAYLOADS))
        except DamagedArchiveError as error:
            raise damaged from error
        if not found.fit(row):
            raise damaged
        return found

    def _part(self, name: str) -> _Part:
        return self._parts.get(name, lambda: self._described(name))

    def _described(self, name: str) -> _Part:
        """The part's footer, compared with the manifest's."""
        path = join(self._root, name)
        try:
            footer = read_footer(self._fs, path, file_size(self._fs, path), name)
        except FileNotFoundError as error:
            raise missing_part(self._fs, path) from error
        info = self._infos[name]
        if footer.sha256 == info.footer_sha256:
            return _Part(footer, None)
        if footer.offset + len(footer.data) == info.size:
            told = f"{shown(self._fs, path)}: footer: its SHA-256 does not fit"
            raise DamagedArchiveError(told)
        places = {}
        for group in range(footer.metadata.num_row_groups):
            keys = self._read_group(name, footer, group, ["key"])["key"].to_pylist()
            places.update({key: (group, at) for at, key in enumerate(keys)})
        return _Part(footer, places)

    def _value(self, name: str, key: str, column: str) -> Any:
        """A value of a part written anew, by way of its row group. None when it is not there."""
        part = self._part(name)
        if part.places is None or key not in part.places:
            return None
        group, at = part.places[key]

        def values() -> pa.ChunkedArray:
            if column != "image.bytes":
                return self._read_group(name, part.footer, group, [column])[column]
            image = self._read_group(name, part.footer, group, ["image.bytes"])["image"]
            return pa.chunked_array([chunk.field("bytes") for chunk in image.chunks])

        return self._columns.get((name, group, column), values)[at].as_py()

    def _read_group(self, name: str, footer: Footer, group: int, columns: list[str]) -> pa.Table:
        file = RangeFile(self._fs, join(self._root, name), footer.offset + len(footer.data))
        try:
            file.prefetch(column_ranges(footer.metadata, group, columns))
            parquet = pq.ParquetFile(
                file, metadata=footer.metadata, pre_buffer=False, page_checksum_verification=True
            )
            table = parquet.read_row_group(group, columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DamagedArchiveError(f"{name}: column: {error}") from error
        if missing := set(columns) - set(table.column_names) - {"image.bytes"}:
            raise DamagedArchiveError(f"{name}: column: {sorted(missing)[0]} is missing")
        return table


class _Recent(Generic[_Key, _Value]):
    """A cache that drops what was not used for longest when all in it weighs more than `most`."""

    def __init__(self, most: int, weight: Callable[[_Value], int] = lambda _: 1) -> None:
        self._most, self._weight = most, weight
        self._values: OrderedDict[_Key, _Value] = OrderedDict()
        self._lock = threading.RLock()

    def known(self, key: _Key) -> _Value | None:
        """The value, where it is there."""
        return self._values.get(key)

    def get(self, key: _Key, make: Callable[[], _Value]) -> _Value:
        """The value, made where it is not there; others wait for it."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                while len(self._values) > 1 and self._total() > self._most:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]

    def _total(self) -> int:
        return sum(map(self._weight, self._values.values()))
