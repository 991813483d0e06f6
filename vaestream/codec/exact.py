"""The scale branch as it runs in the codec: integers in, integers out, on any device.

The products run as matrix multiplications of float32 tensors that hold integers. Every operand
fits the 8-bit significand of bfloat16 and every partial sum stays below 2**24
(`ScaleBranch.integer_layers` checks both ends), so the result is exact in whatever order a library
sums, and also where the user has allowed TF32 or bfloat16 inside float32 products. Convolution
kernels are avoided because they may use Winograd's algorithm, which is not exact.
"""

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vaestream.errors import WeightsError

from .config import Z_LIMIT
from .priors import MAGNITUDE_LIMIT, MAGNITUDE_UNIT, IntegerLayer, ScaleLayers
from .transforms import depth_to_space


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
            x = F.pad(hidden.permute(0, 2, 3, 1).to(self._dtype), (0, 0, 1, 1, 1, 1))
            hidden = depth_to_space(_convolve(x, operand).permute(0, 3, 1, 2), 2)
        return hidden[0].permute(1, 2, 0)

    def indices(
        self,
        number: int,
        features: Tensor,
        symbols: Tensor | None = None,
        grids: Sequence[tuple[tuple[int, int], int]] = (((0, 0), 1),),
    ) -> Tensor:
        """Table index of every symbol of a pass: (tiles, h, w, channels) uint8 in [0, 63].

        features: (tiles, h, w, scale_width), any parts of what `features` gives. symbols: (tiles,
        h, w, known), integers in any dtype, 0 where not known; for a pass that has a context.
        grids: `CodingPass.grids`; elsewhere the result is 0.
        """
        around, context = None, self._contexts[number]
        if context is not None:
            assert symbols is not None
            magnitudes = symbols.abs().clamp_max(MAGNITUDE_LIMIT).to(self._dtype)
            around = F.pad(magnitudes.mul_(MAGNITUDE_UNIT), (0, 0, 1, 1, 1, 1))
        index = self._indices[number]
        found = torch.zeros(
            (*features.shape[:3], len(index.bias)), dtype=torch.uint8, device=features.device
        )
        for (row, column), stride in grids:
            x = features[:, row::stride, column::stride].to(self._dtype)
            if not x.numel():
                continue
            if context is not None and around is not None:
                hidden = _convolve(around[:, row:, column:], context, stride, beside=x)
                x = torch.cat([x, hidden.to(self._dtype)], dim=3)
            found[:, row::stride, column::stride] = _multiply(x, index)
        return found

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
                symbols = _test_pattern(known, *features.shape[:2]).to(self._device)[None]
            index = self.indices(number, features[None], symbols)
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
        if dtype.is_floating_point:
            # A power of two scales without rounding: what is left of the shift is truncation.
            self.matrix *= 2.0**-layer.shift
            self.bias *= 2.0**-layer.shift

    def requantise(self, acc: Tensor) -> Tensor:
        """Products with the matrix, changed in place -> uint8."""
        acc += self.bias
        if not acc.is_floating_point():
            acc >>= self.shift
        return acc.clamp_(0, self.limit).to(torch.uint8)


def _multiply(x: Tensor, operand: _Operand) -> Tensor:
    """(..., inputs) -> (..., outputs) uint8."""
    with torch.autocast(x.device.type, enabled=False):
        return operand.requantise(torch.matmul(x, operand.matrix))


def _convolve(
    around: Tensor, operand: _Operand, stride: int = 1, beside: Tensor | None = None
) -> Tensor:
    """3x3 over (n, rows, columns, C), without padding, plus 1x1 over `beside`, to uint8."""
    count, rows, columns, channels = around.shape
    height, width = (rows - 3) // stride + 1, (columns - 3) // stride + 1
    outputs = operand.matrix.shape[1]
    acc = torch.empty((count, height * width, outputs), dtype=around.dtype, device=around.device)
    # Three neighbours side by side; the rows above and below are then slices of the same tensor.
    last = stride * (width - 1) + 1
    x = torch.cat([around[:, :, dx : dx + last : stride] for dx in range(3)], dim=3)
    last = stride * (height - 1) + 1
    with torch.autocast(x.device.type, enabled=False):
        for number in range(count):
            for dy, matrix in enumerate(operand.matrix[: 9 * channels].chunk(3)):
                row = x[number, dy : dy + last : stride].reshape(height * width, 3 * channels)
                if dy == 0:
                    torch.mm(row, matrix, out=acc[number])
                else:
                    acc[number].addmm_(row, matrix)
            if beside is not None:
                row = beside[number].reshape(height * width, -1)
                acc[number].addmm_(row, operand.matrix[9 * channels :])
    return operand.requantise(acc).view(count, height, width, outputs)


def _test_pattern(channels: int, height: int, width: int) -> Tensor:
    """(height, width, channels) int32 over [-255, 255], mostly small, the same everywhere."""
    n = torch.arange(channels * height * width, dtype=torch.int64)
    noise = (n * 2654435761 + 12345) % 4294967296 >> 8
    wide = noise % (2 * Z_LIMIT + 1) - Z_LIMIT
    small = noise % 9 - 4
    pattern = torch.where(n % 5 == 0, wide, small).reshape(channels, height, width)
    return pattern.permute(1, 2, 0).to(torch.int32)
