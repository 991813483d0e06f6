"""Where the bytes of each value lie in a part: footer, page headers, exact byte ranges.

A part has one data page per column chunk. Where such a page is PLAIN and uncompressed, each value
is its length (4 bytes, little-endian) and its bytes, back to back up to the chunk's end; so the
footer and the column of lengths give the offset of every value, and nothing else is read.
Format: https://parquet.apache.org/docs/file-format/ (pages, Thrift compact protocol).
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vaestream.archive.storage import read_bytes
from vaestream.errors import DamagedArchiveError

MAGIC = b"PAR1"
INFO_KEY = b"vaestream"
"""Key of a part's own description (JSON) in the footer's key-value metadata."""

NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"footer_sha256": "([0-9a-f]{64})"')

_RLE = 3
_TAIL_BYTES = 1 << 16
_MAX_PAGE_HEADER = 64


@dataclass(frozen=True, slots=True)
class Footer:
    """The last bytes of a part: Parquet metadata, its length and the magic.

    offset: where it begins, which is also the number of bytes in front of it.
    data: all its bytes. metadata: as pyarrow reads it.
    """

    offset: int
    data: bytes
    metadata: pq.FileMetaData

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the footer's bytes, its own digest in them taken as 64 zeros."""
        return hashlib.sha256(_DIGEST.sub(_without_digest, self.data)).hexdigest()

    @property
    def declared_sha256(self) -> str | None:
        """The digest that the footer holds of itself; None in a file that is no part of ours."""
        found = _DIGEST.search(self.data)
        return None if found is None else found[1].decode()


def _without_digest(found: re.Match[bytes]) -> bytes:
    return found[0].replace(found[1], NO_DIGEST.encode())


def parse_footer(tail: bytes, size: int, name: str) -> Footer | int:
    """The footer out of the last bytes of a file of `size` bytes.

    Returns the number of bytes needed where `tail` does not hold the whole footer.
    Raises DamagedArchiveError, naming the file, when there is no Parquet footer.
    """
    if len(tail) < 8 or tail[-4:] != MAGIC:
        raise DamagedArchiveError(f"{name}: footer: does not end as a Parquet file does")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length + 4 > size:
        raise DamagedArchiveError(f"{name}: footer: says {length} bytes in a file of {size}")
    if length > len(tail):
        return length
    data = tail[-length:]
    try:
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + data))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DamagedArchiveError(f"{name}: footer: {error}") from error
    return Footer(size - length, data, metadata)


def read_footer(fs: fsspec.AbstractFileSystem, path: str, size: int, name: str) -> Footer:
    """Read a file's footer: one ranged read, two where it is longer than 64 KiB."""
    tail = read_bytes(fs, path, max(0, size - _TAIL_BYTES), size)
    footer = parse_footer(tail, size, name)
    if isinstance(footer, int):
        tail = read_bytes(fs, path, size - footer, size)
        footer = parse_footer(tail, size, name)
    if isinstance(footer, int):
        raise DamagedArchiveError(f"{name}: footer: changed while it was read")
    return footer


def stamp_footer(data: bytes) -> bytes:
    """The footer's bytes with the digest of themselves in place of the 64 zeros."""
    digest = hashlib.sha256(data).hexdigest()
    return _DIGEST.sub(f'"footer_sha256": "{digest}"'.encode(), data, count=1)


def column_ranges(
    metadata: pq.FileMetaData, row_group: int, paths: Iterable[str]
) -> list[tuple[int, int]]:
    """Byte ranges (start, end) of the chunks at or below these columns, as the footer has them."""
    group = metadata.row_group(row_group)
    wanted = tuple(f"{path}." for path in paths)
    ranges = []
    for path, index in column_indices(metadata).items():
        if f"{path}.".startswith(wanted):
            chunk = group.column(index)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            ranges.append((start, start + chunk.total_compressed_size))
    return ranges


def column_indices(metadata: pq.FileMetaData) -> dict[str, int]:
    """Position of each leaf column by its dotted path."""
    return {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}


# --- exact byte ranges -----------------------------------------------------------------------


def plain_offsets(
    metadata: pq.FileMetaData, row_group: int, path: str, lengths: pa.ChunkedArray
) -> npt.NDArray[np.int64] | None:
    """Offset in the file of each value's first byte; -1 for nulls.

    lengths: the values' lengths in bytes, null where the value is null.
    None where the footer shows that the column chunk is not laid out so: another encoding,
    compression, a dictionary, more than one page, other lengths.
    """
    index = column_indices(metadata).get(path)
    if index is None:
        return None
    chunk = metadata.row_group(row_group).column(index)
    leaf = metadata.schema.column(index)
    sizes = lengths.to_numpy(zero_copy_only=False)
    present = ~np.isnan(sizes) if lengths.null_count else np.ones(len(sizes), bool)
    steps = np.where(present, np.nan_to_num(sizes) + 4, 0).astype(np.int64)
    total = int(steps.sum())
    head = chunk.total_compressed_size - total
    if (
        chunk.physical_type != "BYTE_ARRAY"
        or chunk.compression != "UNCOMPRESSED"
        or not set(chunk.encodings) <= {"PLAIN", "RLE"}
        or chunk.has_dictionary_page
        or chunk.num_values != len(sizes)
        or leaf.max_repetition_level
        or head <= 0
    ):
        return None
    if not lengths.null_count and head not in _one_page_heads(
        total, len(sizes), leaf.max_definition_level
    ):
        return None
    end = chunk.data_page_offset + chunk.total_compressed_size
    starts = end - total + np.concatenate([[0], np.cumsum(steps)[:-1]]) + 4
    return np.where(present, starts, -1).astype(np.int64)


