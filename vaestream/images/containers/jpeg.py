"""JPEG. Sources: ITU-T T.81, CIPA DC-007 (multi-picture format), Adobe XMP part 3."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vaestream.images.containers.container import (
    AFTER_PICTURE,
    TRAILER_BYTES,
    Container,
    bits_reason,
)
from vaestream.images.containers.tiff import byte_order, ifd

EXIF_PREFIX = b"Exif\0\0"
# What decoders of Huffman-coded JPEG need at the very least: a bit for each block of 8x8.
_JPEG_PIXELS_PER_BYTE = 8 * 64


@dataclass(frozen=True, slots=True)
class _Segment:
    marker: int
    start: int  # of the payload
    payload: bytes


def _segments(data: bytes) -> Iterator[_Segment]:
    """The marker segments up to and with the first SOS; stray bytes between them are skipped."""
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            return
        marker = data[position + 1]
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8:
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4])
        start = position + 4
        yield _Segment(marker, start, data[start : position + 2 + length])
        if marker in (0xD9, 0xDA):
            return
        position += 2 + max(length, 2)


def walk_jpeg(data: bytes) -> Container:
    """The outside of a JPEG."""
    size: tuple[int, int] | None = None
    exif: bytes | None = None
    exif_at: list[int] = []
    pictures, previews_end, precision, process = 1, 0, 8, 0xC0
    has_xmp = has_extended_xmp = has_iptc = False
    end = len(data)
    for segment in _segments(data):
        marker, payload = segment.marker, segment.payload
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            process = marker
            precision, height, width = struct.unpack_from(">BHH", payload)
            size = (width, height)
        elif marker == 0xE1 and payload.startswith(EXIF_PREFIX):
            # EXIF beyond 64 KiB goes on in the next segment.
            exif = payload if exif is None else exif + payload[len(EXIF_PREFIX) :]
            exif_at.append(segment.start)
        elif marker == 0xE1 and payload.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            has_xmp = True
        elif marker == 0xE1 and payload.startswith(b"http://ns.adobe.com/xmp/extension/\0"):
            has_extended_xmp = True
        elif marker == 0xE2 and payload.startswith(b"MPF\0"):
            pictures, previews_end = _mpf_pictures(data, payload[4:], segment.start + 4)
        elif marker == 0xED and payload.startswith(b"Photoshop 3.0\0"):
            has_iptc = has_iptc or b"8BIM\x04\x04" in payload
        elif marker == 0xDA:
            end = _end_of_jpeg(data, segment.start + len(payload))

    trailer = data[max(end, previews_end) :]
    reason = error = None
    lossless = process == 0xC3
    if (precision == 12 and process != 0xC0) or (lossless and 8 < precision <= 16):
        reason = bits_reason(precision)
    elif process in (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF):
        reason = "hierarchical JPEG"
    elif pictures > 1 or b"\xff\xd8\xff" in trailer:
        reason = "gain map" if _has_gain_map(data) else "several pictures in one file"
    elif b"ftyp" in trailer:
        reason = "motion photo"
    elif len(trailer) > TRAILER_BYTES:
        reason = AFTER_PICTURE
    elif has_extended_xmp:
        reason = "extended XMP"
    elif has_iptc and not has_xmp:
        # With both, IPTC repeats what XMP says (as the Metadata Working Group asks for).
        reason = "IPTC without XMP"
    huffman = process in (0xC0, 0xC1, 0xC2)
    if huffman and size and size[0] * size[1] > _JPEG_PIXELS_PER_BYTE * len(data):
        error = f"{len(data)} bytes cannot hold the {size[0]}x{size[1]} pixels they claim"
    return Container("JPEG", size, reason, error, exif, tuple(exif_at))


def _end_of_jpeg(data: bytes, start: int) -> int:
    """Where the picture ends whose first scan begins at `start`.

    In coded data 0xFF is followed by 0 or a restart marker, so the first EOI is the end of it.
    """
    eoi = data.find(b"\xff\xd9", start)
    return len(data) if eoi < 0 else eoi + 2


def _mpf_pictures(data: bytes, tiff: bytes, at: int) -> tuple[int, int]:
    """Pictures of a multi-picture index that are worth keeping, and where its previews end.

    Most cameras append a preview of the photo, a "large thumbnail", which says nothing that the
    photo does not. `at`: where the index, `tiff`, lies in the file.
    """
    order = byte_order(tiff)
    entries = {entry.tag: entry for entry in ifd(tiff)}
    number, table = entries.get(0xB001), entries.get(0xB002)
    if order is None or number is None or number.value is None:
        return 1, 0
    if table is None or table.count != 16 * number.value or table.at + 4 > len(tiff):
        return number.value, 0
    (start,) = struct.unpack_from(order + "I", tiff, table.at)
    if start + table.count > len(tiff):
        return number.value, 0
    pictures, end = number.value, 0
    for place in range(start + 16, start + table.count, 16):  # the first is the photo itself
        attribute, size, offset = struct.unpack_from(order + "III", tiff, place)
        first, last = at + offset, at + offset + size
        if attribute & 0xFF0000 == 0x010000 and data[first:last].startswith(b"\xff\xd8"):
            if last > len(data):
                return number.value, 0  # an index that is wrong about one may be so about others
            pictures -= 1
            end = max(end, last)
    return pictures, end


def _has_gain_map(data: bytes) -> bool:
    """Adobe's and Android's XMP, Apple's XMP, ISO 21496-1."""
    names = (b"hdrgm:", b"HDRGainMap", b"hdrgainmap", b"urn:iso:std:iso:ts:21496")
    return any(name in data for name in names)
