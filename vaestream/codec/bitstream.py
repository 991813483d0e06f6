"""The bitstream of one photo; docs/format.md specifies it byte by byte.

    magic  version  flags  quality  model id  width  height  reduction  sizes  CRC  z  tiles

Everything that is read before a CRC is checked stays within the bytes given, so a damaged or
hostile blob is refused before anything large is allocated.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from vaestream.errors import BitstreamError

from .entropy import read_varint, write_varint
from .transforms import STRIDE

MAGIC = b"\x8bVST"
VERSION = 1
MODEL_ID_BYTES = 8
TILE = 32
"""Latents a tile spans in each direction: 512 pixels."""

MAX_SIDE = 1 << 20
MAX_REDUCTION = 8
"""How many pixels a side of a picture may have for one of the picture that is coded in its stead.
"""

Rectangle = tuple[int, int, int, int]
"""(top, left, bottom, right) in latents."""

_GRAY, _REDUCED = 1, 2
_MOST_QUALITY = 10000  # in hundredths
_FIXED = struct.Struct(f"<4sBBH{MODEL_ID_BYTES}s")


@dataclass(frozen=True)
class Reduction:
    """The smaller picture that is coded in a picture's stead, and at which quality."""

    width: int
    height: int
    quality: float


@dataclass(frozen=True)
class Header:
    """What a bitstream says about itself before any decoding.

    quality is in [0, 100], in hundredths; model_id_prefix the first 16 hexadecimal digits of the
    SHA-256 of the weights file. reduction: None where the picture is coded at its own size.
    """

    width: int
    height: int
    channels: int
    quality: float
    model_id_prefix: str
    reduction: Reduction | None = None

    @property
    def coded_size(self) -> tuple[int, int]:
        """Width and height of the picture that goes through the networks."""
        r = self.reduction
        return (self.width, self.height) if r is None else (r.width, r.height)

    @property
    def coded_quality(self) -> float:
        """The quality at which it does."""
        return self.quality if self.reduction is None else self.reduction.quality

    @property
    def latent_size(self) -> tuple[int, int]:
        """(rows, columns) of the grid of y."""
        width, height = self.coded_size
        return -(-height // STRIDE), -(-width // STRIDE)

    def tiles(self) -> list[Rectangle]:
        """The rectangle of every tile, row by row."""
        rows, columns = self.latent_size
        return [
            (top, left, min(top + TILE, rows), min(left + TILE, columns))
            for top in range(0, rows, TILE)
            for left in range(0, columns, TILE)
        ]

    @property
    def num_tiles(self) -> int:
        rows, columns = self.latent_size
        return -(-rows // TILE) * -(-columns // TILE)


@dataclass(frozen=True)
class Bitstream:
    """A parsed bitstream: the header and the entropy-coded streams, CRCs not yet checked."""

    header: Header
    z: bytes
    tiles: Sequence[bytes]


def pack(header: Header, z: bytes, tiles: Sequence[bytes]) -> bytes:
    """Bytes of a bitstream. Qualities must be multiples of 0.01."""
    flags = _GRAY if header.channels == 1 else 0
    if header.reduction is not None:
        flags |= _REDUCED
    body = bytearray(
        _FIXED.pack(
            MAGIC,
            VERSION,
            flags,
            round(header.quality * 100),
            bytes.fromhex(header.model_id_prefix),
        )
    )
    body += write_varint(header.width)
    body += write_varint(header.height)
    if header.reduction is not None:
        body += write_varint(header.reduction.width)
        body += write_varint(header.reduction.height)
        body += struct.pack("<H", round(header.reduction.quality * 100))
    body += write_varint(len(z))
    if len(tiles) > 1:
        for tile in tiles:
            body += write_varint(len(tile))
            body += struct.pack("<I", zlib.crc32(tile))
        body += struct.pack("<I", zlib.crc32(z, zlib.crc32(body)))
    else:
        crc = zlib.crc32(z, zlib.crc32(body))
        body += struct.pack("<I", zlib.crc32(tiles[0], crc))
    return bytes(body) + z + b"".join(tiles)


def read_header(blob: bytes) -> Header:
    """The header alone: needs no model and only the first 64 bytes.

    Raises BitstreamError naming what is wrong. The CRC is not checked: see `unpack`.
    """
    return _read_header(blob)[0]


def _read_header(blob: bytes) -> tuple[Header, int]:
    if len(blob) < _FIXED.size:
        raise BitstreamError(f"{len(blob)} bytes are too few for a vaestream bitstream")
    magic, version, flags, quality, model = _FIXED.unpack_from(blob)
    if magic != MAGIC:
        raise BitstreamError(f"not a vaestream bitstream: it starts with {magic.hex(' ')}")
    if version != VERSION:
        raise BitstreamError(f"bitstream version {version}; this release reads version {VERSION}")
    if flags & ~(_GRAY | _REDUCED) or quality > _MOST_QUALITY:
        raise BitstreamError("damaged header: unknown flags or quality above 100")
    width, at = read_varint(blob, _FIXED.size)
    height, at = read_varint(blob, at)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise BitstreamError(f"damaged header: a size of {width}x{height}")
    reduction = None
    if flags & _REDUCED:
        reduction, at = _read_reduction(blob, at, width, height)
    channels = 1 if flags & _GRAY else 3
    return Header(width, height, channels, quality / 100, model.hex(), reduction), at


def _read_reduction(blob: bytes, at: int, width: int, height: int) -> tuple[Reduction, int]:
    coded_width, at = read_varint(blob, at)
    coded_height, at = read_varint(blob, at)
    if at + 2 > len(blob):
        raise BitstreamError("cut off inside the header")
    (quality,) = struct.unpack_from("<H", blob, at)
    for side, coded in ((width, coded_width), (height, coded_height)):
        if not -(-side // MAX_REDUCTION) <= coded <= side:
            raise BitstreamError(
                f"damaged header: a picture of {width}x{height} coded as {coded_width}x"
                f"{coded_height}"
            )
    if quality > _MOST_QUALITY:
        raise BitstreamError("damaged header: quality above 100")
    return Reduction(coded_width, coded_height, quality / 100), at + 2


def unpack(blob: bytes) -> Bitstream:
    """Parse a whole bitstream and check every CRC.

    Raises BitstreamError naming what is wrong: magic, version, size, cut off, or which CRC.
    """
    header, at = _read_header(blob)
    z_size, at = read_varint(blob, at)
    count = header.num_tiles
    table: list[tuple[int, int]] = []
    if count > 1:
        if count * 5 > len(blob) - at:
            raise BitstreamError(
                f"{len(blob)} bytes are too few for a picture of {header.width}x{header.height}"
            )
        for _ in range(count):
            size, at = read_varint(blob, at)
            if at + 4 > len(blob):
                raise BitstreamError("cut off inside the table of tiles")
            table.append((size, struct.unpack_from("<I", blob, at)[0]))
            at += 4
    if at + 4 > len(blob):
        raise BitstreamError("cut off inside the header")
    head = blob[:at]
    (crc,) = struct.unpack_from("<I", blob, at)
    at += 4
    z = blob[at : at + z_size]
    covered = zlib.crc32(z, zlib.crc32(head))
    at += z_size
    if count == 1:
        if at > len(blob) or zlib.crc32(blob[at:], covered) != crc:
            raise BitstreamError("CRC mismatch: damaged or cut off")
        return Bitstream(header, z, [blob[at:]])
    expected = at + sum(size for size, _ in table)
    if covered != crc:
        raise BitstreamError("CRC mismatch in the header or the hyper-latents")
    if expected != len(blob):
        raise BitstreamError(f"{len(blob)} bytes where the header says {expected}: cut off?")
    tiles = []
    for number, (size, tile_crc) in enumerate(table):
        tile = blob[at : at + size]
        if zlib.crc32(tile) != tile_crc:
            raise BitstreamError(f"CRC mismatch in tile {number}")
        tiles.append(tile)
        at += size
    return Bitstream(header, z, tiles)


def check(blob: bytes) -> Header:
    """Check header, sizes and every CRC without a model. Raises BitstreamError."""
    return unpack(blob).header
