"""Photos of an archive by position, up to their latents: all that the CPU has to do."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vaestream.archive.reader import Archive
from vaestream.archive.schema import RowInfo
from vaestream.codec import Latents
from vaestream.codec.view import Region, check_view
from vaestream.errors import ArchiveError, DamagedArchiveError, VaestreamError

from .cache import BlobCache
from .order import Blocks

_FROM_INDEX = ("key", "codec", "width", "height", "num_bytes", "sha256", "error")


class _View(TypedDict):
    region: Region | None
    max_size: int | None


@dataclass(frozen=True)
class Coded:
    """A photo before the synthesis.

    content: latents, or the pixels of a kept source, (H, W, 3) or (H, W) uint8, or why there are
    none. columns: what was asked for beside it; None for values that could not be read.
    """

    key: str
    content: Latents | Tensor | VaestreamError
    columns: dict[str, Any]


class PhotoReader:
    """Reads and entropy-decodes photos of an archive. Pickles, and works in any process.

    keys: of the photos, in the order of their positions; None for all that are photos. columns:
    fields of `RowInfo` to give beside each. region, max_size: see `Archive.read`. cache: where
    blobs are kept. block_size: see `blocks`.

    Raises ArchiveError for a key that is not there, ValueError for a column that is not there and
    for a region or a size that no photo can have.
    """

    def __init__(
        self,
        archive: Archive,
        keys: Sequence[str] | None,
        *,
        columns: Sequence[str],
        region: Region | None,
        max_size: int | None,
        cache: BlobCache | None,
        block_size: int,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"a block cannot have {block_size} photos")
        check_view(region, max_size)
        known = [field.name for field in fields(RowInfo)]
        if unknown := [name for name in columns if name not in known]:
            raise ValueError(f"no column {unknown[0]!r}: there are {', '.join(known)}")
        self.archive = archive
        self.columns = tuple(columns)
        self._view = _View(region=region, max_size=max_size)
        self.cache = cache
        self.block_size = block_size
        self._rows = _select(archive, keys)

    def __len__(self) -> int:
        return len(self._rows)

    def on_cpu(self) -> "PhotoReader":
        """The same for a process that must not touch another device."""
        other = object.__new__(PhotoReader)
        other.__dict__.update(self.__dict__, archive=self.archive.to("cpu"))
        return other

    @property
    def keys(self) -> list[str]:
        """The keys, in the order of their positions."""
        keys: list[str] = self._rows["key"].to_pylist()
        return keys

    @cached_property
    def blocks(self) -> Blocks:
        """Runs of `block_size` photos that lie together in a part."""
        part = self._rows["part"].combine_chunks()
        # By name: the index's own numbers follow from what else is in the archive.
        places = np.argsort(np.argsort(part.dictionary.to_pylist()))
        groups, rows = (self._rows[name].to_numpy() for name in ("row_group", "row"))
        return Blocks.cut(places[part.indices.to_numpy()], groups, rows, self.block_size)

    @cached_property
    def _block_numbers(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.blocks.numbers()

    def read(self, positions: Sequence[int]) -> list[Coded]:
        """The photos at these positions, in their order.

        What is wrong with one photo becomes its content. Raises IndexError past the end, and for
        what is no photo's fault: ArchiveError where the store does not answer, DamagedArchiveError
        or ValueError where the codec cannot be loaded.
        """
        rows = self._entries(positions)
        if any(row["codec"] == "vae" for row in rows):
            _ = self.archive.codec
        blobs = self._blobs(positions, rows)
        return [self._coded(row, blob) for row, blob in zip(rows, blobs, strict=True)]

    # --- inside ------------------------------------------------------------------------------

    def _entries(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._rows.take(pa.array(positions, pa.int64())).to_pylist()
        return rows

    def _blobs(
        self, positions: Sequence[int], rows: Sequence[dict[str, Any]]
    ) -> list[bytes | VaestreamError]:
        found: dict[str, bytes | VaestreamError] = {}
        missing: dict[str, int] = {}
        for position, row in zip(positions, rows, strict=True):
            key, error = row["key"], row["error"]
            if error is not None:
                found[key] = ArchiveError(f"{key}: {error}")
            elif (kept := None if self.cache is None else self.cache.get(row["sha256"])) is None:
                missing[key] = int(position)
            else:
                found[key] = kept
        if self.cache is None:
            found.update(self._fetch(list(missing)))
        else:
            for number in sorted({int(self._block_numbers[at]) for at in missing.values()}):
                found.update(self._fetch_block(number, self.cache, missing))
        return [found[row["key"]] for row in rows]

    def _fetch_block(
        self, number: int, cache: BlobCache, wanted: dict[str, int]
    ) -> dict[str, bytes | VaestreamError]:
        """Fill the cache with a whole block, and give those of its blobs that are wanted."""
        rows = self._entries(self.blocks[number].tolist())
        found: dict[str, bytes | VaestreamError] = {}
        with cache.filling(rows[0]["sha256"]):
            missing = {}
            for row in rows:
                kept = cache.get(row["sha256"]) if row["key"] in wanted else None
                if kept is not None:
                    found[row["key"]] = kept
                elif row["error"] is None and (row["key"] in wanted or row["sha256"] not in cache):
                    missing[row["key"]] = row["sha256"]
            for key, blob in self._fetch(list(missing)).items():
                if isinstance(blob, bytes):
                    cache.put(missing[key], blob)
                if key in wanted:
                    found[key] = blob
        return found

    def _fetch(self, keys: list[str]) -> dict[str, bytes | VaestreamError]:
        """The blobs of keys, each once, read together; where one is damaged, each alone."""
        try:
            return dict(zip(keys, self.archive.blobs(keys), strict=True))
        except DamagedArchiveError as error:
            if len(keys) == 1:
                return {keys[0]: error}
        found: dict[str, bytes | VaestreamError] = {}
        for key in keys:
            found.update(self._fetch([key]))
        return found

    def _coded(self, row: dict[str, Any], blob: bytes | VaestreamError) -> Coded:
        content: Latents | Tensor | VaestreamError
        if isinstance(blob, VaestreamError):
            content = blob
        else:
            try:
                content = self._content(row, blob)
            except VaestreamError as error:
                content = error
        columns = {name: row.get(name) for name in self.columns}
        if "sha256" in columns:
            columns["sha256"] = row["sha256"].hex()
        if not set(self.columns) <= set(_FROM_INDEX):
            try:
                info = self.archive.row(row["key"])
            except DamagedArchiveError as error:
                content = error
            else:
                columns = {name: getattr(info, name) for name in self.columns}
        return Coded(row["key"], content, columns)

    def _content(self, row: dict[str, Any], blob: bytes) -> Latents | Tensor:
        key, view = row["key"], self._view
        try:
            if row["codec"] == "vae":
                # Without a limit: these are the bytes that were committed.
                return self.archive.codec.decode_latents(blob, max_pixels=None, **view)
            pixels = self.archive.source_pixels(key, blob, **view)
        except ValueError as error:
            raise ArchiveError(f"{key}: {error}") from error
        return torch.from_numpy(pixels)


def _select(archive: Archive, keys: Sequence[str] | None) -> pa.Table:
    """The rows of the index for these keys, and of them the columns that reading needs."""
    index = (
        archive.index.unify_dictionaries()
        .select(
            [
                "key",
                "codec",
                "width",
                "height",
                "length",
                "sha256",
                "error",
                "part",
                "row_group",
                "row",
            ]
        )
        .rename_columns({"length": "num_bytes"})
    )
    return index.take(archive.positions(keys))
