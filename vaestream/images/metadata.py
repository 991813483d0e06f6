"""EXIF, XMP and ICC: what of them is carried, and how pixels become upright."""

from __future__ import annotations

import re

from PIL import Image, TiffImagePlugin

from vaestream.images.containers import EXIF_PREFIX, INFO_TYPES, byte_order, ifd

ORIENTATION = 0x0112
"""The tag of EXIF."""
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([0-9])")

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns the pixels upright, by the orientation's value; none for 1."""

# TIFF tags that describe the photo and that EXIF has room for: names and dates, resolution, the
# author and the copyright, what Windows writes, the EXIF and GPS directories.
_TIFF_DESCRIPTION = frozenset(
    (269, 270, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853)
) | frozenset(range(40091, 40096))
# TIFF tags that describe the file, or that are carried elsewhere (XMP, IPTC, ICC), or Photoshop's.
_TIFF_LAYOUT = (
    *(*range(254, 260), *range(262, 267), 273, 274, *range(277, 282), 284, *range(286, 294), 297),
    *(301, *range(317, 326), 338, 339, 347, *range(529, 533), 700, 33723, 34377, 34675),
)


def forget_odd(image: Image.Image) -> bool:
    """Forget what only passes for metadata: Pillow's own readers stumble over it. Whether there was
    any. Tags of a TIFF may have any type, and a PNG's notes any name."""
    found = {key: (image.info.get(key), kind) for key, kind in INFO_TYPES.items()}
    odd = [key for key, (one, kind) in found.items() if not (one is None or isinstance(one, kind))]
    for key in odd:
        del image.info[key]
    return bool(odd)


def profile_fits(icc: bytes | None, mode: str) -> bool:
    """Whether a profile's colour space (bytes 16 to 20, ICC.1 7.2.6) is that of the pixels.

    None is what Pillow makes of a profile in pieces. What is no profile at all changes no colour
    and is carried as it is.
    """
    if icc is None:
        return False
    if icc[36:40] != b"acsp":
        return True
    return icc[16:20] == b"RGB " or (mode == "L" and icc[16:20] == b"GRAY")


def with_prefix(exif: bytes | None) -> bytes | None:
    """EXIF as Pillow's `save` takes it, None for none."""
    if not exif:
        return None
    return exif if exif.startswith(EXIF_PREFIX) else EXIF_PREFIX + exif


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int:
    """EXIF's word first, else XMP's, else 1; as Pillow and browsers take it."""
    values = [entry.value for entry in ifd(_tiff_of(exif)) if entry.tag == ORIENTATION]
    if values:
        return values[-1] or 1
    match = _XMP_ORIENTATION.search(xmp or b"")
    return int(match[1]) if match else 1


def set_upright(exif: bytes | None, xmp: bytes | None) -> tuple[bytes | None, bytes | None]:
    """The same metadata with orientation 1, all other bytes and all lengths unchanged."""
    if exif is not None:
        tiff = _tiff_of(exif)
        little = byte_order(tiff) == "<"
        patched = bytearray(exif)
        for entry in ifd(tiff):
            if entry.tag == ORIENTATION and entry.value is not None:
                at = len(exif) - len(tiff) + entry.at
                value = (1).to_bytes(entry.width, "little" if little else "big")
                patched[at : at + entry.width] = value
        exif = bytes(patched)
    if xmp is not None:
        xmp = _XMP_ORIENTATION.sub(lambda match: match[0][:-1] + b"1", xmp)
    return exif, xmp


def _tiff_of(exif: bytes | None) -> bytes:
    tiff = exif or b""
    while tiff.startswith(EXIF_PREFIX):
        tiff = tiff[len(EXIF_PREFIX) :]
    return tiff


def tiff_tags_have_a_place(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether EXIF, XMP, the ICC profile and the pixels say all that the tags of a TIFF do."""
    return set(image.tag_v2) <= _TIFF_DESCRIPTION.union(_TIFF_LAYOUT)


def tiff_exif(image: TiffImagePlugin.TiffImageFile) -> bytes | None:
    """A TIFF's own tags are its EXIF: those that describe the photo, written anew."""
    exif = image.getexif()
    for tag in set(exif) - _TIFF_DESCRIPTION:
        del exif[tag]
    return with_prefix(exif.tobytes()) if len(exif) else None
