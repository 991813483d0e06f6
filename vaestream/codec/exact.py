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

from .config import Z_LIMIT
from .priors import MAGNITUDE_LIMIT, MAGNITUDE_UNIT, IntegerLayer, ScaleLayers
from .transforms import depth_to_space

_ROWS_AT_ONCE = 1 << 14


class ExactScaleBranch:
    """Table indices, equal on every device, batch, thread count and torch setting."""

    def __init__(
        self, layers: ScaleLayers, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """dtype: float32, float64 or, for reference, int64."""
        self._layers = layers
        self._device = device
        self._set_dtype(dtype)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._up = [_Operand(layer, self._device, dtype) for layer in self._layers.up]
        self._contexts = [
            None if p.context is None else _Operand(p.context, self._device, dtype)
            for p in self._layers.passes
        ]
        self._indices = [_Operand(p.index, self._device, dtype) for p in self._layers.passes]

    def features(self, z_hat: Tensor) -> Tensor:
        """(1, hyper, h, w) integers in [-255, 255] -> (4h, 4w, scale_width) uint8."""
        hidden = z_hat
        for operand in self._up:
            x = hidden[0].permute(1, 2, 0).to(self._dtype)
            hidden = depth_to_space(_convolve(x, operand).permute(2, 0, 1)[None], 2)
        return hidden[0].permute(1, 2, 0)

    def indices(self, number: int, features: Tensor, symbols: Tensor | None = None) -> Tensor:
        """Table index of every symbol of a pass: (h, w, channels) uint8 in [0, 63].

        features: (h, w, scale_width), any part of what `features` gives. symbols: (h, w, known),
        integers in any dtype, 0 where not known; for a pass that has a context.
        """
        x = features.to(self._dtype)
        operand = self._contexts[number]
        if operand is not None:
            assert symbols is not None
            magnitudes = symbols.abs().clamp_max(MAGNITUDE_LIMIT).to(self._dtype)
            hidden = _convolve(magnitudes.mul_(MAGNITUDE_UNIT), operand, beside=x)
            x = torch.cat([x, hidden.to(self._dtype)], dim=2)
        return _multiply(x, self._indices[number])

    def self_test(self, expected: int) -> None:
        """Compare with the answer that integer arithmetic gave when the weights were written.

        Falls back to float64 where float32 does not count exactly. Raises WeightsError if that
        does not help either.
        """
        for dtype in (torch.float32, torch.float64):
            if dtype != self._dtype:
                self._set_dtype(dtype)
            if self.answer() == expected:
                return
        raise WeightsError(
            f"integer arithmetic on {self._device} gives wrong results: bitstreams would not decode"
        )

    def answer(self) -> int:
        """CRC-32 of the indices of a test pattern, pass after pass."""
        inputs = self._layers.up[0].matrix.shape[0] // 9
        pattern = _test_pattern(inputs, 5, 7).permute(2, 0, 1)[None]
        features = self.features(pattern.to(self._device))
        crc = 0
        for number, layer in enumerate(self._layers.passes):
            symbols = None
            if layer.context is not None:
                known = (layer.context.matrix.shape[0] - features.shape[2]) // 9
                symbols = _test_pattern(known, *features.shape[:2]).to(self._device)
            index = self.indices(number, features, symbols)
            crc = zlib.crc32(index.cpu().contiguous().numpy().tobytes(), crc)
        return crc


class _Operand:
    """An integer layer on a device, in the dtype it computes in."""

    def __init__(self, layer: IntegerLayer, device: torch.device, dtype: torch.dtype) -> None:
        self.matrix = layer.matrix.to(device, dtype)
        # With the half that makes the shift round.
        self.bias = (layer.bias + (1 << (layer.shift - 1))).to(device, dtype)
        self.shift = layer.shift
        self.limit = layer.limit


def _multiply(x: Tensor, operand: _Operand) -> Tensor:
    """(..., inputs) -> (..., outputs) uint8."""
    with torch.autocast(x.device.type, enabled=False):
        acc = torch.matmul(x, operand.matrix).add_(operand.bias)
    if acc.is_floating_point():
        # A power of two scales without rounding, so floor is the arithmetic shift.
        acc.mul_(2.0**-operand.shift).floor_()
    else:
        acc >>= operand.shift
    return acc.clamp_(0, operand.limit).to(torch.uint8)


def _convolve(x: Tensor, operand: _Operand, beside: Tensor | None = None) -> Tensor:
    """3x3 with zero padding over x (h, w, C), plus 1x1 over `beside`: (h, w, outputs) uint8."""
    height, width, _ = x.shape
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    step = max(1, _ROWS_AT_ONCE // width)
    parts = []
    for top in range(0, height, step):
        rows = min(step, height - top)
        inputs = [
            x[top + dy : top + dy + rows, dx : dx + width] for dy in range(3) for dx in range(3)
        ]
        if beside is not None:
            inputs.append(beside[top : top + rows])
        parts.append(_multiply(torch.cat(inputs, dim=2), operand))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _test_pattern(channels: int, height: int, width: int) -> Tensor:
    """(height, width, channels) int32 over [-255, 255], mostly small, the same everywhere."""
    n = torch.arange(channels * height * width, dtype=torch.int64)
    noise = (n * 2654435761 + 12345) % 4294967296 >> 8
    wide = noise % (2 * Z_LIMIT + 1) - Z_LIMIT
    small = noise % 9 - 4
    pattern = torch.where(n % 5 == 0, wide, small).reshape(channels, height, width)
    return pattern.permute(1, 2, 0).to(torch.int32)
