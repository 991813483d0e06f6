"""The entropy model: what the decoder knows about y and z before it reads a symbol.

Here is z: its analysis and its density. What z says of y has two branches: `ScaleBranch`
(`scale_branch.py`) picks the probability table of every symbol and computes in integers alone, so
that encoder and decoder agree on it on any device, for ever. `MeanBranch` (`mean_branch.py`) is
ordinary floating point: a last-bit difference there moves a pixel by a fraction of a level and
never derails the entropy decoder, because the integer symbols are what is coded.

Both start from z_hat and then, pass by pass (`ModelConfig.passes`), take in the symbols that are
known by then: the scale their magnitudes, as integers; the mean what they stand for.

Sources: Ballé et al., "Variational image compression with a scale hyperprior", ICLR 2018; Minnen
et al., "Joint autoregressive and hierarchical priors", NeurIPS 2018 (mean and context).
"""

import math

import torch
from torch import Tensor, nn

from .config import NUM_SCALES, SCALE_MAX, SCALE_MIN, ModelConfig
from .convolution import convolve_relu
from .transforms import QualityTable, signed_log


class HyperAnalysis(nn.Module):
    """h_a: (N, latent, H/16, W/16) scaled latents -> (N, hyper, H/64, W/64), not rounded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(config.latent, 128, 1)
        self.down1 = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(128, config.hyper, 3, stride=2, padding=1)

    def forward(self, y: Tensor) -> Tensor:
        return self.downsample(self.pointwise(y))

    def pointwise(self, y: Tensor) -> Tensor:
        """What looks at one position at a time: (N, latent, h, w) -> (N, 128, h, w)."""
        return convolve_relu(signed_log(y).to(self.reduce.weight.dtype), self.reduce)

    def downsample(self, hidden: Tensor) -> Tensor:
        """The rest: (N, 128, h, w) -> (N, hyper, h/4, w/4)."""
        hidden = convolve_relu(hidden, self.down1)
        z: Tensor = self.down2(hidden).float()
        return z


class HyperPrior(nn.Module):
    """Density of z: a logistic per channel whose centre and width follow the quality."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.center = QualityTable(channels)
        self.log_scale = QualityTable(channels)
        nn.init.constant_(self.log_scale.nodes, 1.0)

    def bits(self, z: Tensor, quality: Tensor) -> Tensor:
        """-log2 of the mass of [z - 1/2, z + 1/2]; same shape as z."""
        return -torch.log2(self.mass(z, quality).clamp_min(1e-9))

    def rounded_bits(self, z: Tensor, quality: Tensor) -> Tensor:
        """-log2 of the mass of what z is rounded to; same shape as z.

        The gradient of z is that of the average over half a step of uniform noise to either side.
        """
        value = z.detach()
        rise = self.bits(torch.floor(value + 1), quality) - self.bits(torch.floor(value), quality)
        return self.bits(torch.floor(value + 0.5), quality) + rise.detach() * (z - value)

    def mass(self, z: Tensor, quality: Tensor) -> Tensor:
        """Probability of [z - 1/2, z + 1/2]."""
        centered = z - self.center(quality)
        inverse = torch.exp(-self.log_scale(quality))
        # Taken on the left tail, where the difference of sigmoids does not cancel.
        centered = -centered.abs()
        return torch.sigmoid((centered + 0.5) * inverse) - torch.sigmoid((centered - 0.5) * inverse)


def scale_of_index(index: Tensor) -> Tensor:
    """Standard deviation that a table index stands for, log-spaced; real indices too."""
    step = math.log(SCALE_MAX / SCALE_MIN) / (NUM_SCALES - 1)
    return torch.exp(index * step + math.log(SCALE_MIN))


def gaussian_bits(s: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the mass that a centred Gaussian gives to [s - 1/2, s + 1/2]."""
    s = -s.abs()
    inverse = math.sqrt(0.5) / scale
    mass = 0.5 * (torch.erfc(-(s + 0.5) * inverse) - torch.erfc(-(s - 0.5) * inverse))
    return -torch.log2(mass.clamp_min(1e-9))
