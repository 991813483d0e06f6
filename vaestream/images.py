"""Any file's bytes -> 8-bit pixels and what must survive with them, or why the source is kept.

`load` answers with one of three:

* `Photo`: 8-bit RGB or gray, upright, with EXIF, XMP and ICC profile. Coding the pixels and
  carrying the metadata keeps everything that this package promises to keep.
* `Kept`: nothing is wrong with the file, but something in it would be lost. So it stays as it is:
  alpha (opaque or not), more than 8 bits, CMYK, palette, 1 bit, floating point, animation, several
  pages or pictures (previews, too), gain maps, motion photos, extended XMP, IPTC without XMP, long
  text in a PNG (over 512 bytes), an ICC profile that is unreadable or for other channels, TIFF tags
  with no place in EXIF (GeoTIFF), fewer than 32 pixels on a side, more than `max_pixels`; and every
  file of a format that is not read here (HEIC, raw, video, sidecars).
* `Broken`: the bytes, or for want of a signature the name, claim a format that is read here, but
  they do not decode.

Left behind on purpose: JPEG comments, short notes in a PNG, density, Photoshop resources and
makers' private segments; gamma, chromaticities, background and time stamps of PNG; trailers of less
than 64 KiB.

EXIF is carried byte for byte, maker notes and thumbnail included, but for the orientation: pixels
are turned upright and the value is set to 1 in place, in EXIF and XMP. EXIF that cannot be parsed
is carried as it is too, and says nothing about orientation (but an AVIF decoder may refuse a file
for it: that one is broken).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from vaestream.containers import (
    EXIF_PREFIX,
    UNKNOWN_FORMAT,
    Container,
    bits_reason,
    byte_order,
    claimed_format,
    identify,
    ifd,
    inspect,
    is_foreign,
)
from vaestream.errors import ArchiveError
from vaestream.text import describe

__all__ = [
    "EMPTY_FILE",
    "MIN_SIDE",
    "Broken",
    "Kept",
    "Photo",
    "decode_kept",
    "load",
    "save",
    "to_8bit",
    "to_image",
]

Pixels = npt.NDArray[np.uint8]

EMPTY_FILE = "empty file"
"""The error of a file without bytes, which are all there."""
MIN_SIDE = 32
"""Pixels; what is shorter on a side costs less as it is."""

_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([0-9])")

# The plugins are called by name and not through Image.open(): that one checks a limit on pixels
# that is global to the process, warns of it, and raises at twice its value. The limit here is an
# argument, and it is checked before a decoder runs.
_PLUGINS: dict[str, Callable[[BinaryIO], ImageFile]] = {
    "AVIF": AvifImagePlugin.AvifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TGA": TgaImagePlugin.TgaImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}

_MODE_REASONS = {
    "1": "1 bit per pixel",
    "P": "palette",
    "PA": "palette",
    "LA": "alpha channel",
    "La": "alpha channel",
    "RGBA": "alpha channel",
    "RGBa": "alpha channel",
    "RGBX": "alpha channel",
    "F": "floating point",
    "I": bits_reason(16),
    "I;16": bits_reason(16),
    "I;16L": bits_reason(16),
    "I;16B": bits_reason(16),
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

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


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo ready to be coded.

    Attributes:
        pixels: uint8, C-contiguous, (height, width, 3) in RGB or (height, width) in gray, in the
            photo's own colour space, upright.
        format: Pillow's name of the source's format.
        exif: EXIF with the prefix ``Exif\\0\\0``, as Pillow's ``save(exif=)`` takes it, its
            orientation (where it has one) set to 1.
        xmp: the XMP packet, tiff:Orientation likewise set to 1.
        icc: the ICC profile.
    """

    pixels: Pixels
    format: str
    exif: bytes | None
    xmp: bytes | None
    icc: bytes | None


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole file whose bytes are to be kept, and why. Sizes in pixels where they are known."""

    reason: str
    format: str | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that does not decode, and what is wrong with it."""

    error: str
    format: str | None = None
    width: int | None = None
    height: int | None = None


