"""The mean-scale hyperprior: one network for every quality, its scale branch in integers.

    x ─g_a─▶ y ─×gain─┬─────────(─ mean)─▶ round ─▶ s ══ coded ══▶ s + mean ─÷gain─▶ g_s ─▶ x_hat
                      └─h_a─▶ z ─round─▶ z_hat ══ coded ══▶ h_s ─▶ mean   (float)
                                                             └───▶ index  (integers)

The index of the probability table of every symbol s comes out of `ScaleBranch`, in which every
value is an integer, so that encoder and decoder agree on it on any device, for ever. The mean is
an ordinary float: a last-bit difference there moves a pixel by a fraction of a level, and never
derails the entropy decoder, because s itself is what is coded.

Sources: Ballé et al., "Variational image compression with a scale hyperprior", ICLR 2018; Minnen
et al., "Joint autoregressive and hierarchical priors", NeurIPS 2018 (the mean); Ballé et al.,
"Integer networks for data compression with latent-variable models", ICLR 2019 (the integers);
Cui et al., "Asymmetric gained deep image compression", CVPR 2021 (gain vectors).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transforms import (
    QUALITY_NODES,
    Analysis,
    QualityTable,
    Synthesis,
    depth_to_space,
    receptive_radius,
)

NUM_SCALES = 64
SCALE_MIN, SCALE_MAX = 0.11, 256.0
LAMBDA_MIN, LAMBDA_MAX = 0.0007, 0.22
"""Rate-distortion trade-off at quality 0 and 100: bits per pixel + lambda * MSE on 0..255."""

HYPER_STRIDE = 64
"""Pixels that a position of z spans in each direction."""

Z_LIMIT = 255

# Fixed-point formats of the scale branch, as numbers of fractional bits.
SCALE_WEIGHT_BITS = 6
_ACTIVATION_BITS = 4
_INDEX_BITS = 7  # of the accumulator of the last layer: one real unit is 2**3 table indices
_FLOAT32_EXACT = 2**24


def quality_to_lambda(quality: Tensor) -> Tensor:
    """Trade-off lambda for qualities in [0, 100], log-linear."""
    return LAMBDA_MIN * (LAMBDA_MAX / LAMBDA_MIN) ** (quality / 100)


def scale_table() -> Tensor:
    """(64,) float64 standard deviations, log-spaced."""
    steps = torch.arange(NUM_SCALES, dtype=torch.float64) / (NUM_SCALES - 1)
    return SCALE_MIN * (SCALE_MAX / SCALE_MIN) ** steps


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the networks; stored in the weights file."""

    latent: int = 320
    hyper: int = 96
    width8: int = 128
    width16: int = 192
    analysis_blocks8: int = 6
    analysis_blocks16: int = 2
    synthesis_blocks8: int = 5
    synthesis_blocks16: int = 2
    mean_width: int = 96
    scale_width: int = 64

    @property
    def analysis_radius(self) -> int:
        """Halo, in latents, that a window needs for g_a to give the values of the whole."""
        return receptive_radius(self.analysis_blocks8, self.analysis_blocks16)

    @property
    def synthesis_radius(self) -> int:
        """Halo, in latents, that a window needs for g_s to give the values of the whole."""
        return receptive_radius(self.synthesis_blocks8, self.synthesis_blocks16)


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
        # The logarithm tames the few huge low-frequency values without losing the small ones.
        y = torch.sign(y) * torch.log1p(y.abs())
        return F.relu(self.reduce(y.to(self.reduce.weight.dtype)))

    def downsample(self, hidden: Tensor) -> Tensor:
        """The rest: (N, 128, h, w) -> (N, hyper, h/4, w/4)."""
        hidden = F.relu(self.down1(hidden))
        z: Tensor = self.down2(hidden).float()
        return z


