"""What a job has to do: sources -> objects with unique keys -> shards with stable names.

The same sources, settings and model always give the same shards, so a second run finds by name what
the first one has done.
"""

import fnmatch
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from vaestream.archive.retries import LISTING_SECONDS, may_pass, retrying
from vaestream.errors import SourceError
from vaestream.pipeline.stores import protocol_of, store_of

_MAGIC = re.compile(r"[*?\[]")


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


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One object of a source. `store` is an index into `Listing.stores`, `path` a path there."""

    key: str
    store: int
    path: str
    url: str
    version: Version


@dataclass(frozen=True, slots=True)
class Listing:
    """Every object of the sources, ordered by key, and the filesystems that hold them.

    left_out: objects that the include and exclude patterns have left out.
    """

    objects: list[SourceObject]
    stores: list[AbstractFileSystem]
    left_out: int = 0

    @property
    def size(self) -> int:
        """Bytes of all objects whose size the store tells."""
        return sum(item.version.size or 0 for item in self.objects)


@dataclass(frozen=True, slots=True)
class Shard:
    """The objects of one part, ordered by key; `part_id` is a hash of all that decides the part."""

    part_id: str
    objects: tuple[SourceObject, ...]


@dataclass(slots=True)
class _Source:
    """One argument as the user wrote it, and what was found there: relative key -> object."""

    text: str
    folder: str
    found: dict[str, SourceObject] = field(default_factory=dict)


def list_sources(
    sources: Sequence[str],
    *,
    destination: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Listing:
    """List `sources`: files, folders (walked recursively), globs, or URLs that fsspec knows.

    Every file counts, hidden ones too. Links to files are followed, links to folders are not (they
    may run in a circle); pipes, sockets and devices are no files. Of http(s) only files are taken,
    as a web server has no reliable listing. What lies under `destination` is left out.

    A key is the path below the source's folder (a file's own name for a file, the path below the
    last folder without a wildcard for a glob), made safe by `safe_key`. Where two sources have a
    key in common, the keys of both get the last name of the source's folder in front.

    include, exclude: shell patterns, case-sensitive. One with a slash is matched against the whole
    relative path, one without against each name in it; `*` also matches slashes. An object is taken
    if any `include` matches (or there is none) and no `exclude` does.

    Errors: SourceError for a source that does not exist, cannot be listed or holds nothing, and for
    two objects whose keys are equal all the same.
    """
    stores: list[AbstractFileSystem] = []
    listed: list[_Source] = []
    seen: set[str] = set()
    left_out = 0
    for text in sources:
        fs, path = store_of(text, storage_options)
        if fs not in stores:
            stores.append(fs)
            # A listing of an earlier run in this process would hide what is new.
            fs.invalidate_cache()
        store = stores.index(fs)
        source = _Source(text, "")
        source.folder, entries = _entries(fs, path, text)
        barrier = None if destination is None else _barrier(fs, destination, storage_options)
        for relative, name, info in entries:
            url = fs.unstrip_protocol(name)
            if url in seen or (barrier is not None and _is_under(_real(fs, name), barrier)):
                continue
            seen.add(url)
            key = safe_key(relative)
            if not _selected(key, include, exclude):
                left_out += 1
                continue
            if key in source.found:
                raise SourceError(
                    f"{escape(url)} and {source.found[key].url} would both be kept as {key!r}"
                )
            source.found[key] = SourceObject(key, store, name, escape(url), _version(info))
        listed.append(source)
    objects = _unique(listed)
    if not objects:
        what = f"{left_out} objects, all of them left out" if left_out else "no objects to compress"
        raise SourceError(f"{', '.join(sources)}: {what}")
    return Listing(sorted(objects, key=lambda item: item.key), stores, left_out)


def make_shards(
    objects: Iterable[SourceObject],
    *,
    settings: Mapping[str, Any],
    model_id: str,
    images: int = 256,
    max_bytes: int = 256 << 20,
) -> list[Shard]:
    """Cut `objects`, in their order, into shards of at most `images` objects and `max_bytes` bytes.

    An object larger than `max_bytes` makes a shard of its own.
    """
    shards: list[Shard] = []
    batch: list[SourceObject] = []
    size = 0
    for item in objects:
        more = item.version.size or 0
        if batch and (len(batch) == images or size + more > max_bytes):
            shards.append(_shard(batch, settings, model_id))
            batch, size = [], 0
        batch.append(item)
        size += more
    if batch:
        shards.append(_shard(batch, settings, model_id))
    return shards


def escape(text: str) -> str:
    """`text` with each byte that is not UTF-8 (a surrogate in Python's file names) as %XX."""
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text
    )


def safe_key(relative: str) -> str:
    """The key of an object at `relative`: text, and a path that cannot leave a folder.

    Bytes that are not UTF-8 become %XX; the names "." and ".." become "%2E" and "%2E%2E", and the
    empty name of a doubled or leading slash, which object stores allow, becomes "%2F". All else
    stays as it is.
    """
    odd = {"": "%2F", ".": "%2E", "..": "%2E%2E"}
    return "/".join(odd.get(name, name) for name in escape(relative).split("/"))


def _entries(
    fs: AbstractFileSystem, path: str, text: str
) -> tuple[str, Iterator[tuple[str, str, dict[str, Any]]]]:
    """The name of the source's folder, and (relative path, path, info) of each file in it."""
    shown = escape(text)
    with _listing(shown):
        if protocol_of(text) in ("http", "https"):
            # A page with links passes for a folder: only the object itself is asked for.
            info = _info(fs, path)
            name = path.split("?")[0].split("#")[0].rstrip("/")
            return _last(_parent(name)), iter([(_last(name), path, info)])
        if _MAGIC.search(path) and not _exists(fs, path):
            return _glob(fs, path, shown)
        info = _info(fs, path)
        if info["type"] == "directory":
            return _last(path), _walk(fs, path, path)
        return _last(_parent(path)), _regular(path, [(path, info)], _parent(path))


