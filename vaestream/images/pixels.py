"""Pixels of Pillow images as arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def to_array(image: Image.Image) -> Pixels:
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
    return to_array(image)
