"""One source object -> one row of the archive, whatever the object turns out to be."""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vaestream import images
from vaestream.archive.schema import MAX_SIDE, Row
from vaestream.codec import Codec, Encoded
from vaestream.codec.metrics import psnr
from vaestream.errors import VaestreamError
from vaestream.pipeline.fetch import Fetched
from vaestream.pipeline.plan import SourceObject
from vaestream.text import describe

Verify = Literal["none", "sample", "all"]

_SAMPLE_OF = 16
_PSNR_TOLERANCE = 0.01

_log = logging.getLogger(__name__)

_Loaded = images.Photo | images.Kept | images.Broken


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides an archive's rows, apart from the sources and the model.

    One of quality (0 to 100), target_bpp (bits per pixel) and target_psnr (dB) is given, the others
    are None. min_psnr: dB below which the source is kept, None
    where it follows the quality that each photo was given. max_pixels: a picture of more is refused
    as a decompression bomb. effort: gradient steps that refine each photo's latents.
    """

    quality: float | None
    target_bpp: float | None
    target_psnr: float | None
    min_psnr: float | None
    max_pixels: int
    effort: int = 0

    @classmethod
    def of(
        cls,
        *,
        quality: float | None = None,
        target_bpp: float | None = None,
        target_psnr: float | None = None,
        min_psnr: float | None = None,
        max_pixels: int = 256_000_000,
        effort: int = 0,
    ) -> "Settings":
        """Check what a user has asked for and fill in what is open.

        With nothing said, quality is 50. The default of min_psnr keeps screenshots and text from
        being spoilt, yet lies below what photos reach: it follows the quality (`default_floor`),
        and stays 1 dB below a target of PSNR. Errors: VaestreamError for numbers without sense.
        """
        given = [value for value in (quality, target_bpp, target_psnr) if value is not None]
        if len(given) > 1:
            raise VaestreamError("quality, target bpp and target PSNR exclude each other")
        if not given:
            quality = 50.0
        if quality is not None and not 0 <= quality <= 100:
            raise VaestreamError(f"quality must lie between 0 and 100, not at {quality:g}")
        for name, value in (("target bpp", target_bpp), ("target PSNR", target_psnr)):
            if value is not None and not 0 < value < float("inf"):
                raise VaestreamError(f"{name} must be a positive number, not {value:g}")
        if min_psnr is not None and not math.isfinite(min_psnr):
            raise VaestreamError(f"min PSNR must be a number, not {min_psnr:g}")
        if max_pixels < 1:
            raise VaestreamError(f"max pixels must be at least 1, not {max_pixels}")
        if effort < 0:
            raise VaestreamError(f"effort must be 0 or more, not {effort}")
        if min_psnr is None:
            if target_psnr is not None:
                min_psnr = min(default_floor(100), target_psnr - 1.0)
            elif quality is not None:
                min_psnr = default_floor(quality)
        return cls(
            None if quality is None else float(quality),
            target_bpp,
            target_psnr,
            None if min_psnr is None else float(min_psnr),
            max_pixels,
            effort,
        )

    def floor(self, quality: float) -> float:
        """dB below which a photo coded at `quality` is kept as its source."""
        return default_floor(quality) if self.min_psnr is None else self.min_psnr

    def encode(self, codec: Codec, pixels: NDArray[np.uint8]) -> Encoded:
        """A picture as these settings want it, its PSNR measured."""
        return codec.compress(
            pixels,
            quality=self.quality,
            target_bpp=self.target_bpp,
            target_psnr=self.target_psnr,
            effort=self.effort,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, as they go into the manifest and into the names of parts."""
        numbers = asdict(self)
        if not self.effort:
            del numbers["effort"]  # so that archives from before there was a choice go on
        return numbers


def default_floor(quality: float) -> float:
    """18 dB at quality 0, rising to 28 dB at quality 50 and from there on."""
    return min(28.0, 18.0 + quality / 5.0)


