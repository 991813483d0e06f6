"""The index: where in which part each photo lies, so that one ranged read gets it.

`index.parquet` holds nothing that the parts don't: `build_index` makes it from them.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vaestream.archive.layout import (
    Footer,
    column_ranges,
    dictionary_offsets,
    plain_offsets,
    read_footer,
)
from vaestream.archive.storage import RangeFile, file_size, join, put_bytes, read_bytes
from vaestream.errors import ArchiveError, DamagedArchiveError

INDEX = "index.parquet"

INDEX_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("part", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("exif_offset", pa.int64()),
        pa.field("exif_length", pa.int64()),
        pa.field("xmp_offset", pa.int64()),
        pa.field("xmp_length", pa.int64()),
        pa.field("icc_offset", pa.int64()),
        pa.field("icc_length", pa.int64()),
        pa.field("metadata_crc32", pa.int64(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
"""Rows ascending by key. Offsets are in bytes from the start of the part, null where the part is
not laid out for exact ranges."""

_READ_COLUMNS = [
    *("key", "codec", "num_bytes", "sha256", "width", "height", "error"),
    *("exif_num_bytes", "xmp_num_bytes", "icc_num_bytes", "metadata_crc32", "icc"),
]
_THREADS = 16


def build_index(fs: fsspec.AbstractFileSystem, root: str, parts: Iterable[str]) -> str:
    """Write the index over the parts of these names; returns the hex SHA-256 of its bytes.

    The same parts give the same bytes. Raises ArchiveError when two parts hold the same key,
    DamagedArchiveError when a part cannot be read.
    """
    table = index_of(fs, root, sorted(parts))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue()
    put_bytes(fs, join(root, INDEX), data)
    return hashlib.sha256(data).hexdigest()


def load_index(fs: fsspec.AbstractFileSystem, root: str, sha256: str) -> pa.Table:
    """Read the index in one read.

    Raises DamagedArchiveError when it is missing or its bytes are not those of `sha256`.
    """
    path = join(root, INDEX)
    try:
        data = read_bytes(fs, path)
    except FileNotFoundError as error:
        raise DamagedArchiveError(f"{path}: index: is missing") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedArchiveError(f"{path}: index: its SHA-256 is not the manifest's")
    # One thread, and not through a dataset: see `RangeFile`, it is the same with Python's bytes.
    parquet = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return parquet.read(use_threads=False).combine_chunks()


def index_of(fs: fsspec.AbstractFileSystem, root: str, names: Sequence[str]) -> pa.Table:
    """The index over these parts, made from their footers and small columns.

    Raises as `build_index` does.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(lambda name: _entries_at(fs, root, name), names))
    table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables]).unify_dictionaries()
    table = table.sort_by("key").combine_chunks()
    keys = table["key"]
    if len(keys) > 1:
        twice = pc.equal(keys.slice(1), keys.slice(0, len(keys) - 1)).combine_chunks()
        if twice.true_count:
            at = twice.index(True).as_py()
            first, second = (table["part"][i].as_py() for i in (at, at + 1))
            raise ArchiveError(f"{root}: key {keys[at].as_py()!r} is in {first} and in {second}")
    return table


def part_entries(fs: fsspec.AbstractFileSystem, path: str, footer: Footer, name: str) -> pa.Table:
    """The index's rows for one part. Raises DamagedArchiveError, naming the part."""
    metadata = footer.metadata
    file = RangeFile(fs, path, footer.offset + len(footer.data))
    try:
        parquet = pq.ParquetFile(
            file,
            metadata=metadata,
            pre_buffer=False,
            read_dictionary=["icc"],
            page_checksum_verification=True,
        )
        groups = []
        for group in range(metadata.num_row_groups):
            file.prefetch(column_ranges(metadata, group, _READ_COLUMNS))
            table = parquet.read_row_group(group, _READ_COLUMNS, use_threads=False)
            groups.append(_group_entries(metadata, group, table, name))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DamagedArchiveError(f"{name}: column: {error}") from error
    return pa.concat_tables([INDEX_SCHEMA.empty_table(), *groups])


def _entries_at(fs: fsspec.AbstractFileSystem, root: str, name: str) -> pa.Table:
    path = join(root, name)
    try:
        footer = read_footer(fs, path, file_size(fs, path), name)
    except FileNotFoundError as error:
        raise DamagedArchiveError(f"{path}: is missing") from error
    return part_entries(fs, path, footer, name)


def _group_entries(metadata: pq.FileMetaData, group: int, table: pa.Table, name: str) -> pa.Table:
    rows = len(table)
    icc = table["icc"].combine_chunks()
    if isinstance(icc, pa.ChunkedArray):
        icc = icc.chunk(0) if icc.num_chunks else pa.array([], pa.binary()).dictionary_encode()
    offsets = {
        "offset": plain_offsets(metadata, group, "image.bytes", table["num_bytes"]),
        "exif_offset": plain_offsets(metadata, group, "exif", table["exif_num_bytes"]),
        "xmp_offset": plain_offsets(metadata, group, "xmp", table["xmp_num_bytes"]),
        "icc_offset": dictionary_offsets(metadata, group, "icc", icc),
    }
    columns = {
        "part": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [name]),
        "row_group": pa.array([group] * rows, pa.int32()),
        "row": pa.array(range(rows), pa.int32()),
        "length": table["num_bytes"],
        "sha256": pa.array([bytes.fromhex(text) for text in table["sha256"].to_pylist()]),
        "exif_length": table["exif_num_bytes"],
        "xmp_length": table["xmp_num_bytes"],
        "icc_length": table["icc_num_bytes"],
    }
    for field in INDEX_SCHEMA:
        if field.name in offsets:
            found = offsets[field.name]
            values = np.full(rows, -1) if found is None else found
            columns[field.name] = pa.array(values, pa.int64(), mask=values < 0)
        elif field.name not in columns:
            columns[field.name] = table[field.name]
    table = pa.table({field.name: columns[field.name] for field in INDEX_SCHEMA})
    return table.cast(INDEX_SCHEMA)
