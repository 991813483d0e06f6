"""The mean-scale hyperprior with contexts: one network for every quality.

    x ─g_a─▶ y ─×gain─┬─────────(─ mean)─▶ round ─▶ s ══ coded ══▶ s + mean ─÷gain─▶ g_s ─▶ x_hat
                      └─h_a─▶ z ─round─▶ z_hat ══ coded ══▶ h_s ─▶ mean   (float)
                                                             └───▶ index  (integers)

s is coded in a few passes; the mean and the index of a pass also follow the symbols of the passes
before it (`mean_branch` and `scale_branch`). A post-filter (`post_filter`) may follow g_s.

Sources: Ballé et al., "Variational image compression with a scale hyperprior", ICLR 2018; Minnen
et al., "Joint autoregressive and hierarchical priors", NeurIPS 2018; Cui et al., "Asymmetric gained
deep image compression", CVPR 2021 (gain vectors).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import Z_LIMIT, ModelConfig, quality_to_lambda
from .mean_branch import MeanBranch
from .post_filter import PostFilter
from .priors import HyperAnalysis, HyperPrior, gaussian_bits, scale_of_index
from .rounding import round_ste
from .scale_branch import ScaleBranch
from .transforms import QUALITY_NODES, Analysis, QualityTable, Synthesis

Relaxation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stands in for coding a pass, differentiably: given values, what is predicted of them and the
table index of each, all (N, channels, places), it returns bits and the symbols that are decoded."""


@dataclass(frozen=True)
class TrainingOutput:
    """What the objective needs: x_hat as x, and the bits of y and of z, (N,) each."""

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
        self.post_filter = PostFilter(c.filter_width, c.filter_blocks) if c.filter_width else None
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

    def forward(
        self,
        x: Tensor,
        quality: Tensor,
        *,
        linear_only: bool = False,
        relax: Relaxation | None = None,
    ) -> TrainingOutput:
        """x (N, 3, H, W) pixels minus 128, H and W multiples of 64; quality (N,).

        relax: what stands in for coding y, where z then is rounded, at the bits of its logistic;
        without one the bits of both are of uniform noise in place of rounding
        (`noise_and_rounding`).
        """
        gain = self.gain(quality)
        y = self.g_a(x, quality, linear_only=linear_only) * gain
        z = self.h_a(y)
        if relax is None:
            z_bits = self.z_prior.bits(z + torch.rand_like(z) - 0.5, quality)
        else:
            z_bits = self.z_prior.rounded_bits(z, quality)
        z_hat = round_ste(z).clamp(-Z_LIMIT, Z_LIMIT)
        with torch.autocast(x.device.type, enabled=False):
            features = self.features(z_hat, quality)
        y_hat, y_bits = self.relaxed_code(y.float(), features, relax or noise_and_rounding)
        x_hat = self.synthesise(y_hat / gain, quality, linear_only=linear_only)
        return TrainingOutput(x_hat, y_bits, z_bits.flatten(1).sum(1))

    def synthesise(self, y_hat: Tensor, quality: Tensor, *, linear_only: bool = False) -> Tensor:
        """y_hat (N, latent, h, w), the gain removed -> x_hat (N, 3, 16h, 16w), pixels minus 128."""
        x_hat: Tensor = self.g_s(y_hat, quality, linear_only=linear_only)
        if self.post_filter is None or linear_only:
            return x_hat
        filtered: Tensor = self.post_filter(x_hat, quality)
        return filtered

    def features(self, z_hat: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """What z says of y, for the mean and for the scale: `features` of the two branches."""
        return self.h_s_mean.features(z_hat, quality), self.h_s_scale.features(z_hat)

    def relaxed_code(
        self, y: Tensor, features: tuple[Tensor, Tensor], relax: Relaxation
    ) -> tuple[Tensor, Tensor]:
        """What coding y would give, differentiably: its reconstruction and its bits, (N,).

        y: scaled latents, (N, latent, h, w); features: what `features` gives, at the same places.
        """
        of_mean, of_scale = features
        with torch.autocast(y.device.type, enabled=False):
            mean = self.h_s_mean.project(of_mean)
        residual = torch.empty_like(y[:, :0])
        symbols = torch.empty_like(y[:, :0])
        bits = y.new_zeros(len(y))
        for number, p in enumerate(self.config.passes):
            prediction = mean[:, p.start : p.stop]
            if p.known:
                correction = self.h_s_mean.correction(number, residual, of_mean)
                index = self.h_s_scale.index(number, of_scale, symbols.detach())
            else:
                correction = torch.zeros_like(prediction)
                index = self.h_s_scale.index(number, of_scale)
            mask = p.mask(y.shape[2], y.shape[3], y.device)
            values = y[:, p.start : p.stop], prediction + correction, index
            cost, found = relax(*(_places(v, mask) for v in values))
            if mask is None:
                coded = found.view(index.shape)
                decoded = coded + correction
            else:
                coded = torch.zeros_like(index)
                coded[:, :, mask] = found
                decoded = coded + correction * mask
            if p.continues:
                decoded, coded = residual[:, p.start :] + decoded, symbols[:, p.start :] + coded
            residual = torch.cat([residual[:, : p.start], decoded], dim=1)
            symbols = torch.cat([symbols[:, : p.start], coded], dim=1)
            bits = bits + cost.flatten(1).sum(1)
        return residual + mean, bits


def _places(values: Tensor, mask: Tensor | None) -> Tensor:
    """(N, channels, h, w) where a pass codes: (N, channels, places), row by row."""
    return values.flatten(2) if mask is None else values[:, :, mask]


def noise_and_rounding(y: Tensor, prediction: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """`Relaxation`: the bits of a Gaussian with additive uniform noise, and straight-through
    rounding."""
    x = y - prediction
    noisy = x + torch.rand_like(x) - 0.5
    return gaussian_bits(noisy, scale_of_index(index)), round_ste(x)
