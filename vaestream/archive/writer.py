"""Writing parts: streamed, read back and verified, in place at once or not at all."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from typing import Any, BinaryIO

import fsspec
import pyarrow.parquet as pq

from vaestream.archive.integrity import check_body, expected_rows
from vaestream.archive.layout import (
    INFO_KEY,
    NO_DIGEST,
    Footer,
    parse_footer,
    read_footer,
    stamp_footer,
)
from vaestream.archive.manifest import PartInfo, PartStats
from vaestream.archive.schema import FORMAT_VERSION, SCHEMA, Row, check_row, to_table
from vaestream.archive.storage import file_size, join, staged
from vaestream.errors import ArchiveError, DamagedArchiveError

ROW_GROUP_BYTES = 96 << 20
"""Blob bytes after which a row group ends."""

_PAYLOADS = ("image.bytes", "exif", "xmp", "icc")
_ONE_PAGE = 2**31 - 1


def part_name(part_id: str) -> str:
    """File name of a part."""
    return f"part-{part_id}.parquet"


def part_id_of(name: str) -> str | None:
    """The id of the part that has this file name; None where it is none of a part's."""
    return name[5:-8] if name.startswith("part-") and name.endswith(".parquet") else None


def write_part(
    fs: fsspec.AbstractFileSystem,
    root: str,
    part_id: str,
    rows: Iterable[Row],
    *,
    replaces: str | None = None,
    row_group_bytes: int = ROW_GROUP_BYTES,
    replace: bool = True,
) -> PartInfo:
    """Write `rows`, ascending by key, as one part of the archive in folder `root`.

    replaces: see `PartInfo`; told in the footer.

    The rows are taken one by one; memory holds those of one row group. The file is read back and
    checked, byte ranges and hashes, before it stands under its name; a part of that name is
    replaced, or with `replace` false stays if it is whole, and is the one described then. The same
    rows give the same bytes.

    Raises ArchiveError for rows that cannot be kept (a key twice or out of order, text that is
    not UTF-8, a value over 2 GiB), and where the store cannot take the file; nothing is left then.
    """
    name = part_name(part_id)
    path = join(root, name)
    with suppress(_NotNeeded), staged(fs, path) as temporary:
        stats = PartStats()
        written: list[tuple[str, str]] = []
        with open(temporary, "wb") as file:
            described = {"part_id": part_id} | ({"replaces": replaces} if replaces else {})
            _write_rows(file, described, _checked(rows, name), row_group_bytes, stats, written)
        with open(temporary, "r+b") as file:
            footer = _footer_of(file, name)
            file.seek(footer.offset)
            file.write(stamp_footer(footer.data))
        with open(temporary, "rb") as file:
            info = _read_back(file, name, written)
        if not replace:
            standing = committed_part(fs, root, part_id)
            if standing is not None:
                info = standing
                raise _NotNeeded
    return info


def find_part(fs: fsspec.AbstractFileSystem, root: str, part_id: str) -> PartInfo | None:
    """What is known of a part that stands in folder `root`, from its footer; None if there is none.

    Raises DamagedArchiveError where the footer or the size is not the one that was written.
    """
    name = part_name(part_id)
    path = join(root, name)
    try:
        size = file_size(fs, path)
        footer = read_footer(fs, path, size, name)
    except FileNotFoundError:
        return None
    info = part_info(footer, name)
    if info.part_id != part_id or info.size != size:
        raise DamagedArchiveError(f"{path}: footer: it is the one of another part")
    return info


def committed_part(fs: fsspec.AbstractFileSystem, root: str, part_id: str) -> PartInfo | None:
    """As `find_part`, but a part with a damaged footer counts as none."""
    try:
        return find_part(fs, root, part_id)
    except DamagedArchiveError:
        return None


def part_info(footer: Footer, name: str) -> PartInfo:
    """The part's own description in its footer. Raises DamagedArchiveError naming the part."""
    described = (footer.metadata.metadata or {}).get(INFO_KEY)
    if described is None:
        raise DamagedArchiveError(f"{name}: footer: no part of an archive, or written anew")
    if footer.sha256 != footer.declared_sha256:
        raise DamagedArchiveError(f"{name}: footer: its own digest does not fit")
    values = json.loads(described)
    if values["version"] > FORMAT_VERSION:
        raise ArchiveError(f"{name}: has format version {values['version']}, newer than this one")
    if values["body_size"] != footer.offset:
        raise DamagedArchiveError(f"{name}: footer: it belongs to a file of another size")
    return PartInfo(
        name=name,
        part_id=values["part_id"],
        size=footer.offset + len(footer.data),
        body_size=footer.offset,
        body_sha256=values["body_sha256"],
        footer_sha256=footer.sha256,
        num_rows=footer.metadata.num_rows,
        stats=PartStats(**values["stats"]),
        replaces=values.get("replaces"),
    )


