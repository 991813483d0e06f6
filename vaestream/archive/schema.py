"""The columns of an archive's parts: one row a source object, `image` as Hugging Face keeps it.

`Row` is what goes in, `RowInfo` what comes out without the photo's bytes, `SCHEMA` the Parquet
side of both. docs/archive-format.md describes every column.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from vaestream.errors import ArchiveError
from vaestream.images import EMPTY_FILE

FORMAT_VERSION = 1
"""Version of the parts, the index and the manifest; readers refuse a higher one."""

CodecName = Literal["vae", "source"]

MAX_VALUE_BYTES = 2**31 - 2**16
"""Largest blob, in bytes: a Parquet page counts its bytes in an int32."""

MAX_SIDE = 2**31 - 1
"""Largest width and height, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One source object, compressed or kept, with all that is known of it.

    key: unique in the archive; any text that UTF-8 can encode.
    data: the bitstream (codec "vae") or the source's own bytes (codec "source").
    width, height: pixels, as the decoded photo has them (orientation applied for "vae").
    channels: 3 (RGB) or 1 (gray); None where the source is kept.
    psnr: dB over all 8-bit samples of the decoded photo; inf when equal, None when not measured.
    source_mtime: modification time, with a time zone; kept in UTC to the microsecond.
    exif, xmp, icc: payloads as Pillow's `save(exif=, xmp=, icc_profile=)` takes them.
    reason: why the source is kept. error: what is broken about it.
    """

    key: str
    data: bytes
    codec: CodecName
    width: int | None = None
    height: int | None = None
    channels: int | None = None
    quality: float | None = None
    psnr: float | None = None
    source_size: int
    source_mtime: datetime | None = None
    source_url: str
    source_etag: str | None = None
    source_format: str | None = None
    source_sha256: str
    exif: bytes | None = None
    xmp: bytes | None = None
    icc: bytes | None = None
    reason: str | None = None
    error: str | None = None

    @property
    def unread(self) -> bool:
        """As `RowInfo.unread`."""
        return is_unread(self.error, len(self.data))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInfo:
    """A row without its bytes: what `Archive.row` and `Archive.rows` give.

    num_bytes: length of the blob. sha256: hex digest of the blob.
    exif_num_bytes, xmp_num_bytes, icc_num_bytes: sizes of the payloads, None where there is none.
    The other fields are those of `Row`.
    """

    key: str
    codec: CodecName
    num_bytes: int
    sha256: str
    width: int | None
    height: int | None
    channels: int | None
    quality: float | None
    psnr: float | None
    source_size: int
    source_mtime: datetime | None
    source_url: str
    source_etag: str | None
    source_format: str | None
    source_sha256: str
    exif_num_bytes: int | None
    xmp_num_bytes: int | None
    icc_num_bytes: int | None
    reason: str | None
    error: str | None

    @property
    def unread(self) -> bool:
        """Whether the object could not be read, so that its bytes are not in the archive."""
        return is_unread(self.error, self.num_bytes)


def is_unread(error: str | None, num_bytes: int) -> bool:
    """See `RowInfo.unread`."""
    return error is not None and not num_bytes and error != EMPTY_FILE


_FEATURES: dict[str, Any] = {"image": {"_type": "Image"}}


def _column(name: str, kind: pa.DataType, feature: str, *, nullable: bool = True) -> pa.Field:
    _FEATURES[name] = {"dtype": feature, "_type": "Value"}
    return pa.field(name, kind, nullable=nullable)


_IMAGE = pa.field(
    "image",
    # Hugging Face knows an image by this very type, nullable fields and all. None of them is ever
    # null here, so the definition levels in front of a page's values are one short run.
    pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]),
)

_COLUMNS = [
    _column("key", pa.string(), "string", nullable=False),
    _IMAGE,
    _column("codec", pa.string(), "string", nullable=False),
    _column("num_bytes", pa.int64(), "int64", nullable=False),
    _column("sha256", pa.string(), "string", nullable=False),
    _column("width", pa.int32(), "int32"),
    _column("height", pa.int32(), "int32"),
    _column("channels", pa.int32(), "int32"),
    _column("quality", pa.float64(), "float64"),
    _column("psnr", pa.float64(), "float64"),
    _column("source_size", pa.int64(), "int64", nullable=False),
    _column("source_mtime", pa.timestamp("us", tz="UTC"), "timestamp[us, tz=UTC]"),
    _column("source_url", pa.string(), "string", nullable=False),
    _column("source_etag", pa.string(), "string"),
    _column("source_format", pa.string(), "string"),
    _column("source_sha256", pa.string(), "string", nullable=False),
    _column("reason", pa.string(), "string"),
    _column("error", pa.string(), "string"),
    _column("exif_num_bytes", pa.int64(), "int64"),
    _column("xmp_num_bytes", pa.int64(), "int64"),
    _column("icc_num_bytes", pa.int64(), "int64"),
    _column("metadata_crc32", pa.int64(), "int64", nullable=False),
    _column("exif", pa.binary(), "binary"),
    _column("xmp", pa.binary(), "binary"),
    _column("icc", pa.binary(), "binary"),
]

SCHEMA: pa.Schema = pa.schema(
    _COLUMNS,
    metadata={
        "huggingface": json.dumps(
            {"info": {"features": {field.name: _FEATURES[field.name] for field in _COLUMNS}}}
        )
    },
)
"""Schema of every part, with the metadata by which Hugging Face datasets knows `image`."""

INFO_COLUMNS: list[str] = [field.name for field in fields(RowInfo)]
"""Columns that make a `RowInfo`: all but the image, the payloads and their checksum."""


def metadata_crc32(exif: bytes | None, xmp: bytes | None, icc: bytes | None) -> int:
    """CRC-32 (zlib) over the three payloads, one after the other; None counts as empty."""
    return zlib.crc32(icc or b"", zlib.crc32(xmp or b"", zlib.crc32(exif or b"")))


def check_row(row: Row) -> None:
    """Raise ArchiveError, naming the key, when `row` cannot be kept as it is."""
    for field in fields(Row):
        value = getattr(row, field.name)
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ArchiveError(f"{row.key!a}: {field.name} is not UTF-8 text") from error
        elif isinstance(value, bytes) and len(value) > MAX_VALUE_BYTES:
            raise ArchiveError(
                f"{row.key}: {field.name} has {len(value)} bytes, more than the "
                f"{MAX_VALUE_BYTES} that an archive can hold in one value"
            )
    for name in ("width", "height", "channels"):
        side = getattr(row, name)
        if side is not None and not 0 < side <= MAX_SIDE:
            raise ArchiveError(f"{row.key}: {name} {side} is outside 1 to {MAX_SIDE}")
    if row.codec not in ("vae", "source"):
        raise ArchiveError(f"{row.key}: codec {row.codec!r} is neither 'vae' nor 'source'")
    if row.source_mtime is not None and row.source_mtime.tzinfo is None:
        raise ArchiveError(f"{row.key}: source_mtime has no time zone")


def to_table(rows: Sequence[Row]) -> pa.Table:
    """The rows as a table of `SCHEMA`."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if name != "image"}
    for row in rows:
        mtime = row.source_mtime
        values = {
            **{field.name: getattr(row, field.name) for field in fields(Row)},
            "num_bytes": len(row.data),
            "sha256": hashlib.sha256(row.data).hexdigest(),
            "source_mtime": None if mtime is None else mtime.astimezone(UTC),
            "exif_num_bytes": None if row.exif is None else len(row.exif),
            "xmp_num_bytes": None if row.xmp is None else len(row.xmp),
            "icc_num_bytes": None if row.icc is None else len(row.icc),
            "metadata_crc32": metadata_crc32(row.exif, row.xmp, row.icc),
        }
        for name, column in columns.items():
            column.append(values[name])
    image = pa.StructArray.from_arrays(
        [
            pa.array([row.data for row in rows], pa.binary()),
            pa.array([row.key for row in rows], pa.string()),
        ],
        fields=list(_IMAGE.type),
    )
    arrays = [
        image if field.name == "image" else pa.array(columns[field.name], field.type)
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def to_infos(table: pa.Table) -> list[RowInfo]:
    """The rows of a table that holds at least `INFO_COLUMNS`."""
    return [RowInfo(**values) for values in table.select(INFO_COLUMNS).to_pylist()]
