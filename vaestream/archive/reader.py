"""Reading an archive: one photo, a batch, or the rows, without reading the rest."""

import hashlib
import io
import os
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from vaestream import images
from vaestream.archive.index import index_of, load_index
from vaestream.archive.manifest import Manifest, read_manifest
from vaestream.archive.models import shared_codec
from vaestream.archive.parts import PAYLOADS, Parts, Payloads
from vaestream.archive.schema import RowInfo
from vaestream.archive.spans import Span, read_spans
from vaestream.archive.storage import join, open_store
from vaestream.errors import ArchiveError, DamagedArchiveError, VaestreamError
from vaestream.urls import absolute, public_url

if TYPE_CHECKING:
    from vaestream.codec import Codec
    from vaestream.codec.view import Region

_GAP_BYTES = 16 << 10
"""Bytes worth reading in vain to save a request, where several photos are asked for."""


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
        self._parts = Parts(self._fs, self._root, self.manifest.parts)

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
        held = set(names.unique().to_pylist())
        parts = tuple(part for part in self.manifest.parts if part.name in held)
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
        # Of a key that is asked for twice, two arrays: what is done to one leaves the other alone.
        given: set[int] = set()
        found = []
        for at in places:
            found.append(pixels[at].copy() if at in given else pixels[at])
            given.add(at)
        return found

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
        columns += [f"{name}_{what}" for name in PAYLOADS for what in ("offset", "length")]
        rows = dict(
            zip(
                unique,
                self.index.select(columns).take(pa.array(unique, pa.int64())).to_pylist(),
                strict=True,
            )
        )
        wanted: dict[tuple[int, str], Span] = {}
        for at, row in rows.items():
            path = join(self._root, row["part"])
            names = [("", with_blobs), *((f"{name}_", with_payloads) for name in PAYLOADS)]
            for prefix, asked in names:
                start, length = row[f"{prefix}offset"], row[f"{prefix}length"]
                if asked and start is not None and not self._parts.is_known_anew(row["part"]):
                    wanted[at, prefix] = Span(path, start, start + length)
        gap = _GAP_BYTES if len(unique) > 1 else 0
        found = read_spans(self._fs, self._root, wanted, max_gap=gap)
        blobs: dict[int, bytes] = {}
        payloads: dict[int, Payloads] = {}
        for at, row in rows.items():
            if with_blobs:
                data = found.get((at, ""))
                if data is None or hashlib.sha256(data).digest() != row["sha256"]:
                    data = self._parts.blob(row)
                blobs[at] = data
            if with_payloads:
                extra = Payloads(*(found.get((at, f"{name}_")) for name in PAYLOADS))
                if not extra.fit(row):
                    extra = self._parts.payloads(row)
                payloads[at] = extra
        return blobs, payloads

    def _info(self, at: int) -> RowInfo:
        self._check_process()
        place = {name: self._entry(name, at) for name in ("part", "key", "row_group", "row")}
        return self._parts.info(place)

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
