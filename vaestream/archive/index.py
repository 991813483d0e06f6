"""The index: where in which part each photo lies, so that one ranged read gets it.

`index.parquet` holds nothing that the parts don't: `build_index` makes it from them.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vaestream.archive.layout import (
    INFO_KEY,
    Footer,
    column_ranges,
    dictionary_offsets,
    plain_offsets,
    read_footer,
)
from vaestream.archive.storage import RangeFile, file_size, join, read_bytes, staged
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
_GROUP_ROWS = 1 << 15
_COLUMNS = 3

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def build_index(fs: fsspec.AbstractFileSystem, root: str, parts: Iterable[str]) -> str:
    """Write the index over the parts of these names; returns the hex SHA-256 of its bytes.

    The same parts give the same bytes. What is in memory at once is a row group, and the rows of
    parts whose keys lie among each other's. Raises ArchiveError when two parts hold the same key,
    DamagedArchiveError when a part cannot be read.
    """
    options = {"compression": "zstd", "write_page_checksum": True}
    with staged(fs, join(root, INDEX)) as temporary:
        with pq.ParquetWriter(temporary, INDEX_SCHEMA, **options) as writer:
            for group in _row_groups(_runs(fs, root, sorted(parts))):
                writer.write_table(group, row_group_size=_GROUP_ROWS)
        with open(temporary, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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
    names = parquet.schema_arrow.names
    tables = [_columns(parquet, names[i : i + _COLUMNS]) for i in range(0, len(names), _COLUMNS)]
    columns = [column for table in tables for column in table.columns]
    return pa.Table.from_arrays(columns, schema=parquet.schema_arrow)


def _columns(parquet: pq.ParquetFile, names: list[str]) -> pa.Table:
    """Some columns of a file, each in one chunk.

    pyarrow's allocator keeps what decoding has taken and freed: with all columns decoded at once
    that is more than the index itself. So they are decoded a few at a time, moved to memory of the
    system's, and what the allocator holds is given back.
    """
    groups = [
        parquet.read_row_group(group, names, use_threads=False)
        for group in range(parquet.num_row_groups)
    ]
    groups.append(parquet.schema_arrow.empty_table().select(names))
    table = pa.concat_tables(groups).combine_chunks(memory_pool=pa.system_memory_pool())
    groups.clear()
    pa.default_memory_pool().release_unused()
    return table


def index_of(fs: fsspec.AbstractFileSystem, root: str, names: Sequence[str]) -> pa.Table:
    """The index over these parts, made from their footers and small columns.

    Raises as `build_index` does.
    """
    return _concatenated(_runs(fs, root, names))


def _runs(fs: fsspec.AbstractFileSystem, root: str, names: Sequence[str]) -> Iterator[pa.Table]:
    """The index's rows, ascending by key: a table for each part, or for several whose keys lie
    among each other's."""
    with ThreadPoolExecutor(_THREADS) as pool:
        groups = _apart(names, list(_ahead(pool, lambda name: _key_span(fs, root, name), names)))
        tables = _ahead(pool, lambda name: _entries_at(fs, root, name), chain.from_iterable(groups))
        for group in groups:
            table = _concatenated(next(tables) for _ in group).sort_by("key").combine_chunks()
            _check_unique(table, root)
            if len(table):
                yield table


class _KeySpan(NamedTuple):
    """The first and the last key of a part; "" and "" in one without rows."""

    first: str
    last: str
    part: str


def _key_span(fs: fsspec.AbstractFileSystem, root: str, name: str) -> _KeySpan | None:
    """As the footer tells, None where it does not: parts had no such note once."""
    described = (_footer_at(fs, root, name).metadata.metadata or {}).get(INFO_KEY, b"{}")
    keys = json.loads(described).get("keys")
    if keys is None:
        return None
    first, last = keys or ("", "")
    return _KeySpan(first, last, name)


def _apart(names: Sequence[str], spans: Sequence[_KeySpan | None]) -> list[list[str]]:
    """The parts in groups that ascend by key and do not reach into each other."""
    known = sorted(span for span in spans if span is not None)
    if len(known) < len(names):
        return [list(names)]
    groups: list[list[str]] = []
    end = ""
    for span in known:
        if groups and span.first <= end:
            groups[-1].append(span.part)
        else:
            groups.append([span.part])
        end = max(end, span.last)
    return groups


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """As `pool.map`, but with no more results waiting than there are threads."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of `_GROUP_ROWS`, the last of which may have fewer."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        while rows + len(table) >= _GROUP_ROWS:
            yield _concatenated([*waiting, table.slice(0, _GROUP_ROWS - rows)])
            table, waiting, rows = table.slice(_GROUP_ROWS - rows), [], 0
        waiting.append(table)
        rows += len(table)
    if rows:
        yield _concatenated(waiting)


def _concatenated(tables: Iterable[pa.Table]) -> pa.Table:
    table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables])
    return table.unify_dictionaries().combine_chunks()


def _check_unique(table: pa.Table, root: str) -> None:
    """Raises ArchiveError for a key that comes twice; the rows ascend by key."""
    keys = table["key"]
    twice = pc.equal(keys.slice(1), keys.slice(0, max(0, len(keys) - 1))).combine_chunks()
    if twice.true_count:
        at = twice.index(True).as_py()
        first, second = (table["part"][i].as_py() for i in (at, at + 1))
        raise ArchiveError(f"{root}: key {keys[at].as_py()!r} is in {first} and in {second}")


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
    return part_entries(fs, join(root, name), _footer_at(fs, root, name), name)


def _footer_at(fs: fsspec.AbstractFileSystem, root: str, name: str) -> Footer:
    path = join(root, name)
    try:
        return read_footer(fs, path, file_size(fs, path), name)
    except FileNotFoundError as error:
        raise DamagedArchiveError(f"{path}: is missing") from error


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
