"""What a job has made, on one page, `report.html`: beside the manifest, no part of the archive."""

import os
from collections.abc import Mapping
from typing import Any

from vaestream.archive.manifest import REPORT
from vaestream.archive.reader import Archive
from vaestream.archive.storage import join, open_store, put_bytes, remove
from vaestream.pipeline.report.facts import Moment, Run
from vaestream.pipeline.report.tally import gather
from vaestream.pipeline.stores import store_of

__all__ = ["Moment", "Run", "write_report"]


def write_report(
    archive: Archive,
    *,
    out: str | os.PathLike[str] | None = None,
    run: Run | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """Make the report of an archive and write it; returns where to.

    out: path or URL of the file, else `report.html` in the archive's folder, where an older one is
    removed first, so that none tells of another archive. storage_options: as for `compress`, for
    the stores of the sources and of `out`. Errors: VaestreamError where parts cannot be read, or
    the report not be written.
    """
    from vaestream.pipeline.report.page import render

    if out is None:
        fs, root = open_store(archive.url, archive.storage_options)
        path = join(root, REPORT)
        remove(fs, path)
        where = join(archive.url, REPORT)
    else:
        where = os.fspath(out)
        fs, path = store_of(where, storage_options)
    page = render(gather(archive, run=run, storage_options=storage_options))
    put_bytes(fs, path, page.encode())
    return where
