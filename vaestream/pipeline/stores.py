"""From a URL or path, as a user writes it, to an fsspec filesystem and a path in it."""

from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from vaestream.archive.storage import open_store
from vaestream.errors import ArchiveError, SourceError
from vaestream.urls import is_chained, protocol_of, public_url


def options_for(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of `storage_options` that is meant for the store of `url`.

    A mapping whose keys are all protocols, as {"s3": {...}, "https": {...}}, gives each store its
    own options; any other mapping goes to every store but the local disk.
    """
    if not storage_options:
        return {}
    protocol = protocol_of(url)
    known = fsspec.available_protocols()
    if all(key in known and isinstance(value, Mapping) for key, value in storage_options.items()):
        return dict(storage_options.get(protocol, {}))
    return {} if protocol in ("file", "local") else dict(storage_options)


def store_of(
    url: str, storage_options: Mapping[str, Any] | None = None
) -> tuple[AbstractFileSystem, str]:
    """Filesystem and path of `url`, as `open_store` has them, for what a job's processes share.

    Errors: SourceError for a protocol that fsspec does not know or whose package is missing, for
    options that it does not take, for a store inside another, and for memory://, which no other
    process sees.
    """
    if protocol_of(url) == "memory":
        raise SourceError(
            f"{url}: memory:// belongs to one process, and a job's workers are others: "
            "use a folder or an object store"
        )
    if is_chained(url):
        raise SourceError(f"{public_url(url)}: chained URLs (a::b) are not supported")
    try:
        return open_store(url, options_for(url, storage_options))
    except ArchiveError as error:
        raise SourceError(str(error)) from error.__cause__
