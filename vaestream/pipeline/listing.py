"""Sources, as a user names them -> the objects they hold, found as one goes along.

Nothing here grows with the number of objects, but for sources that only come whole (globs, the
members of one zip) and, with globs, lists and several sources, about 200 bytes an object to notice
what is there twice.
"""

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fsspec import AbstractFileSystem

from vaestream.archive.retries import LISTING_SECONDS, may_pass, retrying
from vaestream.errors import SourceError
from vaestream.pipeline.members import is_container, list_members, member_url
from vaestream.pipeline.plan import SourceObject, Version, safe_key
from vaestream.pipeline.stores import store_of
from vaestream.pipeline.tables import is_list, is_parquet, listed_urls, parquet_kind
from vaestream.pipeline.walk import (
    Info,
    listing_errors,
    name_of,
    protocols_of,
    regular,
    shown_url,
    version_of,
    walk,
)
from vaestream.urls import protocol_of, public_url

_MAGIC = re.compile(r"[*?\[]")


@dataclass(slots=True)
class Listing:
    """The objects of some sources, as `list_sources` has resolved them; iterate once.

    stores: filesystems of the objects found so far. left_out: objects so far that the include and
    exclude patterns have left out, but for those in folders that were not even entered.
    """

    stores: list[AbstractFileSystem] = field(default_factory=list)
    left_out: int = 0
    _objects: Iterator[SourceObject] = field(default_factory=lambda: iter(()))

    def __iter__(self) -> Iterator[SourceObject]:
        """Errors: SourceError for what cannot be listed, for two objects whose keys are equal, and
        at the end when there was none."""
        return self._objects

    def store(self, fs: AbstractFileSystem) -> int:
        """The place of `fs` in `stores`."""
        if fs not in self.stores:
            self.stores.append(fs)
        return self.stores.index(fs)


@dataclass(frozen=True, slots=True)
class _Source:
    """One argument: the filesystem and path, and the parts of its keys that others may share.

    folder: path of the folder that its keys are relative to. single: one file, no more.
    """

    text: str
    fs: AbstractFileSystem
    path: str
    folder: str
    single: bool
    kind: str
    info: Info