def dictionary_offsets(
    metadata: pq.FileMetaData, row_group: int, path: str, values: pa.DictionaryArray
) -> npt.NDArray[np.int64] | None:
    """Offset of each row's value in the dictionary page of its column chunk; -1 for nulls.

    values: the column as it was read, the dictionary in the order of the page.
    None where the chunk has no uncompressed dictionary page, or one of another size.
    """
    index = column_indices(metadata).get(path)
    if index is None:
        return None
    if len(values) == values.null_count:
        return np.full(len(values), -1, np.int64)
    chunk = metadata.row_group(row_group).column(index)
    steps = np.array([len(value) + 4 for value in values.dictionary.to_pylist()], np.int64)
    if (
        chunk.compression != "UNCOMPRESSED"
        or not chunk.has_dictionary_page
        or chunk.dictionary_page_offset is None
    ):
        return None
    head = chunk.data_page_offset - chunk.dictionary_page_offset - int(steps.sum())
    if not 0 < head < _MAX_PAGE_HEADER:
        return None
    starts = chunk.data_page_offset - steps.sum() + np.concatenate([[0], np.cumsum(steps)[:-1]]) + 4
    codes = values.indices.to_numpy(zero_copy_only=False)
    present = ~np.isnan(codes) if values.null_count else np.ones(len(codes), bool)
    return np.where(present, starts[np.nan_to_num(codes).astype(np.int64)], -1).astype(np.int64)


def _one_page_heads(data_size: int, num_values: int, max_definition_level: int) -> set[int]:
    """Bytes that can stand before the values of a single version 1 data page without nulls.

    These are a header without statistics and, in a nullable column, the definition levels: their
    length (4 bytes) and one run. Left open in the header: a CRC (2 to 6 bytes) and an empty
    statistics struct (2). The heads of two pages take more than the largest of these together, so
    the sizes alone tell one page from several.
    """
    levels = 0
    if max_definition_level:
        # One repeated run, or for fewer than 8 values one bit-packed group.
        width = max_definition_level.bit_length()
        levels = 4 + (_varint_length(num_values) + 1 if num_values >= 8 else 1 + width)
    base = 14 + 2 * _varint_length(data_size + levels) + _varint_length(num_values) + levels
    return {base + crc + statistics for crc in (0, 2, 3, 4, 5, 6) for statistics in (0, 2)}


def _varint_length(value: int) -> int:
    """Bytes of a non-negative i32 as a zigzag varint."""
    return max(1, -(-(2 * value).bit_length() // 7))


# --- page headers ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What a page's header says. size: bytes of the page behind it. length: of the header itself.

    kind: 0 data, 2 dictionary. crc: CRC-32 of the page's bytes, unsigned.
    canonical: the header's bytes are just what this format's writer writes for these values.
    """

    kind: int
    size: int
    uncompressed_size: int
    crc: int
    num_values: int
    encoding: int
    length: int
    canonical: bool


def parse_page_header(data: bytes) -> PageHeader:
    """Parse the Thrift compact PageHeader at the start of `data`.

    Raises ValueError when there is none.
    """
    try:
        values, length = _struct(data, 0)
        kind, crc = values[1], values[4] & 0xFFFFFFFF
        inner = values[5 if kind == 0 else 7]
        if not isinstance(inner, dict):
            raise ValueError("no page header")
        header = _struct_bytes(
            [(1, kind), (2, values[2]), (3, values[3]), (4, values[4])]
        ) + _inner_bytes(kind, inner)
        return PageHeader(
            kind, values[3], values[2], crc, inner[1], inner[2], length, header == data[:length]
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("no page header") from error


def _inner_bytes(kind: int, inner: dict[int, Any]) -> bytes:
    """The kind's own struct and the stops of both, as pyarrow writes them."""
    if kind == 0:  # DataPageHeader is field 5, one after the CRC; its statistics are empty
        empty = b"\x1c\0" if inner.get(5) == {} else b""
        levels = [(3, _RLE), (4, _RLE)]  # the encoding of definition and repetition levels
        return b"\x1c" + _struct_bytes([(1, inner[1]), (2, inner[2]), *levels]) + empty + b"\0\0"
    # DictionaryPageHeader is field 7, three after the CRC; is_sorted is false
    return b"\x3c" + _struct_bytes([(i, inner[i]) for i in (1, 2)]) + b"\x12" + b"\0\0"


def _struct_bytes(items: list[tuple[int, int]]) -> bytes:
    """i32 fields with consecutive ids, without the stop."""
    out = bytearray()
    for before, (field, value) in pairwise([(0, 0), *items]):
        out.append((field - before[0]) << 4 | 5)
        rest = (value << 1) ^ (value >> 31)
        while rest >= 0x80:
            out.append(rest & 0x7F | 0x80)
            rest >>= 7
        out.append(rest)
    return bytes(out)


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Fields by id of the struct at `at`, and the position behind it."""
    values: dict[int, Any] = {}
    field = 0
    while data[at] != 0:
        delta, kind = data[at] >> 4, data[at] & 15
        if delta == 0:
            raise ValueError("no page header")
        at, field = at + 1, field + delta
        if kind in (1, 2):
            values[field] = kind == 1
        elif kind in (4, 5, 6):
            raw, shift = 0, 0
            while True:
                byte = data[at]
                at += 1
                raw |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            values[field] = (raw >> 1) ^ -(raw & 1)
        elif kind == 12:
            values[field], at = _struct(data, at)
        else:
            raise ValueError("no page header")
    return values, at + 1