def load(data: bytes, *, name: str, max_pixels: int = 256_000_000) -> Photo | Kept | Broken:
    """Read one file.

    Args:
        data: the whole file.
        name: its name or key. Tells TGA and raw files, which no signature does, and whether bytes
            without any known signature were meant to be an image.
        max_pixels: files that claim more are `Kept` without being decoded.

    Bad data never raises; only MemoryError passes. Neither Pillow's limit on pixels nor any other
    setting of the process is touched, so threads may call this at once.
    """
    image_format = identify(data, name)
    if image_format is None:
        return _unknown(data, name)
    container = inspect(data, image_format)
    # WebP's decoder takes memory for the whole picture as soon as it opens a file.
    claim = container.size if image_format == "WEBP" else None
    if claim and (verdict := _too_large(image_format, claim, max_pixels)):
        return verdict
    try:
        image = _open(data, container)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        return _beyond_pillow(image_format, container.size or (None, None))
    except Exception as error:  # plugins raise whatever their parsing ran into
        size = container.size or (None, None)
        if container.reason is not None:  # sound as far as can be told, only unknown to Pillow
            return Kept(container.reason, image_format, *size)
        return _undecoded(image_format, error, size)
    size = image.size
    if verdict := _too_large(image_format, size, max_pixels):
        return verdict
    if container.error is not None:
        return Broken(f"{image_format}: {container.error}", image_format, *size)
    try:
        with image:
            return _read(image, container, max_pixels)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        return _beyond_pillow(image_format, size)
    except Exception as error:  # as above
        return _undecoded(image_format, error, size)


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
    if exif is not None:
        options["exif"] = exif if exif.startswith(EXIF_PREFIX) else EXIF_PREFIX + exif
    # PNG falls back on image.info where it is not given; the others do not.
    options["icc_profile"] = icc
    if xmp is not None and format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp)
        options["pnginfo"] = chunks
    elif xmp is not None:
        options["xmp"] = xmp
    image.save(target, format.upper(), **options)


def _unknown(data: bytes, name: str) -> Kept | Broken:
    claimed = claimed_format(name)
    if claimed is None or is_foreign(data):
        return Kept(UNKNOWN_FORMAT)
    if not data:
        return Broken(EMPTY_FILE)
    return Broken(f"named like {claimed}, but the bytes are of no known format")


def _too_large(image_format: str, size: tuple[int, int], max_pixels: int) -> Kept | None:
    if size[0] * size[1] <= max_pixels:
        return None
    return _keep_large(image_format, size, max_pixels)


def _keep_large(image_format: str, size: tuple[int | None, int | None], max_pixels: int) -> Kept:
    return Kept(f"more than {max_pixels} pixels (raise max_pixels to read it)", image_format, *size)


def _beyond_pillow(image_format: str, size: tuple[int | None, int | None]) -> Kept:
    """Some of its readers know no other limit than Pillow's own, which is the process's."""
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return Kept(
        f"more than the {most} pixels that Pillow reads of {image_format}", image_format, *size
    )


def _undecoded(
    image_format: str, error: Exception, size: tuple[int | None, int | None]
) -> Kept | Broken:
    told = str(error)
    if image_format == "PNG" and ("MAX_TEXT_CHUNK" in told or "used in text chunks" in told):
        # Pillow's limits, not damage; a profile counts as text there.
        return Kept("long text in PNG chunks", image_format, *size)
    return Broken(f"{image_format}: {told or type(error).__name__}", image_format, *size)


def _open(data: bytes, container: Container) -> ImageFile:
    stream = io.BytesIO(data)
    # Pillow looks into EXIF for the resolution as it opens a JPEG, and warns or fails over what is
    # corrupt there. EXIF is read here, so the segments are given another name.
    for at in container.exif_at:
        stream.seek(at)
        stream.write(b"none")
    stream.seek(0)
    return _PLUGINS[container.format](stream)


def _read(image: ImageFile, container: Container, max_pixels: int) -> Photo | Kept | Broken:
    image_format, size = container.format, image.size
    frames = int(getattr(image, "n_frames", 1))
    is_odd = _forget_odd(image)
    image.load()
    reason = _reason(image, container, frames) or ("metadata of an odd type" if is_odd else None)
    if reason is not None:
        # Kept or broken? All frames tell, unless there are more than a photo may have pixels.
        if frames > 1 and frames * size[0] * size[1] <= max_pixels:
            for frame in range(1, frames):
                image.seek(frame)
                image.load()
        return Kept(reason, image_format, *size)

    exif, xmp = container.exif, image.info.get("xmp")
    icc = image.info.get("icc_profile") or None
    upright: Image.Image = image
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        try:
            exif = _tiff_exif(image)  # and Pillow has turned the pixels already
        except MemoryError:
            raise
        except Exception:  # as Pillow writes tags, of what the file says is in them
            return Kept("TIFF tags that EXIF cannot hold", image_format, *size)
        _, xmp = _set_upright(None, xmp)
    else:
        if container.format != "JPEG":
            exif = _with_prefix(image.info.get("exif"))
        method = _UPRIGHT.get(_orientation(exif, xmp))
        exif, xmp = _set_upright(exif, xmp)
        if method is not None:
            upright = image.transpose(method)
            image.close()
    return Photo(_to_array(upright), image_format, exif, xmp, icc)


def _forget_odd(image: Image.Image) -> bool:
    """Forget what only passes for metadata: Pillow's own readers stumble over it. Whether there was
    any. Tags of a TIFF may have any type, and a PNG's notes any name."""
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("exif", "xmp", "icc_profile"), bytes),
        "transparency": (bytes, int, tuple),
        "interlace": int,
    }
    found = {key: image.info.get(key) for key in kinds}
    odd = [key for key, one in found.items() if not (one is None or isinstance(one, kinds[key]))]
    for key in odd:
        del image.info[key]
    return bool(odd)


