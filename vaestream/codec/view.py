"""Which part of a picture is wanted, how large, and what has to be decoded for it."""

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .bitstream import Rectangle
from .config import CodingPass
from .transforms import STRIDE

Region = tuple[int, int, int, int]
"""Left, top, width and height in pixels of a picture that stands upright."""

_SHRINKS = (8, 4, 2)
_MARGIN = 1.5
_ENOUGH = 4
_LANCZOS = 3  # pixels to either side from which the filter makes one between them


@dataclass(frozen=True)
class View:
    """A region of a picture, at a size.

    region: what is seen. size: width and height in pixels of what is shown. scale: how many pixels
    of the coded picture there are, across and down, for one of the picture: 1 unless it is reduced.
    shrink: the synthesis gives 1, 1/2, 1/4 or 1/8 of the coded picture's size; Lanczos resampling
    does the rest.
    """

    region: Region
    size: tuple[int, int]
    shrink: int
    scale: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(
        cls,
        width: int,
        height: int,
        *,
        region: Region | None = None,
        max_size: int | None = None,
        coded_size: tuple[int, int] | None = None,
        synthesis: bool = True,
    ) -> "View":
        """Of a picture of width x height: a region or all of it, its longer side at most max_size.

        coded_size: width and height of the coded picture, where it is smaller. synthesis: whether
        one does part of the shrinking; False where the pixels are there.

        A picture is never enlarged. The synthesis shrinks by averaging, which blurs more than a
        good filter; so it leaves Lanczos at least a factor of 1.5 to do. Raises ValueError for a
        region that does not lie inside the picture, or a size below 1.
        """
        check_view(region, max_size)
        # Plain integers: NumPy's narrow ones wrap.
        x, y, w, h = (0, 0, width, height) if region is None else map(int, region)
        if x + w > width or y + h > height:
            raise ValueError(
                f"region {(x, y, w, h)} (left, top, width, height) does not lie inside a picture "
                f"of {width}x{height}"
            )
        coded_width, coded_height = coded_size or (width, height)
        scale = coded_width / width, coded_height / height
        if max_size is None or max(w, h) <= max_size:
            return cls((x, y, w, h), (w, h), 1, scale)
        factor = max(w, h) / int(max_size)
        left = factor * min(scale) / _MARGIN
        shrink = next((s for s in _SHRINKS if synthesis and s <= left), 1)
        size = max(1, round(w / factor)), max(1, round(h / factor))
        return cls((x, y, w, h), size, shrink, scale)

    def latents(self, rows: int, columns: int, *, halo: int) -> Rectangle:
        """The latents, of a grid of rows x columns, that the region follows from.

        halo: how far beyond its own position a latent reaches in the networks; averages come from
        the linear path alone, in which none does.
        """
        left, top, right, bottom = self._coded_region
        halo = halo if self.shrink == 1 else 0
        margin = _LANCZOS if self._is_reduced else 0
        return (
            max(0, math.floor((top - margin) / STRIDE) - halo),
            max(0, math.floor((left - margin) / STRIDE) - halo),
            min(rows, math.ceil((bottom + margin) / STRIDE) + halo),
            min(columns, math.ceil((right + margin) / STRIDE) + halo),
        )

    def passes(self, passes: tuple[CodingPass, ...]) -> int:
        """How many coding passes to decode: detail that an average loses need not be known.

        Channels come in the order of their energy; four times as many as a latent has values in the
        reduced picture are enough.
        """
        if self.shrink == 1:
            return len(passes)
        enough = _ENOUGH * 3 * (STRIDE // self.shrink) ** 2
        return sum(p.start < enough for p in passes)

    @property
    def is_crop(self) -> bool:
        """Whether the region is shown with the pixels that are coded."""
        return self.size == self.region[2:] and not self._is_reduced

    @property
    def _is_reduced(self) -> bool:
        return self.scale != (1.0, 1.0)

    @property
    def _coded_region(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the region in the coded picture."""
        x, y, w, h = self.region
        across, down = self.scale
        return x * across, y * down, (x + w) * across, (y + h) * down

    def place(self, top: int, left: int) -> tuple[slice, slice]:
        """Rows and columns of the region in pixels whose first one lies at (top, left)."""
        x, y, w, h = self.region
        return slice(y - top, y - top + h), slice(x - left, x - left + w)

    def show(self, pixels: NDArray[np.uint8], top: int = 0, left: int = 0) -> NDArray[np.uint8]:
        """The view, from the pixels of the synthesis, whose first one lies at (top, left) of the
        coded picture."""
        x_start, y_start, x_end, y_end = self._coded_region
        if self.shrink == 1 and not self._is_reduced:
            pixels = pixels[self.place(top, left)]
            if self.is_crop:
                return np.ascontiguousarray(pixels)
            left, top = self.region[:2]
        # Clipped: the last shrunk pixel of a picture may reach beyond its edge.
        box = (
            (x_start - left) / self.shrink,
            (y_start - top) / self.shrink,
            min(pixels.shape[1], (x_end - left) / self.shrink),
            min(pixels.shape[0], (y_end - top) / self.shrink),
        )
        return _resized(pixels, self.size, box)


def _resized(
    pixels: NDArray[np.uint8], size: tuple[int, int], box: tuple[float, float, float, float]
) -> NDArray[np.uint8]:
    """A box of pixels (left, top, right, bottom) at another size.

    First along the rows, as a whole picture is enlarged: each step rounds to 8 bits, and which of
    them Pillow takes first in one call depends on the box and on its version.
    """
    left, top, right, bottom = box
    image = Image.fromarray(pixels)
    lanczos = Image.Resampling.LANCZOS
    image = image.resize((size[0], image.height), lanczos, (left, 0, right, image.height))
    image = image.resize(size, lanczos, (0, top, size[0], bottom))
    return np.array(image)  # a copy, which may be written to


def check_view(region: Region | None, max_size: int | None) -> None:
    """Raises ValueError for a region or a size that no picture can have."""
    if region is not None and not (
        len(region) == 4
        and all(isinstance(value, Integral) for value in region)
        and min(region[:2]) >= 0
        and min(region[2:]) >= 1
    ):
        raise ValueError(
            f"region {region!r} (left, top, width, height) does not lie inside any picture: four "
            "whole numbers are wanted, the last two of at least 1"
        )
    if max_size is not None and not (isinstance(max_size, Integral) and max_size >= 1):
        raise ValueError(f"a picture cannot have a size of {max_size}")


def see(
    pixels: NDArray[np.uint8], *, region: Region | None, max_size: int | None
) -> NDArray[np.uint8]:
    """The view of a picture that is there whole, (H, W, 3) or (H, W). Raises as `View.of` does."""
    height, width = pixels.shape[:2]
    return View.of(width, height, region=region, max_size=max_size, synthesis=False).show(pixels)
