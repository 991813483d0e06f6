"""Decisions of the encoder alone: how to round, and which quality meets a target."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .entropy import Table

DEAD_ZONE = 0.6
SQUARED_ERROR_OF_A_BIT = math.log(2) / 6
"""Squared steps that are worth a bit at the best step size (the slope of a uniform quantiser at
high rate)."""

_Numbers = TypeVar("_Numbers", NDArray[np.float64], torch.Tensor)


def rounding_offsets(tables: Sequence[Table], strength: float = DEAD_ZONE) -> NDArray[np.float32]:
    """What to add before flooring a magnitude, for every table: 0.5 would be plain rounding.

    A magnitude between two symbols is worth its dearer neighbour only if that saves more error
    than its bits cost. At the best step size a bit is worth ln(2)/6 squared steps (the slope of a
    uniform quantiser at high rate), and one table's symbols 0 and 1 differ by log2(p0/p1) bits.
    In practice only part of that shift pays.
    """
    bits = [math.log2(t.counts[-t.low] / t.counts[-t.low + 1]) for t in tables]
    return rounding_offset(np.array(bits), strength).astype(np.float32)


def rounding_offset(bits: _Numbers, strength: float = DEAD_ZONE) -> _Numbers:
    """`rounding_offsets`, given how many bits a symbol 1 costs more than a 0."""
    return (0.5 - 0.5 * strength * SQUARED_ERROR_OF_A_BIT * bits).clip(0.0, 0.5)


def solve_quality(
    measure: Callable[[float], float],
    low: float,
    high: float,
    *,
    guess: float,
    slope: float,
    evaluations: int = 8,
) -> float:
    """A quality in [0, 100] at which `measure`, a rising function of it, is in [low, high].

    slope: first guess of what a quality unit adds. Newton steps whose slope is learned on the
    way, kept inside the bracket seen so far. Ends at 0 or 100 where the range is not reached,
    and after `evaluations` calls at the last quality tried.
    """
    goal = 0.5 * (low + high)
    below, above = 0.0, 100.0
    quality, previous = guess, None
    for _ in range(evaluations):
        value = measure(quality)
        if low <= value <= high:
            return quality
        if value < low:
            below = quality
        else:
            above = quality
        if above - below < 0.02:
            return quality
        if previous is not None and quality != previous[0]:
            learned = (value - previous[1]) / (quality - previous[0])
            if learned > 0:
                slope = learned
        previous = (quality, value)
        step = quality + (goal - value) / slope
        if not below < step < above:
            # Outside the bracket: an end of the range that was not tried yet, or the middle.
            if step >= above == 100.0 or step <= below == 0.0:
                step = min(max(step, 0.0), 100.0)
            else:
                step = 0.5 * (below + above)
        quality = round(step, 2)
    return quality


def sample_patches(image: NDArray[np.uint8], *, side: int, count: int) -> list[NDArray[np.uint8]]:
    """Up to count x count squares spread evenly over a picture; the picture if it is small."""
    height, width = image.shape[:2]
    if height * width <= (side * count) ** 2:
        return [image]
    tops = np.linspace(0, max(0, height - side), count).astype(int)
    lefts = np.linspace(0, max(0, width - side), count).astype(int)
    return [image[t : t + side, x : x + side] for t in tops for x in lefts]
