"""How far two pictures are apart."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SAMPLES_AT_ONCE = 1 << 18  # few enough to stay in the cache


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, over all samples.

    In dB; infinite where they are equal. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {a.shape} and {b.shape} cannot be compared")
    total = 0.0
    x, y = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, _SAMPLES_AT_ONCE):
        end = start + _SAMPLES_AT_ONCE
        difference = x[start:end].astype(np.float32) - y[start:end]
        total += float(difference.dot(difference))
    return 10 * math.log10(255**2 * a.size / total) if total else math.inf


def tensor_psnr(a: Tensor, b: Tensor) -> float:
    """`psnr` of two uint8 tensors of as many samples on one device."""
    total = 0.0
    for x, y in zip(*(torch.split(t.flatten(), _SAMPLES_AT_ONCE) for t in (a, b)), strict=True):
        difference = x.float().sub_(y)  # small enough to stay in the cache
        total += float(difference.dot(difference))
    return 10 * math.log10(255**2 * a.numel() / total) if total else math.inf
