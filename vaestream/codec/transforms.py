"""Analysis and synthesis transforms, g_a and g_s.

Each is the sum of two paths:

    x ─┬─ 16x16 block transform (linear, float32) ───────────────┬─▶ y
       └─ 3x3 at 1/4 ▸ residual blocks at 1/8 ▸ blocks at 1/16 ──┘

The linear path starts as a 16x16 DCT of a decorrelated colour space, so an untrained model is
already a classical transform codec and the network learns only what that misses (the idea of
AuxT: Li et al., "On Disentangled Training for Nonlinear Transform in Learned Image Compression",
ICLR 2025). It learns in float32 because its large low-frequency values need more than the 8 bits
of bfloat16; the network's correction does not, nor do the linear path's other channels when coding
(`vaestream.codec.networks`).

Everything is local: no global pooling and no normalisation, so a photo may be cut into windows
that overlap by `receptive_radius` latents and every window gives the same values as the whole.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import convolve_add, convolve_relu
from .windows import NO_MARGINS, Margins

STRIDE = 16
"""Pixels a latent position spans in each direction."""

CORRECTION_UNIT = 16
"""What the network paths give is in this unit, so that their weights stay near one."""

QUALITY_NODES = 11
"""Nodes of every quality-dependent table: one every 10 quality units."""


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """(N, C, H, W) -> (N, block*block*C, H/block, W/block), channels ordered (dy, dx, c).

    Unlike `torch.pixel_unshuffle` (c, dy, dx), this order copies runs of block*C neighbours when
    the memory is channels-last, several times faster on CPUs.
    """
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h // block, block, w // block, block * c)
    x = x.permute(0, 1, 3, 2, 4).reshape(n, h // block, w // block, block * block * c)
    return x.permute(0, 3, 1, 2)


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """Inverse of `space_to_depth`: (N, block*block*C, H, W) -> (N, C, H*block, W*block)."""
    n, c, h, w = x.shape
    c //= block * block
    x = x.permute(0, 2, 3, 1).reshape(n, h, w, block, block * c)
    x = x.permute(0, 1, 3, 2, 4).reshape(n, h * block, w * block, c)
    return x.permute(0, 3, 1, 2)


def signed_log(x: Tensor) -> Tensor:
    """sign(x) * ln(1 + |x|): tames the few huge values without losing the small ones."""
    return torch.copysign(torch.log1p(x.abs()), x)


class QualityTable(nn.Module):
    """A vector for every quality in [0, 100], linear between learned nodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.nodes = nn.Parameter(torch.zeros(QUALITY_NODES, channels))

    def forward(self, quality: Tensor) -> Tensor:
        """(N,) qualities -> (N, channels, 1, 1)."""
        position = quality.float() * ((QUALITY_NODES - 1) / 100)
        low = position.floor().clamp(0, QUALITY_NODES - 2)
        fraction = (position - low)[:, None]
        index = low.long()
        return torch.lerp(self.nodes[index], self.nodes[index + 1], fraction)[:, :, None, None]

    def shift_relu(self, hidden: Tensor, quality: Tensor) -> Tensor:
        """ReLU of hidden, (N, channels, h, w), plus the vector of its quality: in place."""
        return F.relu(hidden.add_(self(quality).to(hidden.dtype)), inplace=True)


