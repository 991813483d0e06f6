"""WebP, BMP, AVIF, JPEG 2000 and the netpbm formats.

Sources: RFC 9649, ISO 14496-12 (boxes), AV1-ISOBMFF (av1C), ITU-T T.800, the netpbm manual.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace

from vaestream.images.containers.container import (
    AFTER_PICTURE,
    NO_PROFILE,
    TRAILER_BYTES,
    Container,
    bits_reason,
    is_srgb,
)

_PPM_HEADER = 4096
_BMP_RARE = "bit layout this reader does not know"


def walk_webp(data: bytes) -> Container:
    """The outside of a WebP."""
    kind = data[12:16]
    if kind == b"VP8X":
        size = (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    else:
        width, height = struct.unpack_from("<HH", data, 26)
        size = (width & 0x3FFF, height & 0x3FFF)
    held = 8 + int.from_bytes(data[4:8], "little")
    error = "file is truncated" if len(data) < held else None
    reason = AFTER_PICTURE if len(data) - held > TRAILER_BYTES else None
    return Container("WEBP", size, reason, error)


def walk_bmp(data: bytes) -> Container:
    """The outside of a BMP: its size, and whether it is sound but of a kind that Pillow refuses."""
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        return Container("BMP", struct.unpack_from("<HH", data, 18))
    width, height, planes, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    profile = header == 124 and data[70:74] in (b"DEBM", b"KNIL")  # embedded, or linked to
    reason = "colour profile that Pillow does not hand out" if profile else None
    container = Container("BMP", (abs(width), abs(height)), reason)
    sound = header in (40, 52, 56, 64, 108, 124) and planes == 1
    told = (bits == 2 and packing == 0) or (bits in (16, 32) and packing == 3)
    if sound and told and not _bmp_is_common(data, header, bits):
        return replace(container, reason=_BMP_RARE)
    return container


def _bmp_is_common(data: bytes, header: int, bits: int) -> bool:
    """Whether the channel masks are 8 bits wide or those of 15- and 16-bit RGB."""
    if bits == 2:
        return False
    masks = struct.unpack_from("<III", data, 54)
    alpha = struct.unpack_from("<I", data, 66)[0] if header >= 56 else 0
    if bits == 16:
        return alpha == 0 and masks in ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F))
    return all(mask in (0xFF << shift for shift in (0, 8, 16, 24)) for mask in masks)


def walk_avif(data: bytes) -> Container:
    """The outside of an AVIF."""
    head = data[: 1 << 16]
    reason = None
    at = head.find(b"av1C")
    if at >= 0 and head[at + 6] & 0x40:
        reason = bits_reason(12 if head[at + 6] & 0x20 else 10)
    at = head.find(b"colrnclx")
    if at >= 0 and b"colrprof" not in head:
        primaries, transfer = struct.unpack_from(">HH", head, at + 8)
        if not is_srgb(primaries, transfer):
            reason = reason or NO_PROFILE
    if b"tmap" in head:
        reason = "gain map"
    return Container("AVIF", None, reason)


def walk_jpeg2000(data: bytes) -> Container:
    """The outside of a JPEG 2000 stream or file."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0:
        return Container("JPEG2000")
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
    (channels,) = struct.unpack_from(">H", data, at + 40)
    bits = max(
        ((depth & 0x7F) + 1 for depth in data[at + 42 : at + 42 + 3 * channels : 3]), default=8
    )
    boxes = data[:at]
    reason = None
    if bits > 8:
        reason = bits_reason(bits)
    elif b"uuid" in boxes or b"xml " in boxes or _has_profile(boxes):
        reason = "JPEG 2000 metadata"  # that Pillow does not hand out
    return Container("JPEG2000", (max(0, right - left), max(0, bottom - top)), reason)


def _has_profile(boxes: bytes) -> bool:
    """Whether a JPEG 2000 file states another colour space than sRGB, gray or sYCC."""
    known = {b"\x01" + space.to_bytes(4) for space in (16, 17, 18)}
    at = boxes.find(b"colr")
    while at >= 0:
        method, space = boxes[at + 4 : at + 5], boxes[at + 7 : at + 11]
        if method + space not in known:
            return True
        at = boxes.find(b"colr", at + 4)
    return False


def walk_ppm(data: bytes) -> Container:
    """The outside of a PPM, PGM or PBM."""
    head = re.sub(rb"#[^\r\n]*", b"", data[:_PPM_HEADER]).split(None, 4)
    try:
        numbers = [int(token) for token in head[1:4]]
    except ValueError:
        return Container("PPM")
    size = (numbers[0], numbers[1])
    reason = None
    if head[0] in (b"P2", b"P3", b"P5", b"P6") and numbers[2] > 255:
        reason = bits_reason(16)
    elif head[0] in (b"P5", b"P6"):
        held = size[0] * size[1] * (3 if head[0] == b"P6" else 1)
        if len(data) - held > _PPM_HEADER:
            reason = AFTER_PICTURE  # another picture, say
    return Container("PPM", size, reason)
