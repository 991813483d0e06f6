"""Keys and versions of the rows that stand in a destination."""

import posixpath
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from vaestream.archive.manifest import PartInfo
from vaestream.archive.schema import is_unread
from vaestream.archive.storage import RangeFile, join
from vaestream.errors import DamagedArchiveError
from vaestream.pipeline.plan import Version

_THREADS = 16
_CHUNK = 1024

_VERSION = ["source_size", "source_mtime", "source_etag"]
_READ = ["key", *_VERSION, "source_url", "num_bytes", "error"]
_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),  # together they may have more than 2 GiB
        ("source_size", pa.int64()),
        ("source_mtime", pa.timestamp("us", tz="UTC")),
        ("source_etag", pa.string()),
        ("place", pa.int64()),
        ("unread", pa.bool_()),
        ("part", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Held:
    """What is held of an object: in which version and part, and whether it is `RowInfo.unread`."""

    version: Version
    place: int
    unread: bool
    part: PartInfo

    def was_at(self, url: str) -> bool:
        """Whether it was read from there."""
        return _place(url) == self.place


def _place(url: str) -> int:
    """A number for where an object, or the container of it, lies, however its URL is spelled or
    signed. Of this process alone."""
    place = url.rpartition("::")[2]
    if place.startswith(("http://", "https://")):
        place = place.partition("?")[0]
    elif place.startswith("file:"):
        place = posixpath.normpath(place)
    return hash(place)


class HeldRows:
    """Keys and versions of the rows of some parts: about 100 bytes a row."""

    def __init__(self, fs: AbstractFileSystem, root: str, parts: Sequence[PartInfo]) -> None:
        self._fs, self._root, self._parts = fs, root, parts
        with ThreadPoolExecutor(_THREADS) as pool:
            tables = list(pool.map(self._read, range(len(parts))))
        table = pa.concat_tables([_SCHEMA.empty_table(), *tables])
        self._table = table.sort_by("key").combine_chunks()
        self._starts: list[str] = (
            self._table["key"].take(pa.array(range(0, len(table), _CHUNK), pa.int64())).to_pylist()
        )
        self._chunk: tuple[int, list[str], pa.Table] = (-1, [], self._table)

    def __len__(self) -> int:
        return len(self._table)

    def find(self, key: str) -> Held | None:
        """What is held of an object; fast where the keys asked for ascend."""
        number = bisect_right(self._starts, key) - 1
        if number < 0:
            return None
        if number != self._chunk[0]:
            chunk = self._table.slice(number * _CHUNK, _CHUNK)
            self._chunk = (number, chunk["key"].to_pylist(), chunk)
        _, keys, chunk = self._chunk
        at = bisect_left(keys, key)
        if at == len(keys) or keys[at] != key:
            return None
        row = {name: chunk[name][at].as_py() for name in _SCHEMA.names[1:]}
        version = Version(*(row[name] for name in _VERSION))
        return Held(version, row["place"], row["unread"], self._parts[row["part"]])

    def url_of(self, key: str, part: PartInfo) -> str:
        """Where the object of that key in a part of this folder was read from."""
        table = self._columns(part)
        url: str = table["source_url"][pc.index(table["key"], key).as_py()].as_py()
        return url

    def sharing(self, others: "HeldRows") -> list[PartInfo]:
        """The parts with a key that `others` hold too."""
        shared = pc.is_in(self._table["key"], others._table["key"])
        numbers = pc.unique(self._table["part"].filter(shared)).to_pylist()
        return [self._parts[number] for number in sorted(numbers)]

    def surplus(self, others: "HeldRows") -> list[PartInfo]:
        """The parts without which no key is held twice, by these or by these and `others`: of two
        that share one, that whose name comes later."""
        keys = self._table["key"].combine_chunks().dictionary_encode()
        taken = pc.is_in(keys.dictionary, others._table["key"]).to_numpy(zero_copy_only=False)
        codes, numbers = keys.indices.to_numpy(), self._table["part"].to_numpy()
        by_part = np.argsort(numbers, kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=len(self._parts)))
        codes_of = np.split(codes[by_part], ends[:-1])
        found = []
        for number in sorted(range(len(self._parts)), key=lambda one: self._parts[one].name):
            if taken[codes_of[number]].any():
                found.append(self._parts[number])
            else:
                taken[codes_of[number]] = True
        return found

    def _read(self, number: int) -> pa.Table:
        table = self._columns(self._parts[number])
        facts = zip(table["error"].to_pylist(), table["num_bytes"].to_pylist(), strict=True)
        unread = pa.array([is_unread(*one) for one in facts], pa.bool_())
        # Of a URL, as much as tells it from others: there may be millions.
        place = pa.array(map(_place, table["source_url"].to_pylist()), pa.int64())
        part = pa.array([number] * len(table), pa.int32())
        table = table.append_column("unread", unread).append_column("part", part)
        table = table.append_column("place", place)
        return table.select(_SCHEMA.names).cast(_SCHEMA)

    def _columns(self, part: PartInfo) -> pa.Table:
        path = join(self._root, part.name)
        try:
            file = pq.ParquetFile(RangeFile(self._fs, path, part.size), pre_buffer=False)
            return file.read(_READ, use_threads=False)
        except (OSError, ValueError) as error:
            raise DamagedArchiveError(
                f"{path}: cannot be read ({error}): verify tells more; remove the file and run "
                "again to make it anew"
            ) from error
