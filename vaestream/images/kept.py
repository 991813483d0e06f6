"""The picture in a source that is kept."""

from __future__ import annotations

import io

from PIL import Image

from vaestream.errors import ArchiveError
from vaestream.images.metadata import ORIENTATION, UPRIGHT, forget_odd
from vaestream.images.pixels import Pixels, to_8bit
from vaestream.images.reading import Photo, load
from vaestream.text import describe


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
            forget_odd(image)
            image.load()
            forget_odd(image)  # a PNG's notes may come last
            method = UPRIGHT.get(_pillow_orientation(image))
            return to_8bit(image if method is None else image.transpose(method))
    except Exception as error:  # each of Pillow's formats has errors of its own
        told = f"a kept source, which does not decode: {describe(error)}"
        raise ArchiveError(told) from error


def _pillow_orientation(image: Image.Image) -> int:
    """As Pillow takes it from all the places where a format may have it; 1 for those of TIFF, whose
    pixels it has turned already."""
    try:
        orientation: int = image.getexif().get(ORIENTATION, 1)
    except Exception:  # as its parser runs into what is wrong
        return 1
    return orientation