class MeanBranch(nn.Module):
    """h_s, the mean: (N, hyper, H/64, W/64) z_hat -> (N, latent, H/16, W/16), always float32.

    float32 because at high qualities the means reach hundreds of steps, beyond bfloat16.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.mean_width
        self.up1 = nn.Conv2d(config.hyper, 4 * width, 3, padding=1)
        self.up2 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.project = nn.Conv2d(width, config.latent, 1)
        self.condition = QualityTable(width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def features(self, z_hat: Tensor, quality: Tensor) -> Tensor:
        """Everything but the last 1x1: (N, mean_width, H/16, W/16)."""
        hidden = F.relu(depth_to_space(self.up1(z_hat), 2) + self.condition(quality))
        return F.relu(depth_to_space(self.up2(hidden), 2))

    def forward(self, z_hat: Tensor, quality: Tensor) -> Tensor:
        mean: Tensor = self.project(self.features(z_hat, quality))
        return mean


class ScaleBranch(nn.Module):
    """h_s, the scale: integer z_hat -> integer table index, by integer arithmetic alone.

    Layers: 3x3 to 4*scale_width, depth_to_space, 3x3 to 4*scale_width, depth_to_space, 1x1 to
    latent. Weights are int8 (6 fractional bits), activations 0..255 (4 fractional bits), and
    requantisation adds half and shifts right. `forward` is the differentiable simulation used in
    training; `vaestream.codec.exact` runs the same integers for coding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.scale_width
        self.up1 = nn.Conv2d(config.hyper, 4 * width, 3, padding=1)
        self.up2 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.project = nn.Conv2d(width, config.latent, 1)
        with torch.no_grad():
            # z_hat spans tens of units, so the first layer starts small; the last starts at a
            # standard deviation near one step.
            self.up1.weight.mul_(0.5)
            nn.init.constant_(self.project.bias, 20 / 8)  # type: ignore[arg-type]

    def forward(self, z_hat: Tensor) -> Tensor:
        """(N, hyper, H/64, W/64) integers -> (N, latent, H/16, W/16) index in [0, 63], float32."""
        with torch.autocast(z_hat.device.type, enabled=False):
            hidden = z_hat.float()
            for layer, in_bits in ((self.up1, 0), (self.up2, _ACTIVATION_BITS)):
                acc = _fake_quantised_conv(layer, hidden, in_bits)
                hidden = depth_to_space(_quantise_activation(acc), 2)
            acc = _fake_quantised_conv(self.project, hidden, _ACTIVATION_BITS)
            return _ste(acc * 2.0 ** (SCALE_WEIGHT_BITS + _ACTIVATION_BITS - _INDEX_BITS)).clamp(
                0, NUM_SCALES - 1
            )

    def integer_layers(self) -> list[tuple[Tensor, Tensor, int]]:
        """(weight, bias, shift) of each layer: int32 (out, in, k, k), int32 (out,), right shift.

        Raises ValueError if a sum could leave the range in which float32 counts exactly.
        """
        layers = []
        for layer, in_bits, shift, limit in (
            (self.up1, 0, SCALE_WEIGHT_BITS - _ACTIVATION_BITS, Z_LIMIT),
            (self.up2, _ACTIVATION_BITS, SCALE_WEIGHT_BITS, 255),
            (self.project, _ACTIVATION_BITS, _INDEX_BITS, 255),
        ):
            weight = _integer_weight(layer).to(torch.int32)
            assert layer.bias is not None
            bias = torch.round(layer.bias.double() * 2 ** (SCALE_WEIGHT_BITS + in_bits)).to(
                torch.int32
            )
            largest = limit * weight.abs().sum(dim=(1, 2, 3)) + bias.abs() + (1 << shift)
            if int(largest.max()) >= _FLOAT32_EXACT:
                raise ValueError("scale branch: a sum may pass 2**24, where float32 stops counting")
            layers.append((weight, bias, shift))
        return layers


def _ste(x: Tensor) -> Tensor:
    """Round half up, with the gradient of the identity."""
    return x + (torch.floor(x + 0.5) - x).detach()


def _integer_weight(layer: nn.Conv2d) -> Tensor:
    return torch.round(layer.weight * 2**SCALE_WEIGHT_BITS).clamp(-127, 127)