class _NotNeeded(Exception):
    """What has been staged is given up."""


class _Hashed(io.RawIOBase):
    """A sink that knows the hash of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size


def _checked(rows: Iterable[Row], name: str) -> Iterator[Row]:
    last: str | None = None
    source = iter(rows)
    while True:
        try:
            row = next(source)
        except StopIteration:
            return
        except OSError as error:  # not the destination's fault: keep it apart from those
            raise ArchiveError(f"{name}: the rows to write broke off: {error}") from error
        check_row(row)
        if last is not None and row.key <= last:
            fault = "is there twice" if row.key == last else f"comes after {last!r}, out of order"
            raise ArchiveError(f"{name}: key {row.key!r} {fault}")
        last = row.key
        yield row


def _groups(rows: Iterator[Row], row_group_bytes: int) -> Iterator[list[Row]]:
    """Rows in groups that hold at most `row_group_bytes` of blobs, or a single row."""
    group: list[Row] = []
    size = 0
    for row in rows:
        payload = sum(len(value or b"") for value in (row.data, row.exif, row.xmp, row.icc))
        if group and size + payload > row_group_bytes:
            yield group
            group, size = [], 0
        group.append(row)
        size += payload
    if group:
        yield group


def _write_rows(
    file: BinaryIO,
    described: dict[str, Any],
    rows: Iterator[Row],
    row_group_bytes: int,
    stats: PartStats,
    written: list[tuple[str, str]],
) -> None:
    sink = _Hashed(file)
    columns = [path for path in _leaf_paths() if path not in _PAYLOADS]
    writer = pq.ParquetWriter(
        sink,
        SCHEMA,
        # Payloads lie as they are, so that a byte range is a photo; profiles, which repeat, once.
        compression={**dict.fromkeys(columns, "zstd"), **dict.fromkeys(_PAYLOADS, "none")},
        use_dictionary=["icc"],
        dictionary_pagesize_limit=_ONE_PAGE,
        data_page_size=_ONE_PAGE,
        max_rows_per_page=_ONE_PAGE,
        data_page_version="1.0",
        write_statistics=False,
        write_page_checksum=True,
    )
    with writer:
        for group in _groups(rows, row_group_bytes):
            table = to_table(group)
            for row, digest in zip(group, table["sha256"].to_pylist(), strict=True):
                stats.add(row)
                written.append((row.key, digest))
            writer.write_table(table, row_group_size=len(group))
        described = {
            "version": FORMAT_VERSION,
            **described,
            "body_size": sink.size,
            "body_sha256": sink.sha256.hexdigest(),
            "footer_sha256": NO_DIGEST,
            "stats": asdict(stats),
            "keys": [written[0][0], written[-1][0]] if written else [],
        }
        writer.add_key_value_metadata({INFO_KEY.decode(): json.dumps(described)})
    file.flush()


def _leaf_paths() -> list[str]:
    return list(
        chain.from_iterable(
            ["image.bytes", "image.path"] if name == "image" else [name] for name in SCHEMA.names
        )
    )


def _footer_of(file: BinaryIO, name: str) -> Footer:
    size = file.seek(0, io.SEEK_END)
    file.seek(size - 8)
    length = int.from_bytes(file.read(4), "little") + 8
    file.seek(size - length)
    footer = parse_footer(file.read(length), size, name)
    assert isinstance(footer, Footer)
    return footer


def _read_back(file: BinaryIO, name: str, written: list[tuple[str, str]]) -> PartInfo:
    """Check the file against what was handed to the writer, from its bytes alone."""
    footer = _footer_of(file, name)
    info = part_info(footer, name)
    expected = expected_rows(file, footer)
    problems, body_sha256 = check_body(file, footer, name, expected)
    if problems:
        raise ArchiveError(f"{name}: read back with a fault: {problems[0]}")
    found = [(row.key, row.sha256) for group in expected for row in group]
    if found != written or body_sha256 != info.body_sha256:
        raise ArchiveError(f"{name}: what was read back is not what was written")
    return info