class Compressor:
    """Makes rows. It never raises for what an object holds: that ends in the row. Errors:
    VaestreamError where the device fails.

    verify: how many of the written bitstreams are decoded again, and the source kept where the
    result is not what the encoder has promised: none, about one in sixteen (chosen by the source's
    hash), or all.
    """

    def __init__(self, codec: Codec, settings: Settings, verify: Verify = "sample") -> None:
        self._codec, self._settings, self._verify = codec, settings, verify

    def rows(self, fetched: Iterable[Fetched]) -> Iterator[Row]:
        """The rows of objects, in their order.

        Another thread reads the next file into pixels while the codec works; with the threads that
        fetch and the codec's own, that is all that can overlap in one process, as the entropy coder
        keeps Python's lock.
        """
        ahead: deque[tuple[Fetched, Future[_Loaded] | None]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            for got in fetched:
                loading = None if got.data is None else pool.submit(self._load, got.item, got.data)
                ahead.append((got, loading))
                if len(ahead) > 1:
                    yield self._row_of(*ahead.popleft())
            while ahead:
                yield self._row_of(*ahead.popleft())

    def row(self, item: SourceObject, data: bytes) -> Row:
        """The row of an object whose bytes are `data`."""
        (row,) = self.rows([Fetched(item, data)])
        return row

    def _row_of(self, got: Fetched, loading: Future[_Loaded] | None) -> Row:
        item, data = got.item, got.data
        if data is None or loading is None:
            return unread(got)
        try:
            try:
                return self._row(item, data, loading.result())
            except torch.OutOfMemoryError:
                # Of a GPU: other workers there may need less a moment later.
                torch.cuda.empty_cache()
                return self._row(item, data, loading.result())
        except Exception as error:
            # The one place that catches all: a surprise in one of a million photos costs that
            # photo's row its compression, not the job.
            _log.warning("%s: kept as it is", item.url, exc_info=True)
            self._check_codec()
            return failed(item, data, f"cannot be compressed: {describe(error)}")

    def _check_codec(self) -> None:
        """Raise VaestreamError where not even the plainest picture can be compressed any longer: a
        GPU that has failed once may fail for all that follows."""
        try:
            self._settings.encode(self._codec, np.zeros((64, 64, 3), np.uint8))
        except Exception as error:
            raise VaestreamError(
                f"device {self._codec.device}: nothing can be compressed there any longer: "
                f"{describe(error)}"
            ) from error

    def _load(self, item: SourceObject, data: bytes) -> _Loaded:
        return images.load(data, name=item.key, max_pixels=self._settings.max_pixels)

    def _row(self, item: SourceObject, data: bytes, loaded: _Loaded) -> Row:
        if not isinstance(loaded, images.Photo):
            return kept(
                item,
                data,
                error=loaded.error if isinstance(loaded, images.Broken) else None,
                reason=loaded.reason if isinstance(loaded, images.Kept) else None,
                source_format=loaded.format,
                width=loaded.width,
                height=loaded.height,
            )
        height, width = loaded.pixels.shape[:2]
        encoded = self._settings.encode(self._codec, loaded.pixels)
        metadata = sum(len(part or b"") for part in (loaded.exif, loaded.xmp, loaded.icc))
        reason = None
        if len(encoded.data) + metadata >= len(data):
            reason = "no smaller than the source"
        elif encoded.psnr is not None and encoded.psnr < self._settings.floor(encoded.quality):
            reason = "below the PSNR floor"
        elif is_verified(data, self._verify) and not self._decodes(encoded, loaded):
            _log.error("%s: the bitstream does not decode to what was encoded", item.url)
            reason = "failed verification"
        if reason is not None:
            return kept(
                item,
                data,
                reason=reason,
                source_format=loaded.format,
                width=width,
                height=height,
            )
        return Row(
            data=encoded.data,
            codec="vae",
            width=width,
            height=height,
            channels=1 if loaded.pixels.ndim == 2 else 3,
            quality=encoded.quality,
            psnr=encoded.psnr,
            source_format=loaded.format,
            exif=loaded.exif,
            xmp=loaded.xmp,
            icc=loaded.icc,
            **_source(item, data),
        )

    def _decodes(self, encoded: Encoded, photo: images.Photo) -> bool:
        (decoded,) = self._codec.decode([encoded.data], max_pixels=None)
        if decoded.shape != photo.pixels.shape:
            return False
        if encoded.psnr is None:
            return True
        return math.isclose(
            psnr(photo.pixels, decoded), encoded.psnr, rel_tol=0, abs_tol=_PSNR_TOLERANCE
        )


def is_verified(data: bytes, verify: Verify) -> bool:
    """Whether what is made of a source of these bytes is decoded again."""
    if verify == "sample":
        return hashlib.sha256(data).digest()[0] % _SAMPLE_OF == 0
    return verify == "all"


def kept(
    item: SourceObject,
    data: bytes,
    *,
    width: int | None = None,
    height: int | None = None,
    **what: Any,
) -> Row:
    """A row that keeps the source's bytes; `what`: further fields of Row, reason or error."""
    # A damaged header may claim any size.
    width, height = (side if side and 0 < side <= MAX_SIDE else None for side in (width, height))
    return Row(data=data, codec="source", width=width, height=height, **what, **_source(item, data))


def failed(item: SourceObject, data: bytes | None, error: str) -> Row:
    """The row of an object that cannot be handled; None where not even its bytes are to be had,
    and then the row tells the size that the store has told."""
    if data is not None:
        return kept(item, data, error=error)
    listed = {
        "source_size": item.version.size or 0,
        "source_mtime": item.version.mtime,
        "source_etag": item.version.etag,
    }
    return Row(data=b"", codec="source", error=error, **(_source(item, b"") | listed))


def unread(got: Fetched) -> Row:
    """The row of an object that could not be fetched."""
    return failed(got.item, None, got.error or "cannot be read")


def _source(item: SourceObject, data: bytes) -> dict[str, Any]:
    # An object of another size than listed has changed since: its time and ETag are not known.
    listed = item.version.size in (None, len(data))
    return {
        "key": item.key,
        "source_size": len(data),
        "source_mtime": item.version.mtime if listed else None,
        "source_url": item.url,
        "source_etag": item.version.etag if listed else None,
        "source_sha256": hashlib.sha256(data).hexdigest(),
    }
