"""TIFF, and with it EXIF. Source: TIFF 6.0."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vaestream.images.containers.container import UNKNOWN_FORMAT, Container, bits_reason


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a TIFF directory, as far as its value is a single integer.

    Attributes:
        tag, count: as in the file.
        value: the first value where the type is an integer and it lies in the file, else None.
        at, width: where that value's bytes lie in the file.
    """

    tag: int
    count: int
    value: int | None
    at: int
    width: int


_INTEGER_WIDTHS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4}


def ifd(tiff: bytes) -> list[Entry]:
    """The entries of the first directory of a classic TIFF stream, as many as can be read."""
    order = byte_order(tiff)
    if order is None or len(tiff) < 8:
        return []
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return []
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = []
    for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, length, offset = struct.unpack_from(order + "HHII", tiff, at)
        width = _INTEGER_WIDTHS.get(kind, 0)
        where = at + 8 if width * length <= 4 else offset
        value = None
        if width and length and where + width <= len(tiff):
            value = int.from_bytes(tiff[where : where + width], "little" if order == "<" else "big")
        entries.append(Entry(tag, length, value, where, width))
    return entries


def byte_order(tiff: bytes) -> str | None:
    """``<`` or ``>`` for the struct module, None where no classic TIFF header stands."""
    return {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])


def walk_tiff(data: bytes) -> Container:
    """The outside of a TIFF."""
    tags = {entry.tag: entry.value for entry in ifd(data)}
    if data[:4] in (b"II+\0", b"MM\0+"):
        return Container("TIFF", None, "BigTIFF")  # not walked here, and Pillow hides its depth
    if not tags:  # damage
        return Container("TIFF")
    if 50706 in tags or 330 in tags or data[8:10] == b"CR":
        # DNGVersion, SubIFDs: the first directory of a raw file is its preview.
        return Container("TIFF", None, UNKNOWN_FORMAT)
    reason = None
    bits = tags.get(258) or 1
    if tags.get(339) == 3:
        reason = "floating point"
    elif bits > 8:
        reason = bits_reason(bits)
    elif tags.get(262) == 5:
        reason = "CMYK"
    elif 338 in tags:  # ExtraSamples: Pillow leaves out those that it does not know
        reason = "alpha channel" if tags[338] in (1, 2) else "extra channels"
    elif 37724 in tags:
        reason = "layers"
    elif 33723 in tags and 700 not in tags:
        reason = "IPTC without XMP"
    width, height = tags.get(256), tags.get(257)
    return Container("TIFF", (width, height) if width and height else None, reason)