class Bottleneck(nn.Module):
    """Residual 1x1 -> 3x3 -> 1x1 at half the width; the residual path starts at zero.

    What it is given may be overwritten with what it gives (`convolve_add`).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.mix = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)
        self.expand = nn.Conv2d(channels // 2, channels, 1)
        nn.init.normal_(self.expand.weight, std=0.1 / math.sqrt(channels))
        nn.init.zeros_(self.expand.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        hidden = convolve_relu(convolve_relu(x, self.reduce), self.mix)
        return convolve_add(hidden, self.expand, x)


def dct_basis(latent_channels: int) -> Tensor:
    """Rows of an orthonormal 16x16x3 transform: DCT-II in space, a luma-chroma rotation in colour.

    Returns (latent_channels, 768) float32, columns ordered as two `space_to_depth(x, 4)` in a row
    order them. Three quarters of the rows are luma, the rest split between the two chroma axes;
    they are ordered about as their energy falls in photos.
    """
    n = torch.arange(STRIDE, dtype=torch.float64)
    dct = torch.cos(math.pi * (n[None, :] + 0.5) * n[:, None] / STRIDE) * math.sqrt(2 / STRIDE)
    dct[0] /= math.sqrt(2)
    # Orthonormal stand-in for YCbCr: grey axis, then blue-yellow and red-green oppositions.
    colour = torch.tensor([[1.0, 1, 1], [-0.5, -0.5, 1.0], [1.0, -1.0, 0.0]], dtype=torch.float64)
    colour /= colour.norm(dim=1, keepdim=True)
    frequencies = sorted(
        ((u, v) for u in range(STRIDE) for v in range(STRIDE)),
        key=lambda f: (math.hypot(f[0], f[1]), f),
    )
    chroma = latent_channels // 8
    luma = latent_channels - 2 * chroma
    # In photos, chroma falls off with frequency about four times as fast as luma.
    chosen = sorted(
        (math.hypot(u, v) if axis == 0 else 1 + 4 * math.hypot(u, v), axis, u, v)
        for axis, count in ((0, luma), (1, chroma), (2, chroma))
        for u, v in frequencies[:count]
    )
    rows = [
        space_to_depth(
            space_to_depth(torch.einsum("c,i,j->cij", colour[axis], dct[u], dct[v])[None], 4), 4
        ).reshape(-1)
        for _, axis, u, v in chosen
    ]
    return torch.stack(rows).float()


class Analysis(nn.Module):
    """g_a: picture -> latents y.

    Input (N, 3, H, W), H and W multiples of 16, pixel values minus 128 (exact in bfloat16).
    Output (N, latent_channels, H/16, W/16) float32.
    """

    def __init__(self, latent: int, width8: int, width16: int, blocks8: int, blocks16: int) -> None:
        super().__init__()
        self.linear = nn.Parameter(dct_basis(latent))
        self.stem = nn.Conv2d(48, width8, 3, stride=2, padding=1)
        self.condition = QualityTable(width8)
        self.blocks8 = nn.Sequential(*(Bottleneck(width8) for _ in range(blocks8)))
        self.down = nn.Conv2d(width8, width16, 2, stride=2)
        self.blocks16 = nn.Sequential(*(Bottleneck(width16) for _ in range(blocks16)))
        self.project = nn.Conv2d(width16, latent, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, quality: Tensor, *, linear_only: bool = False) -> Tensor:
        quarter = space_to_depth(x, 4)
        y = _pointwise(space_to_depth(quarter, 4), self.linear)
        if linear_only:
            return y
        return torch.add(y, self.correction(quarter, quality), alpha=CORRECTION_UNIT)

    def correction(self, quarter: Tensor, quality: Tensor, margins: Margins = NO_MARGINS) -> Tensor:
        """The network's path, (N, latent, h, w) in units of CORRECTION_UNIT, without margins.

        quarter: pixels minus 128, gathered 4x4, (N, 48, H/4, W/4), the margins included.
        """
        hidden = _convolve_64ths(quarter, self.stem)
        hidden = self.condition.shift_relu(hidden, quality)
        hidden = self.blocks8(hidden)
        hidden = self.blocks16(self.down(hidden))
        correction: Tensor = self.project(hidden)
        return margins.crop(correction)[0]


class Synthesis(nn.Module):
    """g_s: latents y_hat -> picture.

    Input (N, latent_channels, H/16, W/16) float32. Output (N, 3, H, W) float32, pixel values
    minus 128, not clamped.
    """

    def __init__(self, latent: int, width8: int, width16: int, blocks8: int, blocks16: int) -> None:
        super().__init__()
        self.linear = nn.Parameter(dct_basis(latent).t().contiguous())
        self.project = nn.Conv2d(latent, width16, 1)
        self.condition = QualityTable(width16)
        self.blocks16 = nn.Sequential(*(Bottleneck(width16) for _ in range(blocks16)))
        self.up = nn.Conv2d(width16, 4 * width8, 1)
        self.blocks8 = nn.Sequential(*(Bottleneck(width8) for _ in range(blocks8)))
        self.expand = nn.Conv2d(width8, 4 * 32, 1)
        self.head = nn.Conv2d(32, 48, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, y_hat: Tensor, quality: Tensor, *, linear_only: bool = False) -> Tensor:
        linear = depth_to_space(_pointwise(y_hat, self.linear), 4)
        if not linear_only:
            correction = self.correction(y_hat, quality)
            linear = torch.add(linear, correction, alpha=CORRECTION_UNIT)
        return depth_to_space(linear, 4)

    def correction(self, y_hat: Tensor, quality: Tensor, margins: Margins = NO_MARGINS) -> Tensor:
        """The network's path, (N, 48, 4h, 4w), in units of CORRECTION_UNIT levels, without margins.

        y_hat: as for `forward`, the margins included.
        """
        hidden = _convolve_64ths(y_hat, self.project)
        hidden = self.condition.shift_relu(hidden, quality)
        # What is copied anyway costs nothing to crop.
        seen = receptive_radius(len(self.blocks8), 0)
        hidden, margins = margins.crop(self.blocks16(hidden), keep=seen)
        hidden, margins = depth_to_space(self.up(hidden), 2), margins.scaled(2)
        hidden, margins = margins.crop(convolve_relu(self.blocks8(hidden), self.expand), keep=1)
        correction: Tensor = self.head(depth_to_space(hidden, 2))
        return margins.scaled(2).crop(correction)[0]


def receptive_radius(blocks8: int, blocks16: int) -> int:
    """Latents beyond its own position that a value of g_a or g_s may depend on, rounded up."""
    pixels = 8 * blocks8 + STRIDE * blocks16 + 8
    return -(-pixels // STRIDE)


def _convolve_64ths(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """The layer over x / 64, in its dtype. A power of two divides the weights as exactly as x,
    which is larger."""
    weight = layer.weight
    return F.conv2d(x.to(weight.dtype), weight / 64, layer.bias, layer.stride, layer.padding)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution in float32, whatever autocast says: (N, C, H, W) by (out, C)."""
    with torch.autocast(x.device.type, enabled=False):
        n, c, h, w = x.shape
        # Two dimensions: with four, some memory layouts take a far slower batched product.
        out = F.linear(x.permute(0, 2, 3, 1).reshape(-1, c), weight.float())
        return out.view(n, h, w, -1).permute(0, 3, 1, 2)
