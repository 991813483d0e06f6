"""Probability tables from what the trained encoder really codes."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vaestream.codec import Codec
from vaestream.codec.encoder import Encoder
from vaestream.codec.hyperprior import Hyperprior
from vaestream.codec.weights_file import Z_QUALITIES, export_weights

from .data import PhotoSet

_QUALITIES = (5.0, 20.0, 35.0, 50.0, 65.0, 80.0, 95.0)
_CROP = 512
_CROPS = 128


def calibrated_weights(model: Hyperprior, photos: PhotoSet, *, seed: int = 0) -> bytes:
    """Bytes of a weights file whose tables follow the symbols of crops of `photos`.

    A Gaussian of the predicted scale is a good guess of a symbol's distribution; the counted one
    has the heavier tails of real residuals and the narrower centre of dead-zone rounding. As that
    follows from the tables, they are counted twice. Hyper-latents are counted too: most of their
    channels are silent far more often than a logistic says. The model is on the CPU.
    """
    crops = _crops(photos, np.random.default_rng(seed))
    encoder = _encoder(export_weights(model))
    hyper = [_sum(encoder.count_hyper_symbols(crop, q) for crop in crops) for q in Z_QUALITIES]
    first = export_weights(model, _counts(encoder, crops), hyper)
    return export_weights(model, _counts(_encoder(first), crops), hyper)


def _encoder(weights: bytes) -> Encoder:
    return Codec(weights, torch.device("cpu"), torch.float32).encoder


def _counts(encoder: Encoder, crops: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.int64]]:
    """`Encoder.count_symbols`, summed over crops and qualities."""
    return _sum(encoder.count_symbols(crop, q) for crop in crops for q in _QUALITIES)


def _sum(counts: Iterator[list[NDArray[np.int64]]]) -> list[NDArray[np.int64]]:
    """Lists of arrays, added up array by array as they come."""
    total = next(counts)
    for arrays in counts:
        for sum_, array in zip(total, arrays, strict=True):
            sum_ += array
    return total


def _crops(photos: PhotoSet, rng: np.random.Generator) -> Sequence[NDArray[np.uint8]]:
    crops = []
    for photo in (photos.photos[i] for i in rng.integers(len(photos.photos), size=_CROPS)):
        top = rng.integers(max(1, photo.shape[0] - _CROP + 1))
        left = rng.integers(max(1, photo.shape[1] - _CROP + 1))
        crops.append(photo[top : top + _CROP, left : left + _CROP])
    return crops
