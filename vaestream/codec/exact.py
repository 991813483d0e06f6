"""The scale branch as it runs in the codec: integers in, integers out, on any device.

The products run as matrix multiplications of float32 tensors that hold integers. Every operand
fits the 8-bit significand of bfloat16 and every partial sum stays below 2**24
(`ScaleBranch.integer_layers` checks both ends), so the result is exact in whatever order a library
sums, and also where the user has allowed TF32 or bfloat16 inside float32 products. Convolution
kernels are avoided because they may use Winograd's algorithm, which is not exact.
"""

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from vaestream.errors import WeightsError

from .hyperprior import NUM_SCALES, Z_LIMIT, ScaleBranch
from .transforms import depth_to_space

_ROWS_AT_ONCE = 1 << 14


class ExactScaleBranch:
    """Table indices from z_hat, equal on every device, batch, thread count and torch setting."""

    def __init__(self, layers: list[tuple[Tensor, Tensor, int]], device: torch.device) -> None:
        """layers: `ScaleBranch.integer_layers()`."""
        self._layers = layers
        self._device = device
        self._set_dtype(torch.float32)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._operands = [
            # (out, in, kh, kw) -> (kh*kw*in, out), rows ordered as `_neighbourhoods` gathers them
            (
                weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).to(self._device, dtype),
                bias.to(self._device, dtype),
                shift,
            )
            for weight, bias, shift in self._layers
        ]

    def features(self, z_hat: Tensor) -> Tensor:
        """(1, hyper, h, w) integers in [-255, 255] -> (4h, 4w, scale_width) uint8."""
        hidden = z_hat
        for operand in self._operands[:2]:
            hidden = depth_to_space(self._layer(hidden, operand, 255, radius=1), 2)
        return hidden[0].permute(1, 2, 0)

    def indices(self, features: Tensor) -> Tensor:
        """(h, w, scale_width) uint8, any part of `features` -> (h, w, latent) uint8 in [0, 63]."""
        hidden = features.permute(2, 0, 1)[None]
        out = self._layer(hidden, self._operands[2], NUM_SCALES - 1, radius=0)
        return out[0].permute(1, 2, 0)

    def _layer(
        self, x: Tensor, operand: tuple[Tensor, Tensor, int], limit: int, *, radius: int
    ) -> Tensor:
        """clamp((weight * x + bias + half) >> shift, 0, limit) as uint8; x (1, C, H, W)."""
        weight, bias, shift = operand
        _, _, height, width = x.shape
        x = x[0].permute(1, 2, 0).to(self._dtype)
        x = F.pad(x, (0, 0, radius, radius, radius, radius))
        step = max(1, _ROWS_AT_ONCE // width)
        out = torch.empty((height, width, weight.shape[1]), dtype=torch.uint8, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for top in range(0, height, step):
                rows = x[top : top + step + 2 * radius]
                acc = torch.matmul(_neighbourhoods(rows, radius), weight).add_(bias)
                # A power of two scales without rounding, so floor is the arithmetic shift.
                acc.add_(float(1 << (shift - 1))).mul_(2.0**-shift).floor_().clamp_(0, limit)
                out[top : top + step] = acc
        return out.permute(2, 0, 1)[None]

    def self_test(self, expected: int) -> None:
        """Compare with the answer that integer arithmetic gave when the weights were written.

        Falls back to float64 where float32 does not count exactly. Raises WeightsError if that
        does not help either.
        """
        for dtype in (torch.float32, torch.float64):
            if dtype != self._dtype:
                self._set_dtype(dtype)
            z_hat = _test_pattern(self._layers[0][0].shape[1]).to(self._device)
            answer = self.indices(self.features(z_hat)).cpu().contiguous()
            if zlib.crc32(answer.numpy().tobytes()) == expected:
                return
        raise WeightsError(
            f"integer arithmetic on {self._device} gives wrong results: bitstreams would not decode"
        )


def known_answer(branch: ScaleBranch) -> int:
    """CRC-32 of the indices of a test pattern, computed in 64-bit integers."""
    hidden = _test_pattern(branch.up1.in_channels).long()
    for (weight, bias, shift), radius, limit in zip(
        branch.integer_layers(), (1, 1, 0), (255, 255, NUM_SCALES - 1), strict=True
    ):
        padded = F.pad(hidden[0].permute(1, 2, 0), (0, 0, radius, radius, radius, radius))
        matrix = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).long()
        acc = torch.matmul(_neighbourhoods(padded, radius), matrix) + bias.long()
        out = ((acc + (1 << (shift - 1))) >> shift).clamp(0, limit).permute(2, 0, 1)[None]
        hidden = depth_to_space(out, 2) if radius else out
    answer = hidden[0].permute(1, 2, 0).to(torch.uint8).contiguous()
    return zlib.crc32(answer.numpy().tobytes())


def _neighbourhoods(x: Tensor, radius: int) -> Tensor:
    """(H + 2r, W + 2r, C) -> (H, W, (2r+1)**2 * C), every position's square of neighbours."""
    if radius == 0:
        return x
    height, width = x.shape[0] - 2 * radius, x.shape[1] - 2 * radius
    span = range(2 * radius + 1)
    return torch.cat([x[dy : dy + height, dx : dx + width] for dy in span for dx in span], dim=2)


def _test_pattern(channels: int) -> Tensor:
    """(1, channels, 5, 7) int32 over all of [-255, 255], mostly small, the same everywhere."""
    n = torch.arange(channels * 35, dtype=torch.int64)
    noise = (n * 2654435761 + 12345) % 4294967296 >> 8
    wide = noise % (2 * Z_LIMIT + 1) - Z_LIMIT
    small = noise % 9 - 4
    return torch.where(n % 5 == 0, wide, small).reshape(1, channels, 5, 7).to(torch.int32)
