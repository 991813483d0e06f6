"""Files below a folder, in any store that fsspec knows, in order and as they are found."""

import fnmatch
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import pairwise
from typing import Any

from fsspec import AbstractFileSystem

from vaestream.archive.retries import LISTING_SECONDS, retrying
from vaestream.errors import SourceError
from vaestream.pipeline.plan import Version, escape, safe_key, utc
from vaestream.text import describe
from vaestream.urls import public_text, public_url

_log = logging.getLogger(__name__)

Info = Mapping[str, Any]
"""What an fsspec store says of a file: size, type, and times under names of its own."""


def walk(fs: AbstractFileSystem, path: str, exclude: Sequence[str]) -> Iterator[tuple[str, Info]]:
    """Every file below a folder, ascending by path; memory holds the names of one folder.

    exclude: shell patterns; folders whose name matches one that has no slash are not entered.
    Errors: SourceError for what cannot be listed, and for two files with one key.
    """
    exclude = [pattern for pattern in exclude if "/" not in pattern]
    protocols = protocols_of(fs)
    with listing_errors(fs.unstrip_protocol(path)):
        if "file" in protocols:
            yield from _walk_local(path, exclude)
        elif "s3" in protocols:
            yield from _walk_s3(fs, path)
        else:
            yield from _walk_folders(fs, path, exclude)


def _walk_local(
    folder: str, exclude: Sequence[str], *, is_top: bool = True
) -> Iterator[tuple[str, Info]]:
    found: list[tuple[str, str]] = []
    with _of_folder(folder, is_top), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name + "/" * entry.is_dir(follow_symlinks=False)
            found.append((safe_key(name), name))
    found.sort()
    for (key, one), (next_key, other) in pairwise(found):
        if key == next_key:
            raise SourceError(
                f"{shown_url(folder)}: {one!a} and {other!a} would both be kept as "
                f"{safe_key(one.rstrip('/'))!r}: rename one"
            )
    for _, name in found:
        path = f"{folder.rstrip('/')}/{name}"
        if name.endswith("/"):
            if not _is_excluded(name[:-1], exclude):
                yield from _walk_local(path[:-1], exclude, is_top=False)
            continue
        info = status_of(path)
        if info is not None:
            yield path, info


def _walk_s3(fs: AbstractFileSystem, path: str) -> Iterator[tuple[str, Info]]:
    """A page of a thousand keys at a time: s3fs would gather all of them first."""
    bucket, prefix, _ = fs.split_path(path)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    more: dict[str, str] = {}
    while True:
        page = retrying(fs, partial(_page, fs, bucket, prefix, more))
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):  # those are marks of folders
                yield f"{bucket}/{entry['Key']}", entry
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _page(
    fs: AbstractFileSystem, bucket: str, prefix: str, more: Mapping[str, str]
) -> dict[str, Any]:
    return dict(fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more))


def _walk_folders(
    fs: AbstractFileSystem, folder: str, exclude: Sequence[str], *, is_top: bool = True
) -> Iterator[tuple[str, Info]]:
    listed: list[Info] = []
    with _of_folder(fs.unstrip_protocol(folder), is_top):
        listed = retrying(fs, lambda: list(fs.ls(folder, detail=True)), seconds=LISTING_SECONDS)
    fs.invalidate_cache(folder)  # or else it would hold all folders in the end
    found = [info for info in listed if info["name"].rstrip("/") != folder]
    is_folder = {info["name"]: info["type"] == "directory" for info in found}
    for info in sorted(found, key=lambda one: one["name"] + "/" * is_folder[one["name"]]):
        if is_folder[info["name"]]:
            below = info["name"].rstrip("/")
            if not _is_excluded(below.rpartition("/")[2], exclude):
                yield from _walk_folders(fs, below, exclude, is_top=False)
        elif info["type"] == "file":
            yield info["name"], info


@contextmanager
def _of_folder(url: str, is_top: bool) -> Iterator[None]:
    """Errors in the block are told of this folder; one below the top may be gone since its name was
    read, like a file, and then holds nothing."""
    with listing_errors(url):
        try:
            yield
        except FileNotFoundError:
            if is_top:
                raise
            _log.warning("%s: is gone since the listing began", shown_url(url))


def status_of(path: str) -> Info | None:
    """Of what a link points to; a dead link counts as a file (its row says that it is dead), and
    None is what is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        return {"problem": describe(error)} if os.path.islink(path) else {}
    except OSError:
        return {}
    if not stat.S_ISREG(status.st_mode):
        return None
    return {"size": status.st_size, "mtime": status.st_mtime}


def regular(path: str, info: Info) -> Info | None:
    """As `status_of`, of a file that a store has described."""
    if info["type"] == "other":
        return status_of(path) if info.get("islink") else None
    return info if info["type"] == "file" else None


def _is_excluded(folder: str, exclude: Sequence[str]) -> bool:
    """Whether a folder's name matches any of these patterns, which have no slash: so would all keys
    below it."""
    return any(fnmatch.fnmatchcase(safe_key(folder), pattern) for pattern in exclude)


def version_of(info: Info) -> Version:
    """Stores name these differently: local mtime, S3 LastModified and ETag, GCS updated, the web's
    Last-Modified, ..."""
    lower = {name.lower(): value for name, value in info.items()}
    names = ("mtime", "lastmodified", "last_modified", "last-modified", "updated")
    times = (lower.get(name) for name in names)
    etag = next((lower[name] for name in ("etag", "md5hash") if lower.get(name)), None)
    return Version(
        size=None if lower.get("size") is None else int(lower["size"]),
        mtime=next((_utc(value) for value in times if value is not None), None),
        etag=None if etag is None else str(etag),
    )


def _utc(value: object) -> datetime | None:
    if isinstance(value, int | float):
        return utc(value)
    if isinstance(value, str):
        try:
            value = parsedate_to_datetime(value) if "," in value else datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


@contextmanager
def listing_errors(source: str) -> Iterator[None]:
    """Raise whatever a store raises in the block as SourceError that names `source`."""
    shown = shown_url(source)
    try:
        yield
    except (SourceError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise SourceError(f"{shown}: there is no such file, folder or object") from error
    except Exception as error:  # each store has errors of its own, many of them no OSError
        told = public_text(" ".join(str(error).split()).replace(source, shown))
        raise SourceError(f"{shown}: cannot be listed: {type(error).__name__}: {told}") from error


def shown_url(url: str) -> str:
    """A URL or path as it may be told: text, without secrets."""
    return public_url(escape(url))


def name_of(fs: AbstractFileSystem, path: str) -> str:
    """The path as far as it names a file: a URL of the web without what follows `?` or `#`."""
    if "http" not in protocols_of(fs):
        return path
    return path.split("?")[0].split("#")[0].rstrip("/")


def protocols_of(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
