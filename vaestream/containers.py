"""What an image file says about itself before any decoder runs.

Decoders answer "which pixels?". Whether a file can be replaced by 8-bit pixels, EXIF, XMP and an
ICC profile is another question, and Pillow hides parts of the answer: it scales 16-bit PNG, TIFF,
PPM and JPEG 2000 to 8 bits, shows the preview of a raw file as its picture, and leaves out gain
maps, extended XMP and whatever follows the picture. So the containers are walked here.

Sources: ITU-T T.81 (JPEG), CIPA DC-007 (multi-picture format), Adobe XMP part 3, W3C PNG 3,
RFC 9649 (WebP), TIFF 6.0, ISO 14496-12 (boxes), AV1-ISOBMFF (av1C), ITU-T T.800 (JPEG 2000),
ITU-T H.273 (colour code points), the netpbm manual.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
EXIF_PREFIX = b"Exif\0\0"
UNKNOWN_FORMAT = "not a format this reader knows"

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
# What decoders of Huffman-coded JPEG need at the very least: a bit for each block of 8x8.
_JPEG_PIXELS_PER_BYTE = 8 * 64
# Deflate cannot shrink by more than this, so a PNG cannot hold more than this many times its size.
_DEFLATE_RATIO = 1032
# Makers end their files with short records of their own (Samsung's time stamp: 67 bytes). What is
# longer is a video, a sound or another picture.
_TRAILER_BYTES = 1 << 16
_PPM_HEADER = 4096
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
_PNG_TAKEN = frozenset((b"exif", b"icc_profile", b"interlace", b"transparency", b"xmp"))


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
        "JPEG": _jpeg,
        "PNG": _png,
        "WEBP": _webp,
        "TIFF": _tiff,
        "BMP": _bmp,
        "AVIF": _avif,
        "JPEG2000": _jpeg2000,
        "PPM": _ppm,
    }.get(image_format)
    if walk is None:
        return Container(image_format)
    try:
        return walk(data)
    except (struct.error, IndexError):
        return Container(image_format)


def bits_reason(bits: int) -> str:
    """The reason to keep a source with more than 8 bits per channel."""
    return f"{bits} bits per channel"


# --- JPEG


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


def _jpeg(data: bytes) -> Container:
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
    elif len(trailer) > _TRAILER_BYTES:
        reason = "data after the picture"
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


# --- PNG


def _png(data: bytes) -> Container:
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
        elif kind == b"cICP" and not _is_srgb(data[body], data[body + 1]):
            reason = reason or "colour space that no ICC profile states"
        elif kind == b"IEND":
            if len(data) - after > _TRAILER_BYTES:
                reason = reason or "data after the picture"
            break
        position = after
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    if height * (width * channels * depth // 8) > _DEFLATE_RATIO * (packed or len(data)):
        error = f"{len(data)} bytes cannot hold the {width}x{height} pixels they claim"
        return Container("PNG", size, reason, error)
    return Container("PNG", size, reason)


def _is_srgb(primaries: int, transfer: int) -> bool:
    """Whether H.273 code points say sRGB, its video sibling BT.709, or nothing."""
    return primaries in (1, 2) and transfer in (1, 2, 6, 13)


# --- TIFF, and with it EXIF


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


def _tiff(data: bytes) -> Container:
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


# --- the others


def _webp(data: bytes) -> Container:
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
    reason = "data after the picture" if len(data) - held > _TRAILER_BYTES else None
    return Container("WEBP", size, reason, error)


def _bmp(data: bytes) -> Container:
    """A size, and whether the header is sound but of a kind that Pillow refuses."""
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


_BMP_RARE = "bit layout this reader does not know"


def _bmp_is_common(data: bytes, header: int, bits: int) -> bool:
    """Whether the channel masks are 8 bits wide or those of 15- and 16-bit RGB."""
    if bits == 2:
        return False
    masks = struct.unpack_from("<III", data, 54)
    alpha = struct.unpack_from("<I", data, 66)[0] if header >= 56 else 0
    if bits == 16:
        return alpha == 0 and masks in ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F))
    return all(mask in (0xFF << shift for shift in (0, 8, 16, 24)) for mask in masks)


def _avif(data: bytes) -> Container:
    head = data[: 1 << 16]
    reason = None
    at = head.find(b"av1C")
    if at >= 0 and head[at + 6] & 0x40:
        reason = bits_reason(12 if head[at + 6] & 0x20 else 10)
    at = head.find(b"colrnclx")
    if at >= 0 and b"colrprof" not in head:
        primaries, transfer = struct.unpack_from(">HH", head, at + 8)
        if not _is_srgb(primaries, transfer):
            reason = reason or "colour space that no ICC profile states"
    if b"tmap" in head:
        reason = "gain map"
    return Container("AVIF", None, reason)


def _jpeg2000(data: bytes) -> Container:
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


def _ppm(data: bytes) -> Container:
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
            reason = "data after the picture"  # another picture, say
    return Container("PPM", size, reason)