def list_sources(
    sources: Sequence[str],
    *,
    destination: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Listing:
    """Find `sources`: files, folders (walked recursively), globs, or URLs that fsspec knows.

    Every file of a folder counts, hidden ones too. Links to files are followed, links to folders
    are not (they may run in a circle); pipes, sockets and devices are no files. Of http(s) only
    files are taken, as a web server has no reliable listing. `destination` may lie in a source, or
    be one of several (as a shell's `photos/*` has it): it is passed over. No other source may lie
    in it.

    A file that is named, or matched by a glob, and holds others, stands for these: members of a tar
    (also compressed) or zip; values of a Parquet file's image column (binary, or a struct with
    bytes). In a folder such files are objects like others. Lists stand for what their URLs and
    paths name (.txt a line each, .csv, .tsv or Parquet in a column url, uri, path, file, file_name,
    filename, image, image_url or location), relative ones from the list's folder, where no other
    sources are named: beside photos, or in a glob, a text is an object like others.

    A key is the path below the source's folder: a file's own name for a file, the path below the
    last folder without a wildcard for a glob; below a tar or zip the member's path, below Parquet
    the image's path or row-NNNNNNNNN; in a list a relative path as it is, a URL without its
    scheme and secrets, and with a digest of it where another has the same. Keys are made safe by
    `safe_key`. Several sources that hold more than one object put their folder's name in front of
    their keys, and as much of its path as tells them apart; so do files of one name. A name that a
    container has twice gets ~2 before its ending.

    include, exclude: shell patterns, case-sensitive. One with a slash is matched against the whole
    key, one without against each name in it; `*` also matches slashes. An object is taken if any
    `include` matches (or there is none) and no `exclude` does. Folders with a name that is excluded
    are not entered, so they need not be readable (but in S3, which has no folders).

    Errors: SourceError for a source that does not exist, cannot be listed, or lies in the
    destination. What lies deeper is found, and told of, by the iteration.
    """
    found = [_resolve(text, storage_options) for text in sources]
    if any(source.kind != "list" for source in found):
        found = [_as_object(source) if source.kind == "list" else source for source in found]
    for fs in {id(source.fs): source.fs for source in found}.values():
        # A listing of an earlier run in this process would hide what is new.
        fs.invalidate_cache()
    barrier = _Barrier(destination, storage_options)
    found = [source for source in found if not barrier.stands_at(source.fs, source.path)] or found
    for source in found:
        # A list's own place says nothing of what it names.
        place = source.folder if source.kind == "glob" else source.path
        if source.kind != "list" and barrier.bars(source.fs, place):
            raise _barred(shown_url(source.text))
    listing = Listing()
    listing._objects = _objects(
        listing, found, _prefixes(found), barrier, include, exclude, storage_options
    )
    return listing


def _objects(
    listing: Listing,
    sources: Sequence[_Source],
    prefixes: Sequence[str],
    barrier: "_Barrier",
    include: Sequence[str],
    exclude: Sequence[str],
    storage_options: Mapping[str, Any] | None,
) -> Iterator[SourceObject]:
    places: set[bytes] = set()
    keys: set[bytes] = set()
    count = 0
    for source, prefix in zip(sources, prefixes, strict=True):
        for item in _items(listing, source, exclude, storage_options):
            if barrier.bars(listing.stores[item.store], item.path):
                if source.kind == "list":
                    raise _barred(item.url)
                continue
            key = prefix + item.key
            if len(sources) > 1 or source.kind in ("glob", "list"):
                # Only sources that overlap, globs with ** and lists have anything twice. What the
                # URL does not tell may be all that two objects differ in.
                place = _digest(f"{item.store} {item.path}\n{item.member}")
                mark = _digest(key)
                if place in places:
                    continue
                if mark in keys and source.kind == "list":
                    key = _told_apart(key, item)
                    mark = _digest(key)
                if mark in keys:
                    raise SourceError(
                        f"{item.url} and an object before it would both be kept as {key!r}: "
                        "compress their common folder, or each into an archive of its own"
                    )
                places.add(place)
                keys.add(mark)
            if not _selected(key, include, exclude):
                listing.left_out += 1
                continue
            count += 1
            yield replace(item, key=key) if key != item.key else item
    if not count:
        left = listing.left_out
        what = f"{left} objects, all of them left out" if left else "no objects to compress"
        raise SourceError(f"{', '.join(shown_url(source.text) for source in sources)}: {what}")


def _told_apart(key: str, item: SourceObject) -> str:
    """The key of an object in a list that has another with this key: of http beside https, or with
    secrets alone to tell them apart. A list that grows leaves it its key."""
    stem, ending = os.path.splitext(key)
    return f"{stem}~{_digest(item.path).hex()[:12]}{ending}"


def _resolve(text: str, storage_options: Mapping[str, Any] | None) -> _Source:
    fs, path = store_of(text, storage_options)
    with listing_errors(text):
        if protocol_of(text) in ("http", "https"):
            # A page with links passes for a folder: only the object itself is asked for.
            return _file(text, fs, path, _info(fs, path))
        if _MAGIC.search(path) and not _exists(fs, path):
            return _Source(text, fs, path, _base(path), False, "glob", {})
        info = _info(fs, path)
        if info["type"] == "directory":
            return _Source(text, fs, path, path.rstrip("/"), False, "folder", info)
        return _file(text, fs, path, info)


def _info(fs: AbstractFileSystem, path: str) -> Info:
    return retrying(fs, lambda: dict(fs.info(path)))


def _exists(fs: AbstractFileSystem, path: str) -> bool:
    try:
        _info(fs, path)
    except Exception as error:  # some stores take no such name; glob tells what is wrong, if it is
        if may_pass(error):
            raise
        return False
    return True


def _file(text: str, fs: AbstractFileSystem, path: str, info: Info) -> _Source:
    kind, name = "file", name_of(fs, path)
    if is_container(name):
        kind = "container"
    elif is_list(name):
        kind = "list"
    elif is_parquet(name):
        kind = parquet_kind(fs, path, shown_url(text))
    folder = name if kind == "container" else _parent(name)
    return _Source(text, fs, path, folder, kind == "file", kind, info)


def _as_object(source: _Source) -> _Source:
    return replace(source, kind="file", single=True, folder=_parent(source.path))


def _items(
    listing: Listing,
    source: _Source,
    exclude: Sequence[str],
    storage_options: Mapping[str, Any] | None,
) -> Iterator[SourceObject]:
    """Objects with keys relative to the source's folder."""
    fs, path = source.fs, source.path
    with listing_errors(source.text):
        if source.kind == "folder":
            yield from _plain(listing, fs, path, walk(fs, path, exclude))
        elif source.kind == "container":
            yield from _members(listing, fs, path, source.info, "")
        elif source.kind == "list":
            yield from _listed(listing, source, storage_options)
        elif source.kind == "glob":
            yield from _globbed(listing, source, exclude)
        else:
            checked = regular(path, source.info)
            if checked is not None:
                yield _object(listing, fs, path, _last(name_of(fs, path)), checked)


def _plain(
    listing: Listing, fs: AbstractFileSystem, base: str, files: Iterator[tuple[str, Info]]
) -> Iterator[SourceObject]:
    cut = len(base.rstrip("/")) + 1 if base else 0
    for path, info in files:
        yield _object(listing, fs, path, path[cut:], info)


def _globbed(listing: Listing, source: _Source, exclude: Sequence[str]) -> Iterator[SourceObject]:
    fs, base = source.fs, source.folder
    matches: dict[str, Info] = retrying(
        fs, lambda: dict(fs.glob(source.path, detail=True)), seconds=LISTING_SECONDS
    )
    if not matches:
        raise SourceError(f"{shown_url(source.text)}: no file or folder matches")
    cut = len(base.rstrip("/")) + 1 if base else 0
    for path, info in matches.items():
        if info["type"] == "directory":
            yield from _plain(listing, fs, base, walk(fs, path, exclude))
            continue
        checked = regular(path, info)
        if checked is None:
            continue
        if is_container(path) or _has_pictures(fs, path):
            yield from _members(listing, fs, path, checked, path[cut:] + "/")
        else:
            yield _object(listing, fs, path, path[cut:], checked)


def _has_pictures(fs: AbstractFileSystem, path: str) -> bool:
    try:
        return is_parquet(path) and parquet_kind(fs, path, path) == "container"
    except SourceError:
        return False


def _members(
    listing: Listing, fs: AbstractFileSystem, path: str, info: Info, prefix: str
) -> Iterator[SourceObject]:
    store = listing.store(fs)
    container = version_of(info)
    # Of a container that has changed, no member counts as the one it was.
    state = container.etag or (container.mtime.isoformat() if container.mtime else None)
    names: dict[str, int] = {}
    url = shown_url(fs.unstrip_protocol(path))
    with listing_errors(url):  # of many that a glob matches, this one
        for found in list_members(fs, path, name_of(fs, path)):
            # What `tar c .` puts in front of each name says nothing.
            name = key = safe_key(found.name.removeprefix("./"))
            stem, ending = os.path.splitext(name)
            while key in names:
                names[name] += 1
                key = f"{stem}~{names[name]}{ending}"
            names[key] = 1
            version, where = Version(found.size, found.mtime, state), member_url(url, found)
            yield SourceObject(
                prefix + key, store, path, where, version, found.member, found.problem
            )


def _listed(
    listing: Listing, source: _Source, storage_options: Mapping[str, Any] | None
) -> Iterator[SourceObject]:
    folder = _parent(source.path)
    shown = shown_url(source.text)
    for url in listed_urls(source.fs, source.path, name_of(source.fs, source.path), shown):
        if "://" in url:
            fs, path = store_of(url, storage_options)
            key = public_url(url).split("://", 1)[1].lstrip("/")
        else:
            fs = source.fs
            path = url if url.startswith("/") else f"{folder}/{url}"
            path, key = fs._strip_protocol(path), url.lstrip("/")
        version = Version()
        if "file" in protocols_of(fs):
            try:
                status = os.stat(path)
            except OSError:
                pass  # its row will tell
            else:
                version = version_of({"size": status.st_size, "mtime": status.st_mtime})
        yield SourceObject(
            safe_key(key), listing.store(fs), path, shown_url(fs.unstrip_protocol(path)), version
        )


def _object(
    listing: Listing, fs: AbstractFileSystem, path: str, relative: str, info: Info
) -> SourceObject:
    url = shown_url(fs.unstrip_protocol(path))
    return SourceObject(
        safe_key(relative),
        listing.store(fs),
        path,
        url,
        version_of(info),
        problem=info.get("problem"),
    )


def _selected(key: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    names = key.split("/")

    def matches(pattern: str) -> bool:
        parts = [key] if "/" in pattern else names
        return any(fnmatch.fnmatchcase(part, pattern) for part in parts)

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def _prefixes(sources: Sequence[_Source]) -> list[str]:
    """What each source's keys get in front, so that sources cannot have one in common."""
    many = [i for i, source in enumerate(sources) if not source.single and source.kind != "list"]
    prefixes = [""] * len(sources)
    if len(many) > 1:
        folders = [sources[i].folder for i in many]
        for i, name in zip(many, _apart(folders), strict=True):
            prefixes[i] = f"{name}/"
    names: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        if source.single:
            names.setdefault(_last(source.path), []).append(i)
    for alike in names.values():
        folders = list(dict.fromkeys(sources[i].folder for i in alike))
        if len(folders) > 1:
            apart = dict(zip(folders, _apart(folders), strict=True))
            for i in alike:
                prefixes[i] = f"{apart[sources[i].folder]}/"
    return [safe_key(prefix[:-1]) + "/" if prefix else "" for prefix in prefixes]


def _apart(folders: Sequence[str]) -> list[str]:
    """The shortest ends of these paths, the same number of names each, that are all different."""
    names = [folder.strip("/").split("/") for folder in folders]
    different = len(set(map(tuple, names)))
    for length in range(1, max(map(len, names)) + 1):
        ends = ["/".join(one[-length:]) for one in names]
        if len(set(ends)) == different:
            return ends
    return ["/".join(one) for one in names]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


class _Barrier:
    """The destination, whose files are no objects."""

    def __init__(self, destination: str | None, storage_options: Mapping[str, Any] | None) -> None:
        self._protocol = None if destination is None else protocol_of(destination)
        self._place = ""
        if destination is not None:
            self._place = _real(*store_of(destination, storage_options)).rstrip("/")

    def stands_at(self, fs: AbstractFileSystem, path: str) -> bool:
        """Whether it is this very folder."""
        return self._protocol in protocols_of(fs) and _real(fs, path).rstrip("/") == self._place

    def bars(self, fs: AbstractFileSystem, path: str) -> bool:
        """Whether it is this folder or lies in it."""
        if self._protocol not in protocols_of(fs):
            return False
        return f"{_real(fs, path)}/".startswith(f"{self._place}/")


def _real(fs: AbstractFileSystem, path: str) -> str:
    return os.path.realpath(path) if "file" in protocols_of(fs) else path


def _barred(url: str) -> SourceError:
    return SourceError(
        f"{url}: lies in the destination, where everything is the archive's own: "
        "choose a destination beside it"
    )


def _base(pattern: str) -> str:
    """The last folder of a glob without a wildcard."""
    start = _MAGIC.search(pattern)
    assert start is not None
    folder, slash, _ = pattern[: start.start()].rpartition("/")
    return folder or slash


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0]
