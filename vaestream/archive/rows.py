"""Rows of a part as they were written, for a part that takes its place."""

import hashlib
from collections.abc import Iterator
from dataclasses import fields

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from vaestream.archive.schema import Row, metadata_crc32
from vaestream.archive.storage import RangeFile, file_size
from vaestream.errors import DamagedArchiveError

_BATCH = 16


def read_rows(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Row]:
    """The rows of the part at `path`, in their order, a few at a time in memory.

    Raises DamagedArchiveError, naming the part, where it is missing or any byte of a row is not
    the one that was written.
    """
    names = [field.name for field in fields(Row) if field.name != "data"]
    checks = ["image", "sha256", "metadata_crc32"]
    try:
        file = pq.ParquetFile(
            RangeFile(fs, path, file_size(fs, path)),
            pre_buffer=False,
            page_checksum_verification=True,
        )
        for batch in file.iter_batches(_BATCH, columns=[*names, *checks], use_threads=False):
            for values in batch.to_pylist():
                data = values.pop("image")["bytes"]
                digest, crc = values.pop("sha256"), values.pop("metadata_crc32")
                row = Row(data=data, **values)
                if hashlib.sha256(data).hexdigest() != digest or crc != metadata_crc32(
                    row.exif, row.xmp, row.icc
                ):
                    raise DamagedArchiveError(f"{path}: {row.key}: is damaged")
                yield row
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DamagedArchiveError(f"{path}: cannot be read: {error}") from error
