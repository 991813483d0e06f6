"""Sources of an archive's rows, read again for its report."""

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem

from vaestream.pipeline.members import (
    MemberError,
    MemberReader,
    container_url,
    list_members,
    member_url,
)
from vaestream.pipeline.plan import SourceObject, Version
from vaestream.pipeline.stores import store_of
from vaestream.pipeline.walk import name_of
from vaestream.urls import protocol_of

_MAX_SOURCE_BYTES = 256 << 20
_SEARCH_SECONDS = 30.0


class SourcesAgain:
    """Sources, read again; a store that cannot be reached is asked once, and tars are searched for
    their members for `_SEARCH_SECONDS` in all."""

    def __init__(self, storage_options: Mapping[str, Any] | None) -> None:
        self._options = storage_options
        self._gone: set[str] = set()
        self._search_seconds = _SEARCH_SECONDS
        self._members = MemberReader()

    def __enter__(self) -> "SourcesAgain":
        return self

    def __exit__(self, *_: object) -> None:
        self._members.close()

    def read(self, row: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
        """The bytes from which the row was made, or why they are not to be had."""
        url, size = row["source_url"], row["source_size"]
        if size > _MAX_SOURCE_BYTES:
            return None, "source too large to be read again"
        container = container_url(url)
        protocol = protocol_of(container or url)
        if protocol in self._gone:
            return None, "source not read: its store could not be reached"
        try:
            fs, path = store_of(container or url, self._options)
            if container is not None:
                data = self._member(fs, path, container, url, size)
            # The size first: whatever lies there now is not read when it is something else.
            elif fs.info(path).get("size") not in (None, size):
                raise _Gone("source has changed since")
            else:
                data = bytes(fs.cat_file(path))
        except _Gone as gone:
            return None, str(gone)
        except FileNotFoundError:
            return None, "source is no longer there"
        except Exception as error:  # every store has errors of its own
            local = protocol in ("file", "local")
            if not (isinstance(error, PermissionError | MemberError) or local):
                self._gone.add(protocol)
            # Not its text, which may show what a store was opened with.
            return None, f"source cannot be read again ({type(error).__name__})"
        if hashlib.sha256(data).hexdigest() != row["source_sha256"]:
            return None, "source has changed since"
        return data, None

    def _member(
        self, fs: AbstractFileSystem, path: str, container: str, url: str, size: int
    ) -> bytes:
        begin = time.monotonic()
        try:
            for found in list_members(fs, path, name_of(fs, path)):
                if member_url(container, found) == url and found.size in (None, size):
                    version = Version(found.size)
                    item = SourceObject("", 0, path, url, version, found.member)
                    return self._members.read(fs, item, max_bytes=size)
                if time.monotonic() - begin > self._search_seconds:
                    raise _Gone("source not read: to find it in what holds it takes too long")
        finally:
            self._search_seconds -= time.monotonic() - begin
        raise _Gone("source is no longer there")


class _Gone(Exception):
    """What the text says of a source."""
