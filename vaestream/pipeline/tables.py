"""Tables as sources: lists of URLs, and Parquet files with pictures in a column."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from vaestream.archive.layout import INFO_KEY
from vaestream.archive.storage import RangeFile, file_size
from vaestream.errors import SourceError
from vaestream.pipeline.plan import Cell

PARQUET_ENDING = ".parquet"
_TEXT_ENDINGS = (".txt", ".csv", ".tsv")
_URL_COLUMNS = (
    *("url", "uri", "path", "file", "file_name", "filename"),
    *("image", "image_url", "location"),
)
_BATCH = 4096


def is_list(name: str) -> bool:
    """Whether the file name is one of a list in text."""
    return name.lower().endswith(_TEXT_ENDINGS)


def is_parquet(name: str) -> bool:
    """Whether the file name is one of a Parquet file."""
    return name.lower().endswith(PARQUET_ENDING)


def parquet_kind(fs: AbstractFileSystem, path: str, shown: str) -> Literal["container", "list"]:
    """Whether a Parquet file holds pictures or their URLs. Errors: SourceError where it holds
    neither, or is no Parquet file, or part of an archive of ours."""
    try:
        file = _parquet(fs, path)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{shown}: is no Parquet file: {error}") from error
    if INFO_KEY in (file.metadata.metadata or {}):
        raise SourceError(f"{shown}: is a part of a vaestream archive: extract its photos first")
    schema = file.schema_arrow
    if _image_column(schema) is not None:
        return "container"
    if _url_column(schema.names) is not None:
        return "list"
    raise SourceError(
        f"{shown}: has no column with pictures (binary, or a struct with bytes) and none with URLs "
        f"({', '.join(_URL_COLUMNS)}); its columns are {', '.join(schema.names)}"
    )


def image_cells(fs: AbstractFileSystem, path: str) -> Iterator[tuple[str, Cell]]:
    """Name and place of each picture: the name is its path where it has one, else its row."""
    file = _parquet(fs, path)
    column = _image_column(file.schema_arrow)
    assert column is not None
    leaf, names = column
    row = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        found: list[str | None] = [None] * rows
        if names is not None:
            table = file.read_row_group(group, [names], use_threads=False)
            found = table.flatten().column(0).to_pylist()
        for at, name in enumerate(found):
            yield name or f"row-{row:09d}", Cell(leaf, group, at)
            row += 1


def listed_urls(fs: AbstractFileSystem, path: str, name: str, shown: str) -> Iterator[str]:
    """The URLs and paths of a list, in its order; `name` tells of which kind it is. Errors:
    SourceError where it has no column of them."""
    if is_parquet(name):
        file = _parquet(fs, path)
        column = _url_column(file.schema_arrow.names)
        assert column is not None
        for batch in file.iter_batches(_BATCH, columns=[column], use_threads=False):
            yield from _stripped(map(str, filter(None, batch.column(0).to_pylist())))
        return
    with fs.open(path, "rb") as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        if name.lower().endswith(".txt"):
            yield from _stripped(text)
            return
        separator = "\t" if name.lower().endswith(".tsv") else ","
        rows = csv.reader(text, delimiter=separator, skipinitialspace=True)
        names = next(rows, [])
        column = _url_column(names)
        if column is None:
            raise SourceError(
                f"{shown}: has no column named {', '.join(_URL_COLUMNS[:-1])} or "
                f"{_URL_COLUMNS[-1]}; its first line is {','.join(names)!r}"
            )
        at = names.index(column)
        yield from _stripped(row[at] for row in rows if len(row) > at)


def _stripped(values: Iterable[str]) -> Iterator[str]:
    """Without the spaces around them, and those that have nothing else left out."""
    return filter(None, map(str.strip, values))


def _parquet(fs: AbstractFileSystem, path: str) -> pq.ParquetFile:
    return pq.ParquetFile(RangeFile(fs, path, file_size(fs, path)), pre_buffer=False)


def _image_column(schema: pa.Schema) -> tuple[str, str | None] | None:
    """Leaf columns of the pictures and, where there is one, of their names."""
    structs = [
        field
        for field in schema
        if pa.types.is_struct(field.type)
        and (at := field.type.get_field_index("bytes")) >= 0
        and _is_binary(field.type.field(at).type)
    ]
    binaries = [field for field in schema if _is_binary(field.type)]
    for field in sorted(structs, key=lambda one: one.name not in ("image", "img")):
        has_path = field.type.get_field_index("path") >= 0
        return f"{field.name}.bytes", f"{field.name}.path" if has_path else None
    for field in binaries:
        if len(binaries) == 1 or field.name in ("image", "img", "jpg", "jpeg", "png", "bytes"):
            return field.name, None
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _url_column(names: list[str]) -> str | None:
    return next(
        (name for wanted in _URL_COLUMNS for name in names if name.strip().lower() == wanted), None
    )