def _info(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    return retrying(fs, lambda: dict(fs.info(path)))


def _exists(fs: AbstractFileSystem, path: str) -> bool:
    try:
        _info(fs, path)
    except Exception as error:  # some stores take no such name; glob tells what is wrong, if it is
        if may_pass(error):
            raise
        return False
    return True


@contextmanager
def _listing(shown: str) -> Iterator[None]:
    """Raise whatever a store raises in the block as SourceError."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError as error:
        raise SourceError(f"{shown}: there is no such file, folder or object") from error
    except Exception as error:  # each store has errors of its own, many of them no OSError
        told = " ".join(str(error).split())
        raise SourceError(f"{shown}: cannot be listed: {type(error).__name__}: {told}") from error


def _glob(
    fs: AbstractFileSystem, pattern: str, shown: str
) -> tuple[str, Iterator[tuple[str, str, dict[str, Any]]]]:
    matches: dict[str, dict[str, Any]] = retrying(
        fs, lambda: dict(fs.glob(pattern, detail=True)), seconds=LISTING_SECONDS
    )
    if not matches:
        raise SourceError(f"{shown}: no file or folder matches")
    start = _MAGIC.search(pattern)
    assert start is not None
    base = pattern[: start.start()].rpartition("/")[0]

    def entries() -> Iterator[tuple[str, str, dict[str, Any]]]:
        for path, info in matches.items():
            if info["type"] == "directory":
                yield from _walk(fs, path, base)
            else:
                yield from _regular(path, [(path, info)], base)

    return _last(base), entries()


def _walk(
    fs: AbstractFileSystem, path: str, base: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    # Without on_error a local folder that may not be read is passed over in silence.
    options = {"on_error": "raise"} if "file" in _protocols(fs) else {}
    with _listing(escape(path)):
        found: dict[str, dict[str, Any]] = retrying(
            fs, lambda: dict(fs.find(path, detail=True, **options)), seconds=LISTING_SECONDS
        )
    yield from _regular(path, found.items(), base)


def _regular(
    root: str, entries: Iterable[tuple[str, dict[str, Any]]], base: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Files only, with the size and time of what a link points to; a dead link counts as a file
    (its row says that it is dead)."""
    cut = len(base.rstrip("/")) + 1 if base else 0
    for path, info in entries:
        if info["type"] == "other":
            if not info.get("islink"):
                continue
            try:
                target = os.stat(path)
            except OSError:
                pass
            else:
                if not stat.S_ISREG(target.st_mode):
                    continue
                info = {**info, "size": target.st_size, "mtime": target.st_mtime}
        elif info["type"] != "file":
            continue
        yield path[cut:], path, info


def _version(info: Mapping[str, Any]) -> Version:
    """Stores name these differently: local mtime, S3 LastModified and ETag, GCS updated, ..."""
    lower = {name.lower(): value for name, value in info.items()}
    times = (lower.get(name) for name in ("mtime", "lastmodified", "last_modified", "updated"))
    etag = next((lower[name] for name in ("etag", "md5hash") if lower.get(name)), None)
    return Version(
        size=None if lower.get("size") is None else int(lower["size"]),
        mtime=next((_utc(value) for value in times if value is not None), None),
        etag=None if etag is None else str(etag),
    )


def _utc(value: object) -> datetime | None:
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
    except (ValueError, OverflowError, OSError):
        return None
    if not isinstance(value, datetime):
        return None
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _selected(key: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    names = key.split("/")

    def matches(pattern: str) -> bool:
        parts = [key] if "/" in pattern else names
        return any(fnmatch.fnmatchcase(part, pattern) for part in parts)

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def _unique(sources: Sequence[_Source]) -> list[SourceObject]:
    counts = Counter(key for source in sources for key in source.found)
    objects: dict[str, SourceObject] = {}
    for source in sources:
        shared = any(counts[key] > 1 for key in source.found)
        for item in source.found.values():
            key = f"{safe_key(source.folder)}/{item.key}" if shared else item.key
            if key in objects:
                raise SourceError(
                    f"{item.url} and {objects[key].url} would both be kept as {key!r}: "
                    "compress their common folder, or each into an archive of its own"
                )
            objects[key] = replace(item, key=key)
    return list(objects.values())


def _shard(batch: Sequence[SourceObject], settings: Mapping[str, Any], model_id: str) -> Shard:
    facts = [
        [
            item.key,
            item.version.size,
            item.version.etag or (item.version.mtime and item.version.mtime.isoformat()),
        ]
        for item in batch
    ]
    text = json.dumps([model_id, dict(settings), facts], sort_keys=True)
    return Shard(hashlib.sha256(text.encode()).hexdigest()[:32], tuple(batch))


def _protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _barrier(
    fs: AbstractFileSystem, destination: str, storage_options: Mapping[str, Any] | None
) -> str | None:
    """The destination's path in `fs`, or None where it lies in another store."""
    if protocol_of(destination) not in _protocols(fs):
        return None
    target, path = store_of(destination, storage_options)
    return _real(target, path)


def _real(fs: AbstractFileSystem, path: str) -> str:
    return os.path.realpath(path) if "file" in _protocols(fs) else path


def _is_under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0]
