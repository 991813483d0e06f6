"""Verify an archive: read every byte, and name what is damaged."""

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pyarrow as pa

from vaestream.archive.index import INDEX, load_index
from vaestream.archive.integrity import (
    BLOB_COLUMN,
    Expected,
    Problem,
    check_body,
    expected_rows,
)
from vaestream.archive.layout import Footer, read_footer
from vaestream.archive.manifest import MANIFEST, PartInfo, read_manifest
from vaestream.archive.models import model_path
from vaestream.archive.reader import Archive
from vaestream.archive.storage import (
    RangeFile,
    exists,
    file_size,
    is_temporary,
    join,
    list_names,
    open_store,
    read_bytes,
)
from vaestream.archive.writer import part_info
from vaestream.errors import BitstreamError, DamagedArchiveError

__all__ = ["Problem", "verify"]

_THREADS = 4
_READ_BYTES = 1 << 20


def verify(
    archive: str | os.PathLike[str] | Archive, *, storage_options: dict[str, Any] | None = None
) -> list[Problem]:
    """Everything that is wrong with an archive; [] when each byte is the one that was written.

    archive: a path, a URL or an opened archive. Reads all parts, the index, the manifest and the
    model. Damage is reported, never raised; raises ArchiveError when there is no finished archive
    there or the store cannot be read. docs/archive-format.md says what each check proves.
    """
    url: str
    if isinstance(archive, Archive):
        url, storage_options = archive.url, archive.storage_options
    else:
        url = os.fspath(archive)
    fs, root = open_store(url, storage_options)
    problems: list[Problem] = []
    infos: dict[str, PartInfo | None]
    entries: dict[str, pa.Table] = {}
    try:
        manifest = read_manifest(fs, root)
    except DamagedArchiveError as error:
        problems.append(Problem(MANIFEST, None, "manifest", str(error)))
        names = list_names(fs, root)
        infos = {
            name: None
            for name in names
            if name.startswith("part-") and name.endswith(".parquet") and not is_temporary(name)
        }
    else:
        infos = {part.name: part for part in manifest.parts}
        problems += _check_model(fs, root, manifest.model_id)
        try:
            entries = _by_part(load_index(fs, root, manifest.index_sha256))
        except DamagedArchiveError as error:
            missing = not exists(fs, join(root, INDEX))
            problems.append(Problem(INDEX, None, "missing" if missing else "index", str(error)))

    def check_part(name: str) -> list[Problem]:
        rows = entries.get(name)
        found, readable = _check_part(fs, root, name, infos[name], rows)
        if not readable and rows is not None:
            found += _check_photos(Archive(url, storage_options=storage_options), name, rows)
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(check_part, infos):
            problems += found
    return problems


def _by_part(index: pa.Table) -> dict[str, pa.Table]:
    """The index's rows of each part, in the order in which they lie there."""
    at = index.schema.get_field_index("part")
    table = index.set_column(at, "part", index["part"].cast(pa.string()))
    table = table.sort_by([(name, "ascending") for name in ("part", "row_group", "row")])
    parts, begin = {}, 0
    for run in table["part"].value_counts().to_pylist():
        parts[run["values"]] = table.slice(begin, run["counts"])
        begin += run["counts"]
    return parts


def _check_model(fs: fsspec.AbstractFileSystem, root: str, model_id: str | None) -> list[Problem]:
    if model_id is None:
        return []
    name = model_path("", model_id).lstrip("/")
    try:
        data = read_bytes(fs, join(root, name))
    except FileNotFoundError:
        return [Problem(name, None, "missing", "the model is not there")]
    if hashlib.sha256(data).hexdigest() != model_id:
        return [Problem(name, None, "model", "its SHA-256 is not its name")]
    return []


def _check_part(
    fs: fsspec.AbstractFileSystem,
    root: str,
    name: str,
    info: PartInfo | None,
    entries: pa.Table | None,
) -> tuple[list[Problem], bool]:
    """The part's problems, and whether its photos were among what was checked."""
    path = join(root, name)
    try:
        size = file_size(fs, path)
    except FileNotFoundError:
        return [Problem(name, None, "missing", "the part is not there")], True
    try:
        footer = read_footer(fs, path, size, name)
        if info is None or footer.sha256 == info.footer_sha256:
            declared = part_info(footer, name)
        elif info.size != size:
            raise DamagedArchiveError(
                f"{name}: footer: the part has {size} bytes instead of {info.size}; if another "
                "tool has written it anew, its photos are read by row groups"
            )
        else:
            raise DamagedArchiveError(f"{name}: footer: its SHA-256 is not the manifest's")
    except DamagedArchiveError as error:
        detail = str(error).removeprefix(f"{name}: footer: ")
        if info is not None and info.size != size and f"of {info.size}" not in detail:
            detail += f"; the part has {size} bytes instead of {info.size}"
        return [Problem(name, None, "footer", detail)], False
    raw = RangeFile(fs, path, size)
    expected = None if entries is None else _expected(entries, footer)
    if expected is None:
        try:
            expected = expected_rows(raw, footer)
        except (OSError, pa.ArrowException):
            expected = None  # the damaged column is found again below, and named
    file = io.BufferedReader(raw, _READ_BYTES)
    problems, body_sha256 = check_body(file, footer, name, expected, _bitstream_fault)
    if not problems and body_sha256 != declared.body_sha256:
        problems.append(Problem(name, None, "column", "the SHA-256 before the footer does not fit"))
    return problems, True


def _expected(entries: pa.Table, footer: Footer) -> list[list[Expected]]:
    groups: list[list[Expected]] = [[] for _ in range(footer.metadata.num_row_groups)]
    columns = ["row_group", "key", "codec", "length", "sha256"]
    for row in entries.select(columns).to_pylist():
        groups[row["row_group"]].append(
            Expected(row["key"], row["codec"], row["length"], row["sha256"].hex())
        )
    return groups


def _check_photos(archive: Archive, name: str, entries: pa.Table) -> list[Problem]:
    """The photos alone, as a reader gets them: for a part whose footer is not the committed one."""
    problems = []
    for row in entries.select(["key", "codec"]).to_pylist():
        fault: str | None
        try:
            fault = _bitstream_fault(row["key"], row["codec"], archive.blob(row["key"]))
        except DamagedArchiveError:
            fault = "its SHA-256 does not fit"
        if fault is not None:
            problems.append(Problem(name, row["key"], "photo", f"{BLOB_COLUMN}: {fault}"))
    return problems


def _bitstream_fault(key: str, codec: str, blob: bytes) -> str | None:
    """What the bitstream's own header and checksums say."""
    if codec != "vae":
        return None
    from vaestream.codec import check

    try:
        check(blob)
    except BitstreamError as error:
        return str(error)
    return None