def _fake_quantised_conv(layer: nn.Conv2d, x: Tensor, in_bits: int) -> Tensor:
    weight = (
        layer.weight + (_integer_weight(layer) * 2.0**-SCALE_WEIGHT_BITS - layer.weight).detach()
    )
    assert layer.bias is not None
    unit = 2.0 ** (SCALE_WEIGHT_BITS + in_bits)
    bias = layer.bias + (torch.round(layer.bias * unit) / unit - layer.bias).detach()
    return F.conv2d(x, weight, bias, padding=layer.padding)


def _quantise_activation(x: Tensor) -> Tensor:
    return _ste(x * 2.0**_ACTIVATION_BITS).clamp(0, 255) * 2.0**-_ACTIVATION_BITS


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

    def mass(self, z: Tensor, quality: Tensor) -> Tensor:
        """Probability of [z - 1/2, z + 1/2]."""
        centered = z - self.center(quality)
        inverse = torch.exp(-self.log_scale(quality))
        # Taken on the left tail, where the difference of sigmoids does not cancel.
        centered = -centered.abs()
        return torch.sigmoid((centered + 0.5) * inverse) - torch.sigmoid((centered - 0.5) * inverse)


def gaussian_bits(s: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the mass that a centred Gaussian gives to [s - 1/2, s + 1/2]."""
    s = -s.abs()
    inverse = math.sqrt(0.5) / scale
    mass = 0.5 * (torch.erfc(-(s + 0.5) * inverse) - torch.erfc(-(s - 0.5) * inverse))
    return -torch.log2(mass.clamp_min(1e-9))


@dataclass(frozen=True)
class TrainingOutput:
    """What the objective needs; shapes as in `Hyperprior`."""

    x_hat: Tensor
    y_bits: Tensor
    z_bits: Tensor


class Hyperprior(nn.Module):
    """All networks of the codec. `forward` is for training; coding calls the parts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.g_a = Analysis(c.latent, c.width8, c.width16, c.analysis_blocks8, c.analysis_blocks16)
        self.g_s = Synthesis(
            c.latent, c.width8, c.width16, c.synthesis_blocks8, c.synthesis_blocks16
        )
        self.h_a = HyperAnalysis(config)
        self.h_s_mean = MeanBranch(config)
        self.h_s_scale = ScaleBranch(config)
        self.z_prior = HyperPrior(config.hyper)
        self.log_gain = QualityTable(config.latent)
        with torch.no_grad():
            # The step that minimises rate + lambda * distortion for a uniform quantiser at high
            # rate: step**2 = 26 / lambda, for a third of the samples' error each.
            nodes = torch.linspace(0, 100, QUALITY_NODES)
            self.log_gain.nodes.copy_(
                (0.5 * torch.log(quality_to_lambda(nodes) / 26))[:, None].expand(-1, c.latent)
            )

    def gain(self, quality: Tensor) -> Tensor:
        """(N,) -> (N, latent, 1, 1): latents times this are coded with step 1."""
        return torch.exp(self.log_gain(quality))

    def forward(self, x: Tensor, quality: Tensor, *, linear_only: bool = False) -> TrainingOutput:
        """x (N, 3, H, W) pixels minus 128, H and W multiples of 64; quality (N,).

        Rates are relaxed with uniform noise, reconstructions rounded with straight-through
        gradients.
        """
        gain = self.gain(quality)
        y = self.g_a(x, quality, linear_only=linear_only) * gain
        z = self.h_a(y)
        z_bits = self.z_prior.bits(z + torch.rand_like(z) - 0.5, quality)
        z_hat = _ste(z).clamp(-Z_LIMIT, Z_LIMIT)
        with torch.autocast(x.device.type, enabled=False):
            mean = self.h_s_mean(z_hat, quality)
        index = self.h_s_scale(z_hat)
        step = math.log(SCALE_MAX / SCALE_MIN) / (NUM_SCALES - 1)
        scale = torch.exp(index * step + math.log(SCALE_MIN))
        residual = y - mean
        y_bits = gaussian_bits(residual + torch.rand_like(residual) - 0.5, scale)
        y_hat = (_ste(residual) + mean) / gain
        x_hat = self.g_s(y_hat, quality, linear_only=linear_only)
        return TrainingOutput(x_hat, y_bits, z_bits)
