"""What an image file says about itself before any decoder runs.

Decoders answer "which pixels?". Whether a file can be replaced by 8-bit pixels, EXIF, XMP and an
ICC profile is another question, and Pillow hides parts of the answer: it scales 16-bit PNG, TIFF,
PPM and JPEG 2000 to 8 bits, shows the preview of a raw file as its picture, and leaves out gain
maps, extended XMP and whatever follows the picture. So the containers are walked here, in
a module for each family: its `walk_...` raises struct.error or IndexError where it cannot follow.
"""

from __future__ import annotations

import re
import struct
from pathlib import PurePosixPath

from vaestream.images.containers.container import INFO_TYPES, UNKNOWN_FORMAT, Container, bits_reason
from vaestream.images.containers.jpeg import EXIF_PREFIX, walk_jpeg
from vaestream.images.containers.others import (
    walk_avif,
    walk_bmp,
    walk_jpeg2000,
    walk_ppm,
    walk_webp,
)
from vaestream.images.containers.png import PNG_MAGIC, walk_png
from vaestream.images.containers.tiff import byte_order, ifd, walk_tiff

__all__ = [
    "EXIF_PREFIX",
    "INFO_TYPES",
    "UNKNOWN_FORMAT",
    "Container",
    "bits_reason",
    "byte_order",
    "claimed_format",
    "identify",
    "ifd",
    "inspect",
    "is_foreign",
]

_SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".j2c"), "JPEG2000"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".avif": "AVIF",
    ".tga": "TGA",
}
# Raw files are TIFF inside: read as such, their preview would pass for the photo.
_RAW_SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos"),
    *(".nef", ".nrw", ".orf", ".pef", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw"),
)
# Whole files of other kinds that often carry the wrong suffix: not damage, only unknown here.
_FOREIGN = re.compile(
    rb"....ftyp|8BPS|%PDF|%!PS|\xff\x0a|\0\0\0\x0cJXL |\0\0[\x01\x02]\0|RIFF|\x1aE\xdf\xa3"
    rb"|PK\x03\x04|qoif",
    re.DOTALL,
)


def claimed_format(name: str) -> str | None:
    """The format that a file's name promises, None for names that promise no image."""
    return _SUFFIXES.get(PurePosixPath(name).suffix.lower())


def identify(data: bytes, name: str) -> str | None:
    """The format whose signature `data` begins with, or None.

    TGA has no signature and is known by its name alone.
    """
    if PurePosixPath(name).suffix.lower() in _RAW_SUFFIXES:
        return None
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(PNG_MAGIC):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data[:2] == b"BM" and (claimed_format(name) == "BMP" or data[15:18] == b"\0\0\0"):
        return "BMP"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4]), 256)]
        return "AVIF" if b"avif" in brands or b"avis" in brands else None
    if data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "JPEG2000"
    if re.match(rb"P[1-6]\s*(#|\s\d)", data):
        return "PPM"
    if data and claimed_format(name) == "TGA":
        return "TGA"
    return None


def is_foreign(data: bytes) -> bool:
    """Whether `data` begins like a whole file of some other, known kind."""
    return _FOREIGN.match(data) is not None


def inspect(data: bytes, image_format: str) -> Container:
    """Walk the container. Never raises for bad data: what cannot be followed is the decoder's."""
    walk = {
        "JPEG": walk_jpeg,
        "PNG": walk_png,
        "WEBP": walk_webp,
        "TIFF": walk_tiff,
        "BMP": walk_bmp,
        "AVIF": walk_avif,
        "JPEG2000": walk_jpeg2000,
        "PPM": walk_ppm,
    }.get(image_format)
    if walk is None:
        return Container(image_format)
    try:
        return walk(data)
    except (struct.error, IndexError):
        return Container(image_format)
