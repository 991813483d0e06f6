"""From a URL or path, as a user writes it, to an fsspec filesystem and a path in it."""

import re
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from vaestream.errors import SourceError, VaestreamError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def protocol_of(url: str) -> str:
    """The protocol in front of `://`; "file" where there is none."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else "file"


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
    """Filesystem and path of `url`; names may hold "::", which fsspec's own opener takes apart.

    Errors: SourceError for a protocol that fsspec does not know or whose package is missing, and
    for memory://, which no other process sees.
    """
    protocol = protocol_of(url)
    if protocol == "memory":
        raise SourceError(
            f"{url}: memory:// belongs to one process, and a job's workers are others: "
            "use a folder or an object store"
        )
    if re.search(r"::([A-Za-z][A-Za-z0-9+.-]*)://", url):
        raise SourceError(f"{url}: chained URLs (a::b) are not supported")
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise SourceError(f"{url}: {error}") from error
    options = {**kind._get_kwargs_from_urls(url), **options_for(url, storage_options)}
    try:
        fs = kind(**options)
    except (TypeError, ValueError) as error:
        raise VaestreamError(f"{url}: storage options not understood: {error}") from error
    return fs, kind._strip_protocol(url)
