"""Photos of low PSNR, small, and where they differ most from their sources."""

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vaestream import images
from vaestream.archive.reader import Archive
from vaestream.errors import VaestreamError
from vaestream.pipeline.report.sources import SourcesAgain

_MAX_PIXELS = 64_000_000
_SIDE, _CROP, _REGION = 320, 144, 512
_WHOLE_PIXELS = 2_000_000
"""Photos of more are decoded small, with a region of them at full size."""
_PICTURE_BYTES = 22_000
_PROFILE_BYTES = 4096

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG to be shown, width and height in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class WorstPhoto:
    """A photo of low PSNR. psnr: dB. bpp: bits per pixel. width, height: pixels.

    decoded, source: thumbnails. decoded_crop, source_crop: pixels as they are, from where the two
    differ most. Where a picture is missing, decoded_note and source_note say why.
    """

    key: str
    psnr: float
    bpp: float
    quality: float | None
    width: int
    height: int
    num_bytes: int
    source_size: int
    decoded: Picture | None = None
    source: Picture | None = None
    decoded_crop: Picture | None = None
    source_crop: Picture | None = None
    decoded_note: str | None = None
    source_note: str | None = None


def look_at(archive: Archive, row: Mapping[str, Any], sources: SourcesAgain) -> WorstPhoto:
    """The photo with its pictures, as far as they are to be had."""
    pixels = row["width"] * row["height"]
    facts: dict[str, Any] = {
        name: row[name] for name in ("key", "psnr", "quality", "width", "height", "num_bytes")
    }
    facts |= {"source_size": row["source_size"], "bpp": 8 * row["num_bytes"] / pixels}
    if pixels > _MAX_PIXELS:
        note = f"not shown: more than {_MAX_PIXELS // 1_000_000} megapixels"
        return WorstPhoto(**facts, decoded_note=note, source_note=note)
    large = pixels > _WHOLE_PIXELS
    decoded: Pixels | None = None
    original: Pixels | None = None
    icc: bytes | None = None
    small: dict[str, Pixels] = {}
    try:
        codec, blob = archive.codec, archive.blob(row["key"])
        icc = archive.payloads([row["key"]])[0].icc
        (decoded,) = codec.decode([blob], max_size=_SIDE if large else None)
        small["decoded"] = _thumbnail(decoded)
    except VaestreamError as error:
        facts["decoded_note"] = f"cannot be decoded: {error}"
    data, facts["source_note"] = sources.read(row)
    if data is not None:
        try:
            loaded = images.load(data, name=row["key"], max_pixels=_MAX_PIXELS)
        except Exception as error:  # only a picture for the page: no reason to have none
            loaded = images.Broken(error=type(error).__name__)
        if isinstance(loaded, images.Photo):
            original = loaded.pixels
            small["source"] = _thumbnail(original)
        else:
            facts["source_note"] = "source is not read as a photo any more"
    facts |= zip(small, _jpegs(list(small.values()), icc), strict=True)
    if decoded is None or original is None:
        return WorstPhoto(**facts)
    if large:
        left, top, width, height = region = _busiest(original)
        original = original[top : top + height, left : left + width]
        with suppress(VaestreamError):  # a damaged tile: verify tells
            (decoded,) = codec.decode([blob], region=region)
    if decoded.shape == original.shape:
        left, top, right, bottom = _where_they_differ(original, decoded)
        if large or (right - left, bottom - top) != (decoded.shape[1], decoded.shape[0]):
            crops = [one[top:bottom, left:right] for one in (original, decoded)]
            facts["source_crop"], facts["decoded_crop"] = _jpegs(crops, icc)
    return WorstPhoto(**facts)


def _busiest(pixels: Pixels) -> tuple[int, int, int, int]:
    """Region (left, top, width, height) of `_REGION` pixels a side, or the picture's where that is
    less, with the most detail in every fourth pixel: there a codec errs most."""
    height, width = pixels.shape[:2]
    side = [min(_REGION, height), min(_REGION, width)]
    if min(side) < 8:
        return 0, 0, side[1], side[0]
    sparse = pixels[::4, ::4].reshape(-(-height // 4), -(-width // 4), -1)[..., :1].astype(np.int16)
    steps = np.abs(np.diff(sparse, axis=0))[:, :-1] + np.abs(np.diff(sparse, axis=1))[:-1]
    row, column = _largest_cell(steps, _REGION // 8)
    top, left = (
        max(0, min(size - own, at * (_REGION // 2) - own // 4))
        for size, own, at in zip((height, width), side, (row, column), strict=True)
    )
    return left, top, side[1], side[0]


def _where_they_differ(one: Pixels, other: Pixels) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of at most `_CROP` pixels a side where the mean difference
    is largest, over cells of a quarter of that."""
    height, width = one.shape[:2]
    cell = _CROP // 4
    if min(height, width) < cell:
        return 0, 0, min(width, _CROP), min(height, _CROP)
    row, column = _largest_cell(np.maximum(one, other) - np.minimum(one, other), cell)
    left = max(0, min(width - _CROP, column * cell - (_CROP - cell) // 2))
    top = max(0, min(height - _CROP, row * cell - (_CROP - cell) // 2))
    return left, top, min(width, left + _CROP), min(height, top + _CROP)


def _largest_cell(values: npt.NDArray[Any], side: int) -> tuple[int, int]:
    """Row and column, in cells of `side` x `side`, of the largest mean of values (H, W, ...); what
    does not fill a cell does not count."""
    tall, wide = (min(side, size) for size in values.shape[:2])
    rows, columns = values.shape[0] // tall, values.shape[1] // wide
    cells = values[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide, -1)
    row, column = divmod(int(cells.mean(axis=(1, 3, 4)).argmax()), columns)
    return row, column


def _thumbnail(pixels: Pixels) -> Pixels:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image)


def _jpegs(pictures: Sequence[Pixels], icc: bytes | None) -> list[Picture]:
    """As JPEGs of one quality, so that what differs is in the pictures, and each of at most
    `_PICTURE_BYTES`, which bounds the page."""
    profile = icc if icc is not None and len(icc) <= _PROFILE_BYTES else None
    found: list[Picture] = []
    for quality in (92, 85, 70, 50, 25, 5):
        found = [_jpeg(pixels, quality, profile) for pixels in pictures]
        if all(len(picture.data) <= _PICTURE_BYTES for picture in found):
            break
    return found


def _jpeg(pixels: Pixels, quality: int, icc: bytes | None) -> Picture:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(file, "JPEG", quality=quality, icc_profile=icc, subsampling=0)
    return Picture(file.getvalue(), image.width, image.height)
