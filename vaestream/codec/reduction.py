"""Coding a smaller picture in a picture's stead, where that takes fewer bits for what it loses.

Photos straight from a camera are smooth at the scale of their pixels. At low qualities their finest
detail is not worth coding, and then most of what the codec spends goes into saying so. A picture of
half the size says it at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .bitstream import MODEL_ID_BYTES, Header, Reduction
from .config import LAMBDA_MAX, LAMBDA_MIN, quality_to_lambda

_RUNGS = ((1.5, 192), (2.0, 384), (3.0, 384), (4.0, 768))
"""How many times smaller each side may become, and pixels a side of the blocks on which that is
tried: they have a whole number of hyper-latents at this ratio and at the one before."""
_LEAST_PIXELS = 1 << 20
_MOST_BLOCKS, _LEAST_BLOCKS, _SHARE = 16, 5, 1 / 12
_MOST_BANDS = 6
_BORDERS = 0.01
"""Share of a block's cost that its borders add by being smaller: it has more than the picture."""
_MOST_LOST = 0.1  # bits a pixel that the finest detail may be worth; beyond, nothing is tried


def reduced_quality(quality: float, ratio: float) -> float:
    """The quality, in hundredths, at which a picture `ratio` times smaller weighs bits against
    error as the whole would at `quality`.

    An error of one of its pixels is one of ratio**2 pixels of the whole. Above 100 where the model
    has none.
    """
    shift = 100 * math.log(ratio**2) / math.log(LAMBDA_MAX / LAMBDA_MIN)
    return round((quality + shift) * 100) / 100


def reduced_size(width: int, height: int, ratio: float) -> tuple[int, int]:
    """Width and height of the smaller picture."""
    return math.ceil(width / ratio), math.ceil(height / ratio)


def next_ratio(ratio: float) -> float:
    """The ratio of the next larger picture."""
    return max((rung for rung, _ in _RUNGS if rung < ratio), default=1.0)


def resize(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """(H, W, 3) or (H, W) to another size, with Lanczos."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Source:
    """A picture, and the one that goes through the networks: itself, or one `ratio` times smaller.

    Both are (H, W, 3) or (H, W) uint8.
    """

    image: NDArray[np.uint8]
    coded: NDArray[np.uint8]
    ratio: float

    @classmethod
    def of(cls, image: NDArray[np.uint8], ratio: float = 1.0) -> "Source":
        if ratio == 1:
            return cls(image, image, ratio)
        height, width = image.shape[:2]
        return cls(image, resize(image, *reduced_size(width, height, ratio)), ratio)

    def coded_quality(self, quality: float) -> float:
        """At which quality the coded picture stands for the whole at `quality`."""
        return quality if self.ratio == 1 else min(100.0, reduced_quality(quality, self.ratio))

    def header(self, quality: float, model_id: str) -> Header:
        """Of the bitstream at a quality in hundredths."""
        height, width = self.image.shape[:2]
        reduction = None
        if self.ratio > 1:
            coded_height, coded_width = self.coded.shape[:2]
            reduction = Reduction(coded_width, coded_height, self.coded_quality(quality))
        channels = 3 if self.image.ndim == 3 else 1
        return Header(width, height, channels, quality, model_id[: 2 * MODEL_ID_BYTES], reduction)


def best_ratio(
    image: NDArray[np.uint8], quality: float, measure: Callable[[Source], tuple[float, float]]
) -> float:
    """How many times smaller a picture had better be coded at a quality: 1, 1.5, 2, 3 or 4.

    One ratio after the other is tried on blocks of the picture as long as it gets better; none on
    pictures below a megapixel, which have too few. measure: bits and error of a source coded at
    that quality; squared error, summed over the pixels, in each the mean of its samples.
    """
    weight = quality_to_lambda(quality)

    def cost(block: NDArray[np.uint8], ratio: float) -> float:
        bits, error = measure(Source.of(block, ratio))
        return bits + weight * error

    ratio = 1.0
    height, width = image.shape[:2]
    for smaller, side in _RUNGS if height * width >= _LEAST_PIXELS else ():
        if reduced_quality(quality, smaller) > 100 or min(height, width) < side:
            break
        places, lost = _blocks(image, side, smaller)
        if weight * float(lost.mean()) > _MOST_LOST:
            break
        # Blocks of all kinds: what it changes to reduce one follows from what that loses.
        count = min(max(_LEAST_BLOCKS, int(len(places) * _SHARE)), _MOST_BLOCKS, len(places))
        order = np.argsort(lost, kind="stable")
        chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
        change = []
        for block in (image[places[number]] for number in chosen):
            before = cost(block, ratio)
            change.append(cost(block, smaller) - (1 + _BORDERS) * before)
        if np.interp(lost, lost[chosen], change).sum() >= 0:
            break
        ratio = smaller
    return ratio


def _blocks(
    image: NDArray[np.uint8], side: int, ratio: float
) -> tuple[list[tuple[slice, slice]], NDArray[np.float32]]:
    """Square blocks in bands across the picture, and the mean squared error in each that reducing
    them and enlarging them again leaves; of a colour picture, in green."""
    height, width = image.shape[:2]
    columns = width // side
    places, lost = [], []
    for top in np.linspace(0, height - side, min(height // side, _MOST_BANDS)).astype(int):
        band = image[top : top + side]
        plane = np.ascontiguousarray(band if band.ndim == 2 else band[:, :, 1])
        back = resize(resize(plane, *reduced_size(width, side, ratio)), width, side)
        error = np.subtract(back, plane, dtype=np.float32)[:, : columns * side]
        lost.append(np.square(error, out=error).reshape(side, columns, side).mean(axis=(0, 2)))
        places += [
            (slice(top, top + side), slice(left, left + side))
            for left in range(0, columns * side, side)
        ]
    return places, np.concatenate(lost)
