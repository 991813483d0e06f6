"""How latents are rounded: to symbols by the encoder, and so that gradients pass."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .entropy import Table

DEAD_ZONE = 0.75
SQUARED_ERROR_OF_A_BIT = math.log(2) / 6
"""Squared steps that are worth a bit at the best step size (the slope of a uniform quantiser at
high rate)."""

_BEYOND_ONE = 0.6
"""How strong the shift is between larger symbols, for what it is between 0 and 1."""


def rounding_offsets(tables: Sequence[Table], strength: float = DEAD_ZONE) -> NDArray[np.float32]:
    """What to add before flooring a magnitude: (2, tables), for magnitudes below 1 and for others.
    0.5 would be plain rounding.

    A magnitude between two symbols is worth its dearer neighbour only if that saves more error
    than its bits cost. At the best step size a bit is worth ln(2)/6 squared steps (the slope of a
    uniform quantiser at high rate), and one table's symbols 0 and 1 differ by log2(p0/p1) bits, all
    larger neighbours about as 1 and 2. In practice only part of that shift pays: `strength`.
    """
    counts = np.array([t.counts[-t.low : 3 - t.low] for t in tables], np.float64)
    bits = np.log2(counts[:, :-1] / counts[:, 1:])
    shift = 0.5 * strength * SQUARED_ERROR_OF_A_BIT * np.array([1.0, _BEYOND_ONE])
    return (0.5 - shift[:, None] * bits.T).clip(0.0, 0.5).astype(np.float32)


def round_ste(x: torch.Tensor) -> torch.Tensor:
    """Round half up, with the gradient of the identity."""
    return x + (torch.floor(x + 0.5) - x).detach()
