"""Pixels and their metadata as Pillow images and image files."""

from __future__ import annotations

from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from vaestream.images.metadata import with_prefix
from vaestream.images.pixels import Pixels


def to_image(
    pixels: Pixels,
    *,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    icc: bytes | None = None,
) -> Image.Image:
    """A Pillow image with its metadata where Pillow's own readers put it (``image.info``).

    Args:
        pixels: uint8, (height, width, 3) or (height, width).
        exif, xmp, icc: as in `Photo`.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for key, value in (("exif", exif), ("xmp", xmp), ("icc_profile", icc)):
        if value is not None:
            image.info[key] = value
    return image


def save(
    image: Pixels | Image.Image,
    target: BinaryIO,
    format: Literal["png", "jpeg", "webp"],
    *,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    icc: bytes | None = None,
) -> None:
    """Write an image file with its metadata.

    PNG is lossless, JPEG (quality 95, chroma not subsampled) and WebP (quality 95) are not; WebP
    has no gray. What `image` carries in ``image.info`` is written only where it is passed on.

    Raises:
        ValueError: JPEG has no room for this EXIF or XMP (64 KiB each).
    """
    if not isinstance(image, Image.Image):
        image = to_image(image)
    options: dict[str, Any] = {}
    if format == "jpeg":
        options.update(quality=95, subsampling="4:4:4")
    elif format == "webp":
        options.update(quality=95)
    if (prefixed := with_prefix(exif)) is not None:
        options["exif"] = prefixed
    # PNG falls back on image.info where it is not given; the others do not.
    options["icc_profile"] = icc
    if xmp is not None and format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp)
        options["pnginfo"] = chunks
    elif xmp is not None:
        options["xmp"] = xmp
    image.save(target, format.upper(), **options)
