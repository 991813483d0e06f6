"""What the encoder really codes, as training sees it: dead zones, and bits by counted tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vaestream.codec.config import NUM_SCALES
from vaestream.codec.entropy import Table
from vaestream.codec.rate_control import rounding_offset

_MAGNITUDES = 256
_MEMORY = 500.0  # batches
_PRIOR_SYMBOLS = 1000.0


class RealCoding:
    """A `Relaxation` that takes the encoder at its word.

    With noise in place of rounding, the networks learn for symbols that lie evenly around each
    value and cost what a Gaussian gives them. Real symbols have a dead zone, and tables that follow
    their counts: here both are as in coding, with counts that follow the training. Gradients: the
    table index sees the cost of the symbol in the neighbouring tables, the latents the slope of the
    cost under noise and the reconstruction straight through, and the prediction the error that it
    leaves where a symbol does not change.

    Source: Guo et al., "Soft then hard: rethinking the quantization in neural image compression",
    ICML 2021 (the two phases).
    """

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        """tables: one a table index, what is known of the symbols before any is counted."""
        prior = torch.zeros(NUM_SCALES, _MAGNITUDES)
        for row, table in zip(prior, tables, strict=True):
            for at, count in enumerate(table.counts[:-1].tolist()):
                row[min(abs(table.low + at), _MAGNITUDES - 1)] += count
        prior += 1
        self._prior = (prior / prior.sum(1, keepdim=True)).to(device)
        self.counts = torch.zeros(NUM_SCALES, _MAGNITUDES, device=device)
        """How often each magnitude came with each index, fading."""
        self._fresh = torch.zeros_like(self.counts)
        self._update()

    def __call__(self, y: Tensor, prediction: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        x = y - prediction
        at, value = index.detach().long(), x.detach()
        symbol = torch.copysign(torch.floor(value.abs() + self._offset[at]), value)
        magnitude = symbol.abs().long().clamp_max(_MAGNITUDES - 1)
        cell = at * _MAGNITUDES + magnitude
        if torch.is_grad_enabled():  # not in a validation
            # Those at the other half of a checkerboard too: few, and alike.
            seen = torch.bincount(cell.flatten(), minlength=self._fresh.numel())
            self._fresh += seen.view_as(self._fresh)
        noisy = value + torch.rand_like(value) - 0.5
        below = noisy.abs().long().clamp_max(_MAGNITUDES - 2)
        rise = self._rise.flatten()[at * _MAGNITUDES + below] * torch.sign(noisy)
        bits = self._bits.flatten()[cell]
        bits = bits + self._slope.flatten()[cell] * (index - index.detach()) + rise * (x - value)
        return bits, symbol + (y - y.detach())

    def advance(self) -> None:
        """Take in what was coded since the last time."""
        self.counts.mul_(1 - 1 / _MEMORY).add_(self._fresh)
        self._fresh.zero_()
        self._update()

    def restore(self, counts: Tensor) -> None:
        """Go on from `counts` of another one."""
        self.counts.copy_(counts)
        self._update()

    def _update(self) -> None:
        mass = self.counts + _PRIOR_SYMBOLS * self._prior
        mass[:, 1:] /= 2  # of either sign
        self._bits = torch.log2(mass.sum(1, keepdim=True) + mass[:, 1:].sum(1, keepdim=True))
        self._bits = self._bits - torch.log2(mass)
        self._offset = rounding_offset(self._bits[:, 1] - self._bits[:, 0])
        self._rise = torch.diff(self._bits, dim=1, append=self._bits[:, -1:])
        rows = torch.arange(NUM_SCALES, device=mass.device)
        above, under = (rows + 1).clamp_max(NUM_SCALES - 1), (rows - 1).clamp_min(0)
        self._slope = (self._bits[above] - self._bits[under]) / 2
