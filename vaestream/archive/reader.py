"""Reading an archive: one photo, a batch, or the rows, without reading the rest."""

import hashlib
import io
import os
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import merge_offset_ranges
from PIL import Image, UnidentifiedImageError

from vaestream import images
from vaestream.archive.index import index_of, load_index
from vaestream.archive.layout import Footer, column_ranges, read_footer
from vaestream.archive.manifest import Manifest, PartInfo, read_manifest
from vaestream.archive.schema import INFO_COLUMNS, RowInfo, metadata_crc32, to_infos
from vaestream.archive.storage import (
    RangeFile,
    file_size,
    join,
    open_store,
    read_bytes,
    read_ranges,
    shown,
    store_errors,
)
from vaestream.archive.writer import model_path
from vaestream.errors import ArchiveError, DamagedArchiveError, VaestreamError, WeightsError
from vaestream.urls import absolute, public_url

if TYPE_CHECKING:
    from vaestream.codec import Codec
    from vaestream.codec.view import Region

_GAP_BYTES = 16 << 10
"""Bytes worth reading in vain to save a request, where several photos are asked for."""
_BLOCK_BYTES = 32 << 20
"""Where merged ranges are split, so that a store can serve them side by side."""
_CACHED_ROWS = 1 << 16
"""Rows whose small columns stay in memory: in the order of keys, parts may take turns."""
_CACHED_PARTS = 1 << 10
"""Parts whose footers do, some 64 KB each."""
_CACHED_TABLES = 4
_PAYLOADS = ("exif", "xmp", "icc")


@dataclass(frozen=True, slots=True)
class Payloads:
    """EXIF, XMP and ICC of a photo as Pillow's `save(exif=, xmp=, icc_profile=)` takes them."""

    exif: bytes | None
    xmp: bytes | None
    icc: bytes | None


@dataclass(frozen=True, slots=True)
class _Part:
    """A part's footer, and for a part that was written anew the place of each key in it."""

    footer: Footer
    places: dict[str, tuple[int, int]] | None


@dataclass(frozen=True, slots=True)
class _Span:
    """A byte range of a part."""

    path: str
    start: int
    end: int


