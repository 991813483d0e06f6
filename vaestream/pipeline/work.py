"""What a run has to do: the sources' objects against what the archive holds."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from vaestream.archive.manifest import PartInfo
from vaestream.archive.storage import RangeFile, join
from vaestream.errors import DamagedArchiveError
from vaestream.pipeline.plan import Cutter, Shard, SourceObject, Version

_THREADS = 16
_CHUNK = 1024


@dataclass(slots=True)
class Counts:
    """Objects of the sources, as far as they have been listed, and rows beside them.

    new: not in the archive when the first of the runs that were interrupted began. changed: in the
    archive with another size, time or ETag. unchanged: there as they are. unlisted: rows of the
    archive that are in none of the sources; complete when the listing has ended.
    """

    new: int = 0
    changed: int = 0
    unchanged: int = 0
    unlisted: int = 0


class Work:
    """The shards to be done, found as one iterates, once.

    parts: what stays or is done already; dropped: names of parts whose place others have taken.
    Both are complete when the iteration has ended.
    """

    def __init__(self) -> None:
        self.parts: list[PartInfo] = []
        self.dropped: set[str] = set()
        self.counts = Counts()

    def __iter__(self) -> Iterator[Shard]:
        raise NotImplementedError


class Replacement(Work):
    """Everything anew, but for parts that an interrupted run of the same kind has made."""

    def __init__(
        self, objects: Iterable[SourceObject], cutter: Cutter, present: Iterable[PartInfo]
    ) -> None:
        super().__init__()
        self._objects, self._cutter = objects, cutter
        self._present = {part.part_id: part for part in present}

    def __iter__(self) -> Iterator[Shard]:
        for shard in self._cutter.shards(self._objects):
            self.counts.new += len(shard.objects)
            if shard.part_id in self._present:
                self.parts.append(self._present[shard.part_id])
            else:
                yield shard


class Growth(Work):
    """What the archive lacks, and what has changed since.

    Shards are cut from what the archive did not hold when the first of the interrupted runs began,
    so that a run in several goes makes the same parts as one in peace. A changed object's new row
    replaces the old one: its part is written again, with all other rows as they are. Rows of
    objects that the sources no longer have stay.

    listed: parts of the archive; loose: parts that stand beside it since a run was interrupted.
    Errors: DamagedArchiveError for a part whose keys cannot be read.
    """

    def __init__(
        self,
        fs: AbstractFileSystem,
        root: str,
        objects: Iterable[SourceObject],
        cutter: Cutter,
        listed: Sequence[PartInfo],
        loose: Sequence[PartInfo],
    ) -> None:
        super().__init__()
        self._fs, self._root = fs, root
        self._objects, self._cutter = objects, cutter
        self.dropped = _dropped(listed, loose)
        standing = [part for part in [*listed, *loose] if part.name not in self.dropped]
        # What was made in place of a part of the archive is one in all but name.
        self._listed = [part for part in standing if part in listed or part.replaces is not None]
        self._waiting = {part.part_id: part for part in standing if part not in self._listed}
        self._changed: dict[str, list[SourceObject]] = {}

    def __iter__(self) -> Iterator[Shard]:
        self._held = _Held(self._fs, self._root, self._listed)
        self._beside: _Held | None = None
        for shard in self._cutter.shards(self._fresh()):
            done = self._waiting.pop(shard.part_id, None)
            if done is not None:
                self.parts.append(done)
            elif (rest := self._without_foreign(shard)) is not None:
                yield rest
        self.counts.unlisted = len(self._held) - self.counts.unchanged - self.counts.changed
        for base, items in self._changed.items():
            yield self._cutter.shard(items, base=base)
        self.dropped |= set(self._changed)
        stays = [*self._listed, *self._waiting.values()]
        self.parts += [part for part in stays if part.name not in self.dropped]

    def _fresh(self) -> Iterator[SourceObject]:
        for item in self._objects:
            found = self._held.find(item.key)
            if found is None:
                self.counts.new += 1
                yield item
            else:
                self._compare(item, *found)

    def _compare(self, item: SourceObject, version: Version, part: PartInfo) -> None:
        if item.version.matches(version):
            self.counts.unchanged += 1
        else:
            self.counts.changed += 1
            self._changed.setdefault(part.name, []).append(item)

    def _without_foreign(self, shard: Shard) -> Shard | None:
        """The shard without what stands beside the archive already, in parts of other shards: the
        sources have changed since those were cut."""
        if not self._waiting:
            return shard
        if self._beside is None:
            self._beside = _Held(self._fs, self._root, list(self._waiting.values()))
        rest = []
        for item in shard.objects:
            found = self._beside.find(item.key)
            if found is None or found[1].part_id not in self._waiting:
                rest.append(item)
                continue
            self.counts.new -= 1
            self._compare(item, *found)
        if len(rest) == len(shard.objects):
            return shard
        return self._cutter.shard(rest) if rest else None


def _dropped(listed: Sequence[PartInfo], loose: Sequence[PartInfo]) -> set[str]:
    """The parts that others have replaced, and all but one of those that replace the same one."""
    replacing: dict[str, str] = {}
    dropped: set[str] = set()
    for part in [*listed, *sorted(loose, key=lambda one: one.name)]:
        if part.replaces is not None:
            first = replacing.setdefault(part.replaces, part.name)
            dropped |= {part.replaces} | ({part.name} if first != part.name else set())
    return dropped & {part.name for part in [*listed, *loose]}


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source_size", pa.int64()),
        ("source_mtime", pa.timestamp("us", tz="UTC")),
        ("source_etag", pa.string()),
        ("part", pa.int32()),
    ]
)


class _Held:
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

    def find(self, key: str) -> tuple[Version, PartInfo] | None:
        """The version that is held and its part; fast where the keys asked for ascend."""
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
        size, mtime, etag, part = (chunk[name][at].as_py() for name in _SCHEMA.names[1:])
        return Version(size, mtime, etag), self._parts[part]

    def _read(self, number: int) -> pa.Table:
        table = _read(self._fs, self._root, self._parts[number], _SCHEMA.names[:-1])
        part = pa.array([number] * len(table), pa.int32())
        return table.append_column("part", part).cast(_SCHEMA)


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
