"""The post-filter: what sees the picture itself, after the synthesis.

The synthesis makes each 16x16 block of its linear path from one latent position, and corrects it in
blocks of 4x4, so it never sees how its pixels meet or which edges run through them. The post-filter
does: a few small convolutions on groups of 2x2 pixels. It takes the detail of the picture in units
of the coding error that a quality leaves, so that one network serves all qualities: what is noise
at one is detail at another.

Sources: Tsai et al., "Adaptive loop filtering for video coding", IEEE JSTSP 2013 (filters chosen by
local structure after decoding gain where transforms are simple); Zhang et al., "Beyond a Gaussian
denoiser", IEEE TIP 2017 (a small network that predicts the residual error).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import convolve_add, convolve_relu
from .transforms import STRIDE, QualityTable, depth_to_space, space_to_depth

GROUP = 2
"""Pixels a side of what shares a position."""

_CHANNELS = 3 * GROUP * GROUP
_UNITS = 8.84, 1.576
"""Levels, at quality 0 and 100 and log-linear between them: about 0.7 of the root mean squared
error there."""


class PostFilter(nn.Module):
    """Residual blocks of two 3x3 convolutions, over groups of 2x2 pixels, between one into their
    channels and one back. The last starts at zero."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(_CHANNELS, width, 3, padding=1)
        self.condition = QualityTable(width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, _CHANNELS, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """A picture, (N, 3, H, W) float32 levels, H and W even -> the same, filtered."""
        return depth_to_space(self.grouped(space_to_depth(x, GROUP), quality), GROUP)

    def grouped(self, x: Tensor, quality: Tensor) -> Tensor:
        """`forward` on groups of pixels, (N, 12, H/2, W/2), as `space_to_depth` gives them.

        What is added to all levels is added to the result: only detail is looked at.
        """
        low, high = _UNITS
        unit = low * (high / low) ** (quality.float()[:, None, None, None] / 100)
        detail = _detail(x).div_(unit)
        hidden = self.first(detail.to(self.first.weight.dtype))
        hidden = self.condition.shift_relu(hidden, quality)
        change: Tensor = self.last(self.blocks(hidden))
        return x + change * unit


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        nn.init.normal_(self.two.weight, std=0.02)
        nn.init.zeros_(self.two.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return convolve_add(convolve_relu(x, self.one), self.two, x)


def filter_reach(blocks: int) -> int:
    """Groups beyond its own that a filtered pixel may depend on: one for the mean around, the
    others for the convolutions."""
    return 3 + 2 * blocks


def filter_radius(blocks: int) -> int:
    """The same in latents, rounded up."""
    return -(-GROUP * filter_reach(blocks) // STRIDE)


def _detail(x: Tensor) -> Tensor:
    """Groups of pixels less the mean of the 3x3 groups around: their level itself says nothing, and
    would drown in 8 bits what does."""
    n, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, height, width, GROUP * GROUP, 3)
    a, b, c, d = pixels.unbind(3)
    # Sums of shifted slices: on CPUs several times as fast as pooling, with colours last.
    around = F.pad(a + b + c + d, (0, 0, 1, 1, 1, 1))
    around = around[:, :-2] + around[:, 1:-1] + around[:, 2:]
    around = around[:, :, :-2] + around[:, :, 1:-1] + around[:, :, 2:]
    rows, columns = (_neighbours(side, x) for side in (height, width))
    around = around / (GROUP * GROUP * rows[:, None, None] * columns[:, None])
    detail = pixels - around[..., None, :]
    return detail.view(n, height, width, channels).permute(0, 3, 1, 2)


def _neighbours(side: int, like: Tensor) -> Tensor:
    """How many of itself and the two next to it a position has, (side,): fewer at the ends."""
    count = like.new_full((side,), 3)
    count[0] -= 1
    count[-1] -= 1
    return count
