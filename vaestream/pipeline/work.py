"""What a run has to do: the sources' objects against what the archive holds."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from vaestream.archive.manifest import PartInfo
from vaestream.archive.storage import join
from vaestream.errors import DamagedArchiveError, SourceError
from vaestream.pipeline.held import Held, HeldRows
from vaestream.pipeline.plan import Cutter, Shard, SourceObject


@dataclass(slots=True)
class Counts:
    """Objects of the sources, as far as they have been listed, and rows beside them.

    new: not in the archive when the first of the runs that were interrupted began. changed: in the
    archive with another size, time or ETag. unchanged: there as they are, also what could not be
    read and is tried again. unlisted: rows of the archive that are in none of the sources; complete
    when the listing has ended.
    """

    new: int = 0
    changed: int = 0
    unchanged: int = 0
    unlisted: int = 0


class ForeignObjectError(SourceError):
    """An object of the sources has the key of another one in the archive."""


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
            done = self._present.pop(shard.part_id, None)
            if done is not None:
                self.parts.append(done)
            else:
                yield shard
        self.dropped = {part.name for part in self._present.values()}


class Growth(Work):
    """What the archive lacks, and what has changed since.

    Shards are cut from what the archive did not hold when the first of the interrupted runs began,
    so that a run in several goes makes the same parts as one in peace. A changed object's new row
    replaces the old one: its part is written again, with all other rows as they are. So is that of
    an object that could not be read, unless its listing tells already that it cannot be now, or has
    more than `max_object_bytes`. Rows of objects that the sources no longer have stay.

    A key may be that of another object in another folder, which must not take its place: what lies
    at another URL is an error, unless time or ETag say that it is the same, or the sources have
    `moved`.

    listed: parts of the archive; loose: parts that stand beside it since a run was interrupted.
    gone: names of parts of the archive that are no longer there, lost: the keys that they held.
    Errors: ForeignObjectError as said; DamagedArchiveError for a part whose keys cannot be read,
    and at the end for keys that are lost and not among the objects.
    """

    def __init__(
        self,
        fs: AbstractFileSystem,
        root: str,
        objects: Iterable[SourceObject],
        cutter: Cutter,
        listed: Sequence[PartInfo],
        loose: Sequence[PartInfo],
        *,
        gone: Sequence[str] = (),
        lost: set[str] | None = None,
        max_object_bytes: int = 1 << 30,
        moved: bool = False,
    ) -> None:
        super().__init__()
        self._fs, self._root, self._max_object_bytes = fs, root, max_object_bytes
        self._moved = moved
        self._objects, self._cutter = objects, cutter
        self.dropped = _dropped(listed, loose)
        standing = [part for part in [*listed, *loose] if part.name not in self.dropped]
        # What was made in place of a part of the archive is one in all but name.
        names = {part.name for part in listed} | {p.name for p in loose if p.replaces is not None}
        self._listed = [part for part in standing if part.name in names]
        self._waiting = {part.part_id: part for part in standing if part.name not in names}
        self._again: dict[str, list[SourceObject]] = {}
        self._gone, self._lost = gone, lost or set()

    def __iter__(self) -> Iterator[Shard]:
        self._held = HeldRows(self._fs, self._root, self._listed)
        self._beside = self._set_apart()
        for shard in self._cutter.shards(self._fresh()):
            done = self._waiting.pop(shard.part_id, None)
            if done is not None:
                self.parts.append(done)
            elif (rest := self._without_foreign(shard)) is not None:
                yield rest
        if self._lost:
            raise DamagedArchiveError(
                f"{join(self._root, self._gone[0])}: {len(self._gone)} part(s) of the archive are "
                f"missing, and the sources do not have {len(self._lost)} of the objects in them, "
                f"{min(self._lost)!r} first: put the file back, or overwrite for an archive of the "
                "sources alone"
            )
        held = len(self._held) + sum(part.num_rows for part in self._waiting.values())
        self.counts.unlisted = held - self.counts.unchanged - self.counts.changed
        for base, items in self._again.items():
            yield self._cutter.shard(items, base=base)
        self.dropped |= set(self._again)
        stays = [*self._listed, *self._waiting.values()]
        self.parts += [part for part in stays if part.name not in self.dropped]

    def _fresh(self) -> Iterator[SourceObject]:
        for item in self._objects:
            self._lost.discard(item.key)
            found = self._held.find(item.key)
            if found is None:
                self.counts.new += 1
                yield item
            else:
                self._compare(item, found)

    def _compare(self, item: SourceObject, held: Held) -> None:
        same = item.version.matches(held.version)
        is_it = self._moved or held.was_at(item.url)
        if not is_it and not (same and item.version.can_tell_from(held.version)):
            there = self._held.url_of(item.key, held.part)
            raise ForeignObjectError(
                f"{item.url}: the archive has another object as {item.key!r}, that was {there}: "
                "compress this source into an archive of its own, or the folder above both anew; "
                "if it is what that one has become, say that the sources have moved (--moved)"
            )
        if same:
            self.counts.unchanged += 1
        else:
            self.counts.changed += 1
        if not same or (held.unread and self._may_be_read(item)):
            self._again.setdefault(held.part.name, []).append(item)

    def _may_be_read(self, item: SourceObject) -> bool:
        return item.problem is None and (item.version.size or 0) <= self._max_object_bytes

    def _without_foreign(self, shard: Shard) -> Shard | None:
        """The shard without what stands beside the archive already, in parts of other shards: the
        sources have changed since those were cut."""
        if not self._waiting:
            return shard
        rest = []
        for item in shard.objects:
            found = self._beside.find(item.key)
            if found is None or found.part.part_id not in self._waiting:
                rest.append(item)
                continue
            self.counts.new -= 1
            self._compare(item, found)
        if len(rest) == len(shard.objects):
            return shard
        return self._cutter.shard(rest) if rest else None

    def _set_apart(self) -> HeldRows:
        """What stands beside the archive, without parts that share a key with it or with each
        other: those of jobs over other listings, at the same time or one after the other."""
        beside = HeldRows(self._fs, self._root, list(self._waiting.values()))
        surplus = beside.surplus(self._held)
        if not surplus:
            return beside
        for part in surplus:
            self.dropped.add(part.name)
            del self._waiting[part.part_id]
        return HeldRows(self._fs, self._root, list(self._waiting.values()))


def _dropped(listed: Sequence[PartInfo], loose: Sequence[PartInfo]) -> set[str]:
    """The parts that others have replaced, and all but one of those that replace the same one."""
    replacing: dict[str, str] = {}
    dropped: set[str] = set()
    for part in [*listed, *sorted(loose, key=lambda one: one.name)]:
        if part.replaces is not None:
            first = replacing.setdefault(part.replaces, part.name)
            dropped |= {part.replaces} | ({part.name} if first != part.name else set())
    return dropped & {part.name for part in [*listed, *loose]}
