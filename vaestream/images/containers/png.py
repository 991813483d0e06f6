"""PNG. Source: W3C PNG 3."""

from __future__ import annotations

import re
import struct
import zlib

from vaestream.images.containers.container import (
    AFTER_PICTURE,
    INFO_TYPES,
    NO_PROFILE,
    TRAILER_BYTES,
    Container,
    bits_reason,
    is_srgb,
)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Deflate cannot shrink by more than this, so a PNG cannot hold more than this many times its size.
_DEFLATE_RATIO = 1032
# A note as short as this is left behind like a JPEG comment; longer text is somebody's work (the
# recipe of a generated picture, say).
_NOTE_BYTES = 512
# Long text that programs write unasked and that says nothing about the picture.
_PNG_CHATTER = re.compile(
    rb"(software|creation time|date:.*|png:.*|thumb::.*|exif:.*|icc:.*|jpeg:.*|signature"
    rb"|xml:com\.adobe\.xmp)\Z",
    re.IGNORECASE,
)
_PNG_XMP = b"XML:com.adobe.xmp"  # in iTXt; where Pillow does not look for it, elsewhere
_PNG_PROFILE = re.compile(rb"raw profile type ", re.IGNORECASE)
# Pillow keeps notes of these names where it keeps what they are named after.
_PNG_TAKEN = frozenset(name.encode() for name in INFO_TYPES)


def walk_png(data: bytes) -> Container:
    """The outside of a PNG."""
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    size = (width, height)
    reason = bits_reason(16) if depth == 16 else None
    packed = 0
    position = len(PNG_MAGIC)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = position + 8
        after = body + length + 4
        if after > len(data):
            break
        if zlib.crc32(data[body - 4 : body + length]) != int.from_bytes(data[after - 4 : after]):
            error = f"wrong checksum in the {kind.decode('ascii', 'replace')} chunk"
            return Container("PNG", size, reason, error)
        if kind == b"IDAT":
            packed += length
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data[body : body + length].split(b"\0", 1)[0]
            misplaced = kind != b"iTXt" and keyword == _PNG_XMP
            if misplaced or keyword in _PNG_TAKEN or _PNG_PROFILE.match(keyword):
                reason = reason or "metadata in PNG text chunks"
            elif length > _NOTE_BYTES and not _PNG_CHATTER.match(keyword):
                reason = reason or "long text in PNG chunks"
        elif kind == b"cICP" and not is_srgb(data[body], data[body + 1]):
            reason = reason or NO_PROFILE
        elif kind == b"IEND":
            if len(data) - after > TRAILER_BYTES:
                reason = reason or AFTER_PICTURE
            break
        position = after
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    if height * (width * channels * depth // 8) > _DEFLATE_RATIO * (packed or len(data)):
        error = f"{len(data)} bytes cannot hold the {width}x{height} pixels they claim"
        return Container("PNG", size, reason, error)
    return Container("PNG", size, reason)
