"""What is told of a file whatever its format."""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN_FORMAT = "not a format this reader knows"
# Makers end their files with short records of their own (Samsung's time stamp: 67 bytes). What is
# longer is a video, a sound or another picture.
TRAILER_BYTES = 1 << 16
AFTER_PICTURE = "data after the picture"
NO_PROFILE = "colour space that no ICC profile states"

INFO_TYPES: dict[str, type | tuple[type, ...]] = {
    "exif": bytes,
    "icc_profile": bytes,
    "interlace": int,
    "transparency": (bytes, int, tuple),
    "xmp": bytes,
}
"""What Pillow's readers keep in `image.info` and rely on. A PNG's notes are there, too, by name."""


@dataclass(frozen=True, slots=True)
class Container:
    """The outside of one image file.

    Attributes:
        format: Pillow's name of the format.
        size: claimed (width, height) in pixels before orientation, None where only the decoder
            can tell.
        reason: why 8-bit pixels, EXIF, XMP and ICC would not be all there is to this file.
        error: damage that decoders overlook, or that makes decoding pointless.
        exif: JPEG only, EXIF payload with its ``Exif\\0\\0`` prefix.
        exif_at: JPEG only, where those prefixes begin in the file.
    """

    format: str
    size: tuple[int, int] | None = None
    reason: str | None = None
    error: str | None = None
    exif: bytes | None = None
    exif_at: tuple[int, ...] = ()


def bits_reason(bits: int) -> str:
    """The reason to keep a source with more than 8 bits per channel."""
    return f"{bits} bits per channel"


def is_srgb(primaries: int, transfer: int) -> bool:
    """Whether ITU-T H.273 code points say sRGB, its video sibling BT.709, or nothing."""
    return primaries in (1, 2) and transfer in (1, 2, 6, 13)
