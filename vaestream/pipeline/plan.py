"""What a job handles: objects of its sources, and shards of them with stable names.

The same objects, settings and model always give the same shards, so a second run finds by name what
the first one has done.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one state of an object from another, as far as its store says.

    size: bytes. mtime: UTC, to the microsecond. etag: as the store writes it, quotes included.
    """

    size: int | None = None
    mtime: datetime | None = None
    etag: str | None = None

    def matches(self, other: "Version") -> bool:
        """Whether nothing that both sides know differs; an ETag outweighs the time."""
        if self.size is not None and other.size is not None and self.size != other.size:
            return False
        if self.etag is not None and other.etag is not None:
            return self.etag == other.etag
        return self.mtime is None or other.mtime is None or self.mtime == other.mtime

    def can_tell_from(self, other: "Version") -> bool:
        """Whether both sides know more than the size, which another object may have, too."""
        return None not in (self.etag, other.etag) or None not in (self.mtime, other.mtime)


@dataclass(frozen=True, slots=True)
class Span:
    """A member of a tar: where its bytes lie, in the tar as it is or once it is decompressed."""

    offset: int
    size: int
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A member of a zip: its number there, and its name, which another may have too."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a Parquet file: leaf column, row group and row in it."""

    column: str
    group: int
    row: int


Member = Span | ZipMember | Cell


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One object of a source.

    store is an index into `Listing.stores`, path a path there: of the object, or of the file that
    holds it as a `member`. problem: why it cannot be read, where that is known already.
    """

    key: str
    store: int
    path: str
    url: str
    version: Version
    member: Member | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """The objects of one part, ordered by key; `part_id` is a hash of all that decides the part.

    base: file name of the part whose place the new one takes. Its rows are taken over, but for
    those of `objects`, which have changed since.
    """

    part_id: str
    objects: tuple[SourceObject, ...]
    base: str | None = None

    @property
    def source_bytes(self) -> int:
        """Bytes to read, as far as the sources' stores have told; at least one an object."""
        return sum(item.version.size or 1 for item in self.objects)


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts objects into shards of at most `images` objects and `max_bytes` bytes.

    settings, model_id: what else decides a part. An object larger than `max_bytes` makes a shard of
    its own.
    """

    settings: Mapping[str, Any]
    model_id: str
    images: int = 256
    max_bytes: int = 256 << 20

    def shards(self, objects: Iterable[SourceObject]) -> Iterator[Shard]:
        """Shards of `objects`, in their order, as soon as each is full."""
        batch: list[SourceObject] = []
        size = 0
        for item in objects:
            more = item.version.size or 0
            if batch and (len(batch) == self.images or size + more > self.max_bytes):
                yield self.shard(batch)
                batch, size = [], 0
            batch.append(item)
            size += more
        if batch:
            yield self.shard(batch)

    def shard(self, objects: Sequence[SourceObject], *, base: str | None = None) -> Shard:
        """One shard of all of `objects`."""
        ordered = sorted(objects, key=lambda item: item.key)
        facts: list[Any] = [
            [
                item.key,
                item.version.size,
                item.version.etag or (item.version.mtime and item.version.mtime.isoformat()),
            ]
            for item in ordered
        ]
        decisive = [self.model_id, dict(self.settings), facts]
        if base is not None:
            decisive.append(base)
        text = json.dumps(decisive, sort_keys=True)
        return Shard(hashlib.sha256(text.encode()).hexdigest()[:32], tuple(ordered), base)


def utc(seconds: float) -> datetime | None:
    """A time since 1970; None for what is no time that a calendar knows."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def escape(text: str) -> str:
    """`text` with each byte that is not UTF-8 (a surrogate in Python's file names) as %XX."""
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text
    )


def safe_key(relative: str) -> str:
    """The key of an object at `relative`: text, and a path that cannot leave a folder.

    Bytes that are not UTF-8 become %XX; the names "." and ".." become "%2E" and "%2E%2E", and the
    empty name of a doubled or leading slash, which object stores allow, becomes "%2F" (names that
    are just these, "%252E" and so on). All else stays as it is.
    """
    odd = {"": "%2F", ".": "%2E", "..": "%2E%2E"}
    odd |= {code: code.replace("%", "%25") for code in odd.values()}
    return "/".join(odd.get(name, name) for name in escape(relative).split("/"))