def _reason(image: ImageFile, container: Container, frames: int) -> str | None:
    """Why the source must be kept, the weightiest reason first."""
    if frames > 1:
        return "several pages" if container.format == "TIFF" else "animation"
    if container.reason is not None:
        return container.reason
    if image.mode not in ("RGB", "L"):
        return _MODE_REASONS.get(image.mode, image.mode)
    if container.format == "GIF":
        return "palette"
    if "transparency" in image.info:
        return "alpha channel"
    if min(image.size) < MIN_SIDE:
        return f"smaller than {MIN_SIDE}x{MIN_SIDE}"
    if "icc_profile" in image.info and not _profile_fits(image.info["icc_profile"], image.mode):
        return "ICC profile that does not fit the picture"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = set(image.tag_v2)
        if not tags <= _TIFF_DESCRIPTION.union(_TIFF_LAYOUT):
            return "TIFF tags with no place in EXIF"
    return None


def _profile_fits(icc: bytes | None, mode: str) -> bool:
    """Whether a profile's colour space (bytes 16 to 20, ICC.1 7.2.6) is that of the pixels.

    None is what Pillow makes of a profile in pieces. What is no profile at all changes no colour
    and is carried as it is.
    """
    if icc is None:
        return False
    if icc[36:40] != b"acsp":
        return True
    return icc[16:20] == b"RGB " or (mode == "L" and icc[16:20] == b"GRAY")


def _with_prefix(exif: bytes | None) -> bytes | None:
    if not exif:
        return None
    return exif if exif.startswith(EXIF_PREFIX) else EXIF_PREFIX + exif


def _orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """EXIF's word first, else XMP's, else 1; as Pillow and browsers take it."""
    values = [entry.value for entry in ifd(_tiff_of(exif)) if entry.tag == _ORIENTATION]
    if values:
        return values[-1] or 1
    match = _XMP_ORIENTATION.search(xmp or b"")
    return int(match[1]) if match else 1


def _set_upright(exif: bytes | None, xmp: bytes | None) -> tuple[bytes | None, bytes | None]:
    """The same metadata with orientation 1, all other bytes and all lengths unchanged."""
    if exif is not None:
        tiff = _tiff_of(exif)
        little = byte_order(tiff) == "<"
        patched = bytearray(exif)
        for entry in ifd(tiff):
            if entry.tag == _ORIENTATION and entry.value is not None:
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


def _tiff_exif(image: TiffImagePlugin.TiffImageFile) -> bytes | None:
    """A TIFF's own tags are its EXIF: those that describe the photo, written anew."""
    exif = image.getexif()
    for tag in set(exif) - _TIFF_DESCRIPTION:
        del exif[tag]
    return _with_prefix(exif.tobytes()) if len(exif) else None


def _to_array(image: Image.Image) -> Pixels:
    """Pixels in strips: Pillow's own way holds two more copies of a large photo for a moment.

    Small ones: crop() minds Pillow's limit on pixels, however low somebody has set it.
    """
    width, height = image.size
    shape = (height, width) if image.mode == "L" else (height, width, 3)
    pixels = np.empty(shape, dtype=np.uint8)
    rows = max(1, (1 << 15) // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def decode_kept(data: bytes, *, name: str = "") -> Pixels:
    """The picture in a kept source, upright, as `to_8bit` gives it.

    name: as `load` takes it, where it is known. EXIF that cannot be parsed says nothing about
    orientation. Raises ArchiveError where the source gives no 8-bit picture.
    """
    try:
        photo = load(data, name=name)
        if isinstance(photo, Photo):
            return photo.pixels
        with Image.open(io.BytesIO(data)) as image:
            _forget_odd(image)
            image.load()
            _forget_odd(image)  # a PNG's notes may come last
            method = _UPRIGHT.get(_pillow_orientation(image))
            return to_8bit(image if method is None else image.transpose(method))
    except Exception as error:  # each of Pillow's formats has errors of its own
        told = f"a kept source, which does not decode: {describe(error)}"
        raise ArchiveError(told) from error


def _pillow_orientation(image: Image.Image) -> int:
    """As Pillow takes it from all the places where a format may have it; 1 for those of TIFF, whose
    pixels it has turned already."""
    try:
        orientation: int = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as its parser runs into what is wrong
        return 1
    return orientation


def to_8bit(image: Image.Image) -> Pixels:
    """A Pillow image as (H, W, 3) RGB or (H, W) gray uint8, C-contiguous.

    Transparency is laid over white, 16 bits lose the lower 8, other colour spaces become RGB as
    Pillow converts them. Raises ValueError for floating point, whose range nothing tells.
    """
    if image.mode == "F":
        raise ValueError("floating point has no 8-bit levels")
    if image.mode.startswith("I"):
        return np.asarray(np.clip(np.asarray(image), 0, 65535) >> 8, np.uint8)
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _to_array(image)
