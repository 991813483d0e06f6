"""The training objective: rate + lambda * distortion, balanced over the qualities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vaestream.codec.config import quality_to_lambda
from vaestream.codec.hyperprior import TrainingOutput

_BALANCE_EXPONENT = -0.46
_BALANCE_LAMBDA = 0.016


@dataclass(frozen=True)
class Cost:
    """What a batch of N costs: `loss`, the mean that is minimised; `bpp`, bits a pixel, and `mse`,
    of levels 0..255, of each, (N,)."""

    loss: Tensor
    bpp: Tensor
    mse: Tensor


def rate_distortion(output: TrainingOutput, x: Tensor, quality: Tensor) -> Cost:
    """Per photo: bits per pixel + lambda * MSE, weighted so that every quality counts alike.

    Rate + lambda * distortion grows about as lambda**0.46 from low to high quality; without the
    weight the high qualities would drown the low ones, where BD-rate is just as sensitive.
    """
    pixels = x.shape[-2] * x.shape[-1]
    bpp = (output.y_bits + output.z_bits) / pixels
    mse = (output.x_hat - x).square().flatten(1).mean(1)
    lam = quality_to_lambda(quality)
    weight = (lam / _BALANCE_LAMBDA) ** _BALANCE_EXPONENT
    return Cost(torch.mean(weight * (bpp + lam * mse)), bpp, mse)
