"""Any file's bytes to a photo, or to a word on why it is none."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

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

from vaestream.images.containers import (
    UNKNOWN_FORMAT,
    Container,
    bits_reason,
    claimed_format,
    identify,
    inspect,
    is_foreign,
)
from vaestream.images.metadata import (
    UPRIGHT,
    forget_odd,
    orientation_of,
    profile_fits,
    set_upright,
    tiff_exif,
    tiff_tags_have_a_place,
    with_prefix,
)
from vaestream.images.pixels import Pixels, to_array

EMPTY_FILE = "empty file"
"""The error of a file without bytes, which are all there."""
MIN_SIDE = 32
"""Pixels; what is shorter on a side costs less as it is."""

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
    is_odd = forget_odd(image)
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
            exif = tiff_exif(image)  # and Pillow has turned the pixels already
        except MemoryError:
            raise
        except Exception:  # as Pillow writes tags, of what the file says is in them
            return Kept("TIFF tags that EXIF cannot hold", image_format, *size)
        _, xmp = set_upright(None, xmp)
    else:
        if container.format != "JPEG":
            exif = with_prefix(image.info.get("exif"))
        method = UPRIGHT.get(orientation_of(exif, xmp))
        exif, xmp = set_upright(exif, xmp)
        if method is not None:
            upright = image.transpose(method)
            image.close()
    return Photo(to_array(upright), image_format, exif, xmp, icc)


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
    if "icc_profile" in image.info and not profile_fits(image.info["icc_profile"], image.mode):
        return "ICC profile that does not fit the picture"
    if isinstance(image, TiffImagePlugin.TiffImageFile) and not tiff_tags_have_a_place(image):
        return "TIFF tags with no place in EXIF"
    return None