class Archive:
    """An archive that `open_archive` has opened: its keys in order, its photos by key.

    Opening reads the manifest and the index, nothing else; a photo is one ranged read. What is
    read is checked against its SHA-256 before it is decoded. Reading is safe from several threads,
    from forked processes, and in others that get the archive pickled.

    url, storage_options, device: as they were given, a relative path made absolute; the device
    counts when the model is loaded, with the first photo. manifest: what the archive is made of.
    index: the table of docs/archive-format.md, rows ascending by key.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        device: str = "auto",
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.url = absolute(os.fspath(url))
        self.device = device
        self.storage_options = storage_options
        self._connect()
        self.manifest: Manifest = read_manifest(self._fs, self._root)
        self.index: pa.Table = self._load_index()
        self._reset()

    @cached_property
    def _infos(self) -> dict[str, PartInfo]:
        return {part.name: part for part in self.manifest.parts}

    def _connect(self) -> None:
        self._fs, self._root = open_store(self.url, self.storage_options)
        self._pid = os.getpid()

    def _reset(self) -> None:
        keys = self.index["key"]
        # `combine_chunks` copies even what is in one; what is in several may have 2 GiB and more.
        large = pa.large_string()
        self._keys = keys.chunk(0) if keys.num_chunks == 1 else keys.cast(large).combine_chunks()
        self._lock = threading.RLock()
        self._codec: Codec | None = None
        self._parts: OrderedDict[str, _Part] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], list[RowInfo]] = OrderedDict()
        self._tables: OrderedDict[tuple[str, int, str], pa.ChunkedArray] = OrderedDict()

    def _load_index(self) -> pa.Table:
        try:
            return load_index(self._fs, self._root, self.manifest.index_sha256)
        except DamagedArchiveError:
            # The parts hold all that the index does; `verify` tells of the damage.
            return index_of(self._fs, self._root, [part.name for part in self.manifest.parts])

    def __getstate__(self) -> dict[str, Any]:
        names = ("url", "device", "storage_options", "manifest", "index")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()
        self._reset()

    def __repr__(self) -> str:
        parts = len(self.manifest.parts)
        return f"<vaestream archive {self.name}: {len(self)} rows in {parts} parts>"

    @property
    def name(self) -> str:
        """The URL as it may be told: without passwords and signatures."""
        return public_url(self.url)

    # --- keys and rows -----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        """The keys, ascending."""
        for key in self._keys:
            yield key.as_py()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._position(key) is not None

    def keys(self) -> list[str]:
        """All keys, ascending by code point."""
        keys: list[str] = self._keys.to_pylist()
        return keys

    def keys_with(self, prefix: str) -> Iterator[str]:
        """The keys that begin so, ascending."""
        for at in range(self._insertion(prefix), len(self)):
            key: str = self._keys[at].as_py()
            if not key.startswith(prefix):
                break
            yield key

    def row(self, key: str) -> RowInfo:
        """All that is known of a photo but its bytes.

        Reads the small columns of its row group once for all rows in it. Raises ArchiveError when
        there is no such key, DamagedArchiveError when those columns are damaged.
        """
        return self._info(self._at(key))

    def rows(self) -> Iterator[RowInfo]:
        """The rows, ascending by key, read row group by row group. Raises as `row` does."""
        return (self._info(at) for at in range(len(self)))

    def positions(self, keys: Sequence[str] | None = None) -> pa.Array:
        """Positions in `index` (int64) of these keys, in their order, or of all photos: rows with a
        size and without an error. Raises ArchiveError when there is no such key."""
        if keys is None:
            photos = pc.and_(self.index["error"].is_null(), self.index["width"].is_valid())
            return pc.indices_nonzero(photos).cast(pa.int64())
        wanted = pa.array(keys, self._keys.type)
        places = pc.index_in(wanted, self._keys)
        if places.null_count:
            unknown = wanted[places.is_null().index(True).as_py()].as_py()
            raise ArchiveError(f"{self.name}: no photo {unknown!r}")
        return places.cast(pa.int64())

    def select(self, positions: pa.Array) -> "Archive":
        """The archive with some of its rows, as if it had no others; small where it is pickled.

        positions: in `index`, ascending.
        """
        index = self.index.take(positions).combine_chunks()
        # A dictionary goes along whole, however few of its names are left.
        at, kind = index.schema.get_field_index("part"), index.schema.field("part")
        names = index["part"].cast(pa.string())
        index = index.set_column(at, kind, names.dictionary_encode().cast(kind.type))
        parts = tuple(self._infos[name] for name in sorted(names.unique().to_pylist()))
        return self._with(manifest=replace(self.manifest, parts=parts), index=index)

    def to(self, device: str) -> "Archive":
        """The same archive, decoding on another device; nothing is read again but the model."""
        return self._with(device=device)

    def _with(self, **changes: Any) -> "Archive":
        other = object.__new__(type(self))
        other.__setstate__({**self.__getstate__(), **changes})
        return other

    # --- bytes -------------------------------------------------------------------------------

    def blob(self, key: str) -> bytes:
        """The bitstream of a photo, or the source's own bytes where they are kept: one ranged read.

        Raises ArchiveError when there is no such key, DamagedArchiveError when the bytes are not
        those that were written.
        """
        return self.blobs([key])[0]

    def blobs(self, keys: Sequence[str]) -> list[bytes]:
        """`blob` for many keys, in their order: neighbours in a part share a ranged read."""
        places = [self._at(key) for key in keys]
        blobs, _ = self._fetch(places, with_payloads=False)
        return [blobs[at] for at in places]

    def payloads(self, keys: Sequence[str]) -> list[Payloads]:
        """EXIF, XMP and ICC of the photos, in the order of the keys. Raises as `blob` does.

        Rows that keep their source have none: theirs are inside the source.
        """
        places = [self._at(key) for key in keys]
        _, payloads = self._fetch(places, with_blobs=False)
        return [payloads[at] for at in places]

    # --- photos ------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Image.Image:
        """The photo, with EXIF, XMP and ICC in `.info` the way Pillow leaves them.

        A bitstream gives a loaded "RGB" or "L" picture, upright; a kept source the picture as
        Pillow opens it, orientation tag and all. Raises ArchiveError for a row with an error (its
        text is the message), for a source that Pillow cannot open (`blob` gives its bytes), and as
        `blob` does.
        """
        at = self._at(key)
        self._refuse_error(at)
        blobs, payloads = self._fetch([at])
        if self._entry("codec", at) == "source":
            return self._open_source(at, blobs[at])
        extra = payloads[at]
        pixels = self._decode([blobs[at]])[0]
        return images.to_image(pixels, exif=extra.exif, xmp=extra.xmp, icc=extra.icc)

    def read(
        self,
        keys: Sequence[str],
        *,
        region: "Region | None" = None,
        max_size: int | None = None,
    ) -> list[npt.NDArray[np.uint8]]:
        """The photos as uint8 arrays, (H, W, 3) or (H, W) for gray, upright, in the keys' order.

        The bitstreams are read together. region: left, top, width and height in pixels of the part
        to decode, from each. max_size: shrink what is longer than that on its longer side. Both
        cost what they give, not what the photos would cost whole.

        Kept sources, which are decoded whole, give 8 bits too: transparency is laid over white, 16
        bits lose the lower 8, other colour spaces become RGB as Pillow converts them; floating
        point, whose range nothing tells, is refused as what Pillow cannot open. Raises ValueError
        where a photo does not have the region, else as `archive[key]` does.
        """
        places = [self._at(key) for key in keys]
        for at in places:
            self._refuse_error(at)
        blobs, _ = self._fetch(places, with_payloads=False)
        unique = sorted(blobs)
        coded = [at for at in unique if self._entry("codec", at) == "vae"]
        pixels: dict[int, npt.NDArray[np.uint8]] = {}
        if coded:
            decoded = self._decode([blobs[at] for at in coded], region, max_size)
            pixels.update(zip(coded, decoded, strict=True))
        for at in unique:
            if at not in pixels:
                pixels[at] = self._source_pixels(at, blobs[at], region, max_size)
        return [pixels[at] for at in places]

    def source_pixels(
        self,
        key: str,
        data: bytes,
        *,
        region: "Region | None" = None,
        max_size: int | None = None,
    ) -> npt.NDArray[np.uint8]:
        """What `read` gives for a row that keeps its source, from the bytes that `blob` gives.

        Raises ArchiveError when there is no such key, or the source gives no 8-bit picture,
        ValueError when the picture does not have the region.
        """
        return self._source_pixels(self._at(key), data, region, max_size)

    @property
    def codec(self) -> "Codec":
        """The codec with the model inside the archive, loaded on first use.

        Raises ArchiveError when the archive has no model, DamagedArchiveError when the model is
        not the one that was written, WeightsError when this version cannot use it.
        """
        self._check_process()
        with self._lock:
            if self._codec is None:
                model_id = self.manifest.model_id
                if model_id is None:
                    raise ArchiveError(f"{self.name}: holds no model")
                self._codec = shared_codec(self._fs, self._root, model_id, self.device)
            return self._codec

    # --- inside ------------------------------------------------------------------------------

    def _decode(
        self,
        blobs: Sequence[bytes],
        region: "Region | None" = None,
        max_size: int | None = None,
    ) -> list[npt.NDArray[np.uint8]]:
        # Without a limit: these are the bytes that were committed, and `row` tells their size.
        return self.codec.decode(blobs, region=region, max_size=max_size, max_pixels=None)

    def _check_process(self) -> None:
        """After a fork the store's connections, and perhaps a held lock, are the parent's."""
        if self._pid != os.getpid():
            codec = self._codec
            self._connect()
            self._reset()
            self._codec = codec

    def _insertion(self, key: str) -> int:
        """The place of the first key that is not below this one."""
        keys = self._keys
        return bisect_left(range(len(keys)), key, key=lambda i: keys[i].as_py())

    def _position(self, key: str) -> int | None:
        at = self._insertion(key)
        return at if at < len(self) and self._keys[at].as_py() == key else None

    def _at(self, key: str) -> int:
        at = self._position(key)
        if at is None:
            raise ArchiveError(f"{self.name}: no photo {key!r}")
        return at

    def _entry(self, column: str, at: int) -> Any:
        return self.index[column][at].as_py()

    def _refuse_error(self, at: int) -> None:
        error = self._entry("error", at)
        if error is not None:
            raise ArchiveError(f"{self._entry('key', at)}: {error}")

    def _fetch(
        self, places: Sequence[int], *, with_blobs: bool = True, with_payloads: bool = True
    ) -> tuple[dict[int, bytes], dict[int, Payloads]]:
        """Blobs and payloads of these rows of the index, checked; every range in one request."""
        self._check_process()
        unique = sorted(set(places))
        columns = ["part", "key", "sha256", "offset", "length", "metadata_crc32"]
        columns += [f"{name}_{what}" for name in _PAYLOADS for what in ("offset", "length")]
        rows = dict(
            zip(
                unique,
                self.index.select(columns).take(pa.array(unique, pa.int64())).to_pylist(),
                strict=True,
            )
        )
        wanted: dict[tuple[int, str], _Span] = {}
        for at, row in rows.items():
            path = join(self._root, row["part"])
            names = [("", with_blobs), *((f"{name}_", with_payloads) for name in _PAYLOADS)]
            for prefix, asked in names:
                start, length = row[f"{prefix}offset"], row[f"{prefix}length"]
                if asked and start is not None and not self._known_anew(row["part"]):
                    wanted[at, prefix] = _Span(path, start, start + length)
        found = self._read_spans(wanted)
        blobs: dict[int, bytes] = {}
        payloads: dict[int, Payloads] = {}
        for at, row in rows.items():
            if with_blobs:
                data = found.get((at, ""))
                if data is None or hashlib.sha256(data).digest() != row["sha256"]:
                    data = self._blob_anew(row)
                blobs[at] = data
            if with_payloads:
                extra = Payloads(*(found.get((at, f"{name}_")) for name in _PAYLOADS))
                if not _payloads_fit(extra, row):
                    extra = self._payloads_anew(row)
                payloads[at] = extra
        return blobs, payloads

    def _read_spans(self, wanted: dict[tuple[int, str], _Span]) -> dict[tuple[int, str], bytes]:
        """The bytes of each span that can be read; those that cannot are left out."""
        spans = list({span for span in wanted.values() if span.end > span.start})
        gap = _GAP_BYTES if len({at for at, _ in wanted}) > 1 else 0
        blocks: dict[str, tuple[list[int], list[bytes]]] = {}
        if spans:
            paths, starts, ends = merge_offset_ranges(
                [span.path for span in spans],
                [span.start for span in spans],
                [span.end for span in spans],
                max_gap=gap,
                max_block=_BLOCK_BYTES,
            )
            with store_errors(self._fs, self._root):
                answers = read_ranges(self._fs, paths, starts, ends)
            for path, start, answer in zip(paths, starts, answers, strict=True):
                if isinstance(answer, FileNotFoundError):
                    raise self._missing(path) from answer
                if isinstance(answer, Exception):
                    # A range past the end of a shorter file is an error in some stores: whether
                    # it is one, `_part` finds out, or raises what keeps the store from reading.
                    continue
                begun, data = blocks.setdefault(path, ([], []))
                begun.append(start)
                data.append(answer)
        for path, (begun, data) in blocks.items():
            order = sorted(range(len(begun)), key=begun.__getitem__)
            blocks[path] = ([begun[i] for i in order], [data[i] for i in order])
        found: dict[tuple[int, str], bytes] = {}
        for name, span in wanted.items():
            if span.end == span.start:
                found[name] = b""
            elif span.path in blocks:
                begun, data = blocks[span.path]
                block = bisect_left(begun, span.start + 1) - 1
                if block >= 0:
                    at = span.start - begun[block]
                    found[name] = data[block][at : at + span.end - span.start]
        return found

    # --- parts that are not as they were committed -------------------------------------------

    def _known_anew(self, part: str) -> bool:
        return part in self._parts and self._parts[part].places is not None

    def _part(self, name: str) -> _Part:
        """The part's footer, compared with the manifest's."""

        def described() -> _Part:
            path = join(self._root, name)
            try:
                footer = read_footer(self._fs, path, file_size(self._fs, path), name)
            except FileNotFoundError as error:
                raise self._missing(path) from error
            info = self._infos[name]
            if footer.sha256 == info.footer_sha256:
                return _Part(footer, None)
            if footer.offset + len(footer.data) == info.size:
                told = f"{shown(self._fs, path)}: footer: its SHA-256 does not fit"
                raise DamagedArchiveError(told)
            return _Part(footer, self._places(name, footer))

        def full() -> bool:
            return len(self._parts) > _CACHED_PARTS

        part: _Part = self._cached(self._parts, name, described, full)
        return part

    def _missing(self, path: str) -> DamagedArchiveError:
        return DamagedArchiveError(f"{shown(self._fs, path)}: the part is missing")

    def _places(self, name: str, footer: Footer) -> dict[str, tuple[int, int]]:
        """Row group and row of each key in a part that another tool has written anew."""
        places = {}
        for group in range(footer.metadata.num_row_groups):
            keys = self._read_group(name, footer, group, ["key"])["key"].to_pylist()
            places.update({key: (group, row) for row, key in enumerate(keys)})
        return places

    def _read_group(self, name: str, footer: Footer, group: int, columns: list[str]) -> pa.Table:
        file = RangeFile(self._fs, join(self._root, name), footer.offset + len(footer.data))
        try:
            file.prefetch(column_ranges(footer.metadata, group, columns))
            parquet = pq.ParquetFile(
                file, metadata=footer.metadata, pre_buffer=False, page_checksum_verification=True
            )
            table = parquet.read_row_group(group, columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DamagedArchiveError(f"{name}: column: {error}") from error
        if missing := set(columns) - set(table.column_names) - {"image.bytes"}:
            raise DamagedArchiveError(f"{name}: column: {sorted(missing)[0]} is missing")
        return table

    def _value(self, name: str, key: str, column: str) -> Any:
        """A value of a part written anew, by way of its row group. None when it is not there."""
        part = self._part(name)
        if part.places is None or key not in part.places:
            return None
        group, row = part.places[key]

        def values() -> pa.ChunkedArray:
            if column != "image.bytes":
                return self._read_group(name, part.footer, group, [column])[column]
            image = self._read_group(name, part.footer, group, ["image.bytes"])["image"]
            return pa.chunked_array([chunk.field("bytes") for chunk in image.chunks])

        def full() -> bool:
            return len(self._tables) > _CACHED_TABLES

        return self._cached(self._tables, (name, group, column), values, full)[row].as_py()

    def _blob_anew(self, row: dict[str, Any]) -> bytes:
        """A blob whose bytes are not at the index's range any more, or a DamagedArchiveError."""
        name, key = row["part"], row["key"]
        damaged = DamagedArchiveError(f"{name}: photo {key}: its SHA-256 does not fit")
        try:
            data = self._value(name, key, "image.bytes")
        except DamagedArchiveError as error:
            raise damaged from error
        if data is None or hashlib.sha256(data).digest() != row["sha256"]:
            raise damaged
        return bytes(data)

    def _payloads_anew(self, row: dict[str, Any]) -> Payloads:
        name, key = row["part"], row["key"]
        damaged = DamagedArchiveError(
            f"{name}: photo {key}: the checksum of its EXIF, XMP and ICC does not fit"
        )
        try:
            extra = Payloads(*(self._value(name, key, column) for column in _PAYLOADS))
        except DamagedArchiveError as error:
            raise damaged from error
        if not _payloads_fit(extra, row):
            raise damaged
        return extra

    def _info(self, at: int) -> RowInfo:
        self._check_process()
        name, key = self._entry("part", at), self._entry("key", at)
        part = self._part(name)
        group, row = self._entry("row_group", at), self._entry("row", at)
        if part.places is not None:
            if key not in part.places:
                raise DamagedArchiveError(f"{name}: row {key} is missing")
            group, row = part.places[key]

        def infos() -> list[RowInfo]:
            return to_infos(self._read_group(name, part.footer, group, INFO_COLUMNS))

        def full() -> bool:
            return sum(map(len, self._groups.values())) > _CACHED_ROWS

        info: RowInfo = self._cached(self._groups, (name, group), infos, full)[row]
        return info

    def _cached(
        self,
        cache: OrderedDict[Any, Any],
        key: Any,
        make: Callable[[], Any],
        full: Callable[[], bool],
    ) -> Any:
        """A value of a cache that drops those not used for longest when it is too `full`."""
        with self._lock:
            if key not in cache:
                cache[key] = make()
                while len(cache) > 1 and full():
                    cache.popitem(last=False)
            cache.move_to_end(key)
            return cache[key]

    # --- kept sources ------------------------------------------------------------------------

    def _open_source(self, at: int, data: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception as error:  # each of Pillow's formats has errors of its own
            raise self._undecoded(at, error) from error
        return image

    def _source_pixels(
        self, at: int, data: bytes, region: "Region | None", max_size: int | None
    ) -> npt.NDArray[np.uint8]:
        from vaestream.codec.view import see

        try:
            pixels = images.decode_kept(data, name=self._entry("key", at))
        except ArchiveError as error:
            raise self._undecoded(at, error.__cause__ or error) from error
        return see(pixels, region=region, max_size=max_size)

    def _undecoded(self, at: int, error: BaseException) -> ArchiveError:
        key, why = self._entry("key", at), str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # which says no more than that
            with suppress(VaestreamError):
                why = self._info(at).reason or why
        return ArchiveError(f"{key}: kept as its source, which does not decode: {why}")


def open_archive(
    url: str | os.PathLike[str],
    *,
    device: str = "auto",
    storage_options: dict[str, Any] | None = None,
) -> Archive:
    """Open the archive at a path or any fsspec URL.

    device: where photos are decoded: "auto", "cpu", "cuda". storage_options: for the store, as
    fsspec takes them; no message shows them. Raises ArchiveError when there is no finished archive
    or one that a later version wrote, DamagedArchiveError when its manifest is damaged.
    """
    return Archive(url, device=device, storage_options=storage_options)


@lru_cache(maxsize=4)
def shared_codec(fs: fsspec.AbstractFileSystem, root: str, model_id: str, device: str) -> "Codec":
    """`load_codec`, one for all in this process that want the same: pickled archives, say."""
    return load_codec(fs, root, model_id, device=device)


def load_codec(
    fs: fsspec.AbstractFileSystem, root: str, model_id: str, *, device: str = "auto"
) -> "Codec":
    """The codec with a model that lies in folder `root`.

    Raises DamagedArchiveError when it is not there, or not the one that was written, WeightsError
    when this version cannot use it.
    """
    from vaestream.codec import Codec

    path = model_path(root, model_id)
    try:
        data = read_bytes(fs, path)
    except FileNotFoundError as error:
        raise DamagedArchiveError(f"{shown(fs, path)}: the model is missing") from error
    if hashlib.sha256(data).hexdigest() != model_id:
        raise DamagedArchiveError(f"{shown(fs, path)}: model: its SHA-256 is not its name")
    try:
        return Codec.of(data, device=device)
    except WeightsError as error:
        raise WeightsError(f"{shown(fs, path)}: {error}") from error


def _payloads_fit(extra: Payloads, row: dict[str, Any]) -> bool:
    values = (extra.exif, extra.xmp, extra.icc)
    lengths = [None if value is None else len(value) for value in values]
    return (
        lengths == [row[f"{name}_length"] for name in _PAYLOADS]
        and metadata_crc32(*values) == row["metadata_crc32"]
    )
