"""Checks of one part: is every byte the one that was written, and which photo has it if not.

The page checksums cover the pages, the canonical form covers the page headers, the footer's digest
covers the footer; nothing is left over. A blob's own SHA-256 tells which photo of a page is hit.
"""

import hashlib
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vaestream.archive.layout import MAGIC, Footer, column_indices, parse_page_header
from vaestream.archive.storage import RangeFile

What = Literal["photo", "column", "footer", "index", "manifest", "model", "missing"]

BLOB_COLUMN = "image.bytes"
_PLAIN, _RLE_DICTIONARY = 0, 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in an archive.

    part: the file's name. row_key: the photo, where one is hit. what: the kind of thing.
    detail: a sentence for people; for a column it begins with the column's path.
    """

    part: str
    row_key: str | None
    what: What
    detail: str

    def __str__(self) -> str:
        key = "" if self.row_key is None else f" {self.row_key}"
        return f"{self.part}: {self.what}{key}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a row's blob must be: where it lies in its column chunk's row group, and its hash."""

    key: str
    codec: str
    num_bytes: int
    sha256: str


def check_body(
    file: BinaryIO | io.BufferedReader,
    footer: Footer,
    part: str,
    expected: Sequence[Sequence[Expected]] | None,
    check_blob: Callable[[str, str, bytes], str | None] | None = None,
) -> tuple[list[Problem], str]:
    """Read all bytes before the footer, in order, once; memory is bounded by a column chunk.

    expected: the rows of each row group; None where they are not known. check_blob: gets key,
    codec and bytes of each blob whose hash fits, and says what is wrong with it. Returns the
    problems and the hex SHA-256 of the bytes read.
    """
    problems: list[Problem] = []
    body = hashlib.sha256()
    file.seek(0)
    magic = file.read(len(MAGIC))
    body.update(magic)
    if magic != MAGIC:
        problems.append(Problem(part, None, "footer", "the magic at the file's start is damaged"))
    blob_index = column_indices(footer.metadata).get(BLOB_COLUMN)
    for group in range(footer.metadata.num_row_groups):
        meta = footer.metadata.row_group(group)
        for column in range(meta.num_columns):
            chunk = meta.column(column)
            data = file.read(chunk.total_compressed_size)
            body.update(data)
            rows = expected[group] if expected is not None and column == blob_index else None
            fault = _chunk_fault(data, chunk)
            found: list[Problem] = []
            if rows is not None:
                found = _check_blobs(data, rows, part, check_blob)
                problems += found
            if fault is not None and not found:
                where = f"{chunk.path_in_schema}: row group {group}: {fault}"
                problems.append(Problem(part, None, "column", where))
    return problems, body.hexdigest()


def _chunk_fault(data: bytes, chunk: pq.ColumnChunkMetaData) -> str | None:
    """What is wrong with the pages of a column chunk; None where each byte is as written."""
    at, raw, values = 0, 0, 0
    kinds = [2, 0] if chunk.has_dictionary_page else [0]
    for kind in kinds:
        try:
            header = parse_page_header(data[at : at + 64])
        except ValueError:
            return "the page header is damaged"
        page = data[at + header.length : at + header.length + header.size]
        # Values are PLAIN, but for the indices into a dictionary, itself PLAIN.
        encoding = _RLE_DICTIONARY if chunk.has_dictionary_page and kind == 0 else _PLAIN
        if header.kind != kind or header.encoding != encoding or not header.canonical:
            return "the page header is damaged"
        if len(page) != header.size or zlib.crc32(page) != header.crc:
            return "the page's checksum does not fit"
        if kind == 2 and header.num_values != _count_values(page):
            return "the page header does not fit the dictionary"
        at += header.length + header.size
        raw += header.length + header.uncompressed_size
        values = header.num_values
    if at != len(data) or raw != chunk.total_uncompressed_size or values != chunk.num_values:
        return "the page header does not fit the footer"
    return None


def _count_values(page: bytes) -> int:
    """Number of PLAIN byte arrays in an uncompressed page."""
    count, at = 0, 0
    while at < len(page):
        at += 4 + int.from_bytes(page[at : at + 4], "little")
        count += 1
    return count


def _check_blobs(
    data: bytes,
    rows: Sequence[Expected],
    part: str,
    check_blob: Callable[[str, str, bytes], str | None] | None,
) -> list[Problem]:
    problems = []
    at = len(data) - sum(row.num_bytes + 4 for row in rows)
    for row in rows:
        blob = data[at + 4 : at + 4 + row.num_bytes] if at >= 0 else b""
        at += 4 + row.num_bytes
        if hashlib.sha256(blob).hexdigest() != row.sha256:
            detail = f"{BLOB_COLUMN}: its SHA-256 does not fit"
            problems.append(Problem(part, row.key, "photo", detail))
        elif check_blob is not None and (fault := check_blob(row.key, row.codec, blob)):
            problems.append(Problem(part, row.key, "photo", f"{BLOB_COLUMN}: {fault}"))
    return problems


def expected_rows(file: BinaryIO | RangeFile, footer: Footer) -> list[list[Expected]]:
    """The rows of each row group as the part itself has them. Raises OSError, ArrowException."""
    parquet = pq.ParquetFile(
        file, metadata=footer.metadata, pre_buffer=False, page_checksum_verification=True
    )
    groups = []
    for group in range(parquet.num_row_groups):
        table: pa.Table = parquet.read_row_group(
            group, columns=["key", "codec", "num_bytes", "sha256"], use_threads=False
        )
        groups.append([Expected(**row) for row in table.to_pylist()])
    return groups
