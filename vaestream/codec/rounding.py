"""How the encoder rounds latents to symbols."""

import math
from collections.abc import Sequence
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
