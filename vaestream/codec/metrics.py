"""How far two pictures are apart."""

import math

import numpy as np
from numpy.typing import NDArray

_ROWS = 512  # at a time, so that memory does not grow with the picture


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, over all samples.

    In dB; infinite where they are equal. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {a.shape} and {b.shape} cannot be compared")
    total = 0.0
    for top in range(0, len(a), _ROWS):
        difference = a[top : top + _ROWS].astype(np.float32) - b[top : top + _ROWS]
        total += float(np.square(difference, out=difference).sum(dtype=np.float64))
    return 10 * math.log10(255**2 * a.size / total) if total else math.inf
