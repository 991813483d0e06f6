"""Keys and versions of the rows that stand in a destination."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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

_READ = ["key", "source_size", "source_mtime", "source_etag", "num_bytes", "error"]
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source_size", pa.int64()),
        ("source_mtime", pa.timestamp("us", tz="UTC")),
        ("source_etag", pa.string()),
        ("unread", pa.bool_()),
        ("part", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Held:
    """What is held of an object: in which version and part, and whether it is `RowInfo.unread`."""

    version: Version
    unread: bool
    part: PartInfo


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
        size, mtime, etag, unread, part = (chunk[name][at].as_py() for name in _SCHEMA.names[1:])
        return Held(Version(size, mtime, etag), unread, self._parts[part])

    def doubled(self, others: "HeldRows") -> list[PartInfo]:
        """The parts with a key that `others` hold too, or that two of these parts hold."""
        keys, parts = self._table["key"].combine_chunks(), self._table["part"].combine_chunks()
        found = set(parts.filter(pc.is_in(keys, others._table["key"])).to_pylist())
        if len(keys) > 1:
            twice = pc.equal(keys.slice(1), keys.slice(0, len(keys) - 1))
            found |= set(parts.slice(1).filter(twice).to_pylist())
            found |= set(parts.slice(0, len(keys) - 1).filter(twice).to_pylist())
        return [self._parts[number] for number in sorted(found)]

    def shares_keys(self, part: PartInfo) -> bool:
        """Whether any row of `part` has a key that is held."""
        keys = _read(self._fs, self._root, part, ["key"])["key"]
        return bool(pc.any(pc.is_in(keys, self._table["key"])).as_py())

    def _read(self, number: int) -> pa.Table:
        table = _read(self._fs, self._root, self._parts[number], _READ)
        facts = zip(table["error"].to_pylist(), table["num_bytes"].to_pylist(), strict=True)
        unread = pa.array([is_unread(*one) for one in facts], pa.bool_())
        part = pa.array([number] * len(table), pa.int32())
        table = table.append_column("unread", unread).append_column("part", part)
        return table.select(_SCHEMA.names).cast(_SCHEMA)


def _read(fs: AbstractFileSystem, root: str, part: PartInfo, columns: list[str]) -> pa.Table:
    path = join(root, part.name)
    try:
        file = pq.ParquetFile(RangeFile(fs, path, part.size), pre_buffer=False)
        return file.read(columns, use_threads=False)
    except (OSError, ValueError) as error:
        raise DamagedArchiveError(
            f"{path}: cannot be read ({error}): verify tells more; remove the file and run again "
            "to make it anew"
        ) from error
