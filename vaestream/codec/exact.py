"""The scale branch as it runs in the codec: integers in, integers out, on any device.

The products run as matrix multiplications. Mostly they are of float32 tensors that hold integers:
every operand fits the 8-bit significand of bfloat16 and every partial sum stays below 2**24
(`ScaleBranch.integer_layers` checks both ends), so the result is exact in whatever order a library
sums, and also where the user has allowed TF32 or bfloat16 inside float32 products. Convolution
kernels are avoided because they may use Winograd's algorithm, which is not exact. On CPUs with
instructions for it, the passes multiply int8 instead, several times faster.
"""

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vaestream.errors import WeightsError

from .config import Z_LIMIT
from .hardware import multiplies_int8
from .scale_branch import MAGNITUDE_LIMIT, MAGNITUDE_UNIT, IntegerLayer, PassLayers, ScaleLayers
from .transforms import depth_to_space

_INT8_OFFSET = 128  # what is taken from 0..255 to fit


class ExactScaleBranch:
    """Table indices, equal on every device, batch, thread count and torch setting."""

    def __init__(
        self, layers: ScaleLayers, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: what products are computed in, by default the fastest that is exact: float32,
        float64, int8 (where `multiplies_int8`) or, for reference, int64."""
        self._layers = layers
        self._device = device
        if dtype is None:
            dtype = torch.int8 if multiplies_int8(device) else torch.float32
        self._set_dtype(dtype)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        wide = torch.float32 if dtype == torch.int8 else dtype
        self._up = [_Operand(layer, self._device, wide) for layer in self._layers.up]
        self._passes: list[_Pass] = [
            _Int8Pass(layers, self._device)
            if dtype == torch.int8
            else _WidePass(layers, self._device, dtype)
            for layers in self._layers.passes
        ]

    def features(self, z_hat: Tensor) -> Tensor:
        """(1, hyper, h, w) integers in [-255, 255] -> (4h, 4w, scale_width) uint8."""
        hidden = z_hat
        for operand in self._up:
            x = F.pad(hidden.permute(0, 2, 3, 1).to(operand.dtype), (0, 0, 1, 1, 1, 1))
            hidden = depth_to_space(operand.convolve(x).permute(0, 3, 1, 2), 2)
        return hidden[0].permute(1, 2, 0)

    def indices(
        self,
        number: int,
        features: Tensor,
        known: Tensor | None = None,
        grids: Sequence[tuple[tuple[int, int], int]] = (((0, 0), 1),),
    ) -> Tensor:
        """Table index of every symbol of a pass: (tiles, h, w, channels) uint8 in [0, 63].

        features: (tiles, h, w, scale_width), any parts of what `features` gives. known: (tiles, h,
        w, known), `magnitudes` of symbols, 0 where not known; for a pass that has a context.
        grids: `CodingPass.grids`; elsewhere the result is 0.
        """
        own = self._passes[number]
        around = None
        if self._layers.passes[number].context is not None:
            assert known is not None
            around = F.pad(own.operand_of(known), (0, 0, 1, 1, 1, 1))
        shape = (*features.shape[:3], own.channels)
        found = torch.zeros(shape, dtype=torch.uint8, device=features.device)
        for (row, column), stride in grids:
            x = features[:, row::stride, column::stride]
            if x.numel():
                near = None if around is None else around[:, row:, column:]
                found[:, row::stride, column::stride] = own.indices(x, near, stride)
        return found

    def self_test(self, expected: int) -> None:
        """Compare with the answer that integer arithmetic gave when the weights were written.

        Falls back to float32, and then to float64, where that does not count exactly. Raises
        WeightsError if that does not help either.
        """
        for dtype in (self._dtype, torch.float32, torch.float64):
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
            known = None
            if layer.context is not None:
                count = (layer.context.matrix.shape[0] - features.shape[2]) // 9
                symbols = _test_pattern(count, *features.shape[:2])
                known = magnitudes(symbols.to(self._device))[None]
            index = self.indices(number, features[None], known)
            crc = zlib.crc32(index.cpu().contiguous().numpy().tobytes(), crc)
        return crc


def magnitudes(symbols: Tensor) -> Tensor:
    """What a context sees of symbols, integers in any dtype: int8 of the same shape."""
    # First clamped: the smallest integer has no absolute value.
    return symbols.clamp(-MAGNITUDE_LIMIT, MAGNITUDE_LIMIT).abs().to(torch.int8)


class _Pass(Protocol):
    """The layers of one pass, in the dtype they compute in."""

    channels: int

    def operand_of(self, known: Tensor) -> Tensor:
        """Magnitudes as `indices` takes them."""

    def indices(self, features: Tensor, around: Tensor | None, stride: int) -> Tensor:
        """features (n, h, w, scale_width) uint8, and the known magnitudes with their neighbours,
        (n, rows, columns, known): the place (i, j) is in the middle of the 3x3 from (stride*i,
        stride*j) on. Returns (n, h, w, channels) uint8."""


class _WidePass:
    """Products in a dtype that holds every sum."""

    def __init__(self, layers: PassLayers, device: torch.device, dtype: torch.dtype) -> None:
        self._context = None if layers.context is None else _Operand(layers.context, device, dtype)
        self._index = _Operand(layers.index, device, dtype)
        self.channels = len(layers.index.bias)

    def operand_of(self, known: Tensor) -> Tensor:
        return known.to(self._index.dtype).mul_(MAGNITUDE_UNIT)

    def indices(self, features: Tensor, around: Tensor | None, stride: int) -> Tensor:
        x = features.to(self._index.dtype)
        if self._context is not None and around is not None:
            hidden = self._context.convolve(around, stride, beside=x)
            x = torch.cat([x, hidden.to(x.dtype)], dim=3)
        return self._index.multiply(x)


class _Int8Pass:
    """Products of int8, summed in int32. What lies in 0..255 is taken 128 lower; the bias makes up
    for it."""

    def __init__(self, layers: PassLayers, device: torch.device) -> None:
        self.channels = len(layers.index.bias)
        self._index = _Int8Operand(layers.index, layers.index.matrix, device)
        self._context: _Int8Operand | None = None
        if layers.context is not None:
            inputs, hidden = layers.context.matrix.shape
            width = layers.index.matrix.shape[0] - hidden  # of the features
            mix, join = layers.context.matrix.tensor_split([inputs - width])
            self._mix = mix.to(device, torch.int8)
            self._context = _Int8Operand(layers.context, join, device)

    def operand_of(self, known: Tensor) -> Tensor:
        return known

    def indices(self, features: Tensor, around: Tensor | None, stride: int) -> Tensor:
        n, h, w, _ = features.shape
        x = _lowered(features)
        if self._context is not None and around is not None:
            taps = _neighbours(around, h, w, stride).reshape(n * h * w, -1)
            mixed = torch._int_mm(taps, self._mix).mul_(MAGNITUDE_UNIT)
            hidden = self._context.multiply(x, plus=mixed)
            x = torch.cat([x, _lowered(hidden)], dim=1)
        return self._index.multiply(x).view(n, h, w, -1)


class _Int8Operand:
    """A matrix that multiplies lowered rows, with all of its layer that comes after the product."""

    def __init__(self, layer: IntegerLayer, matrix: Tensor, device: torch.device) -> None:
        self._matrix = matrix.to(device, torch.int8)
        half = 1 << (layer.shift - 1)
        raised = _INT8_OFFSET * matrix.sum(dim=0, dtype=torch.int32)
        self._bias = (layer.bias + half + raised).to(device, torch.int32)
        self._shift, self._limit = layer.shift, layer.limit

    def multiply(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(rows, inputs) int8, contiguous -> (rows, outputs) uint8. plus: int32, added to sums."""
        acc = torch._int_mm(x, self._matrix)
        if plus is not None:
            acc += plus
        return _requantise(acc, self._bias, self._shift, self._limit)


class _Operand:
    """An integer layer on a device, in the dtype it computes in."""

    def __init__(self, layer: IntegerLayer, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._matrix = layer.matrix.to(device, dtype)
        # With the half that makes the shift round.
        self._bias = (layer.bias + (1 << (layer.shift - 1))).to(device, dtype)
        self._shift = layer.shift
        self._limit = layer.limit
        if dtype.is_floating_point:
            # A power of two scales without rounding: what is left of the shift is truncation.
            self._matrix *= 2.0**-layer.shift
            self._bias *= 2.0**-layer.shift

    def multiply(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs) uint8."""
        with torch.autocast(x.device.type, enabled=False):
            acc = torch.matmul(x, self._matrix)
        return _requantise(acc, self._bias, self._shift, self._limit)

    def convolve(self, around: Tensor, stride: int = 1, beside: Tensor | None = None) -> Tensor:
        """3x3 over (n, rows, columns, C), without padding, plus 1x1 over `beside`, to uint8."""
        count, rows, columns, channels = around.shape
        height, width = (rows - 3) // stride + 1, (columns - 3) // stride + 1
        outputs = self._matrix.shape[1]
        acc = torch.empty(
            (count, height * width, outputs), dtype=around.dtype, device=around.device
        )
        # Three neighbours side by side; the rows above and below are then slices of the same
        # tensor.
        last = stride * (width - 1) + 1
        x = torch.cat([around[:, :, dx : dx + last : stride] for dx in range(3)], dim=3)
        last = stride * (height - 1) + 1
        with torch.autocast(x.device.type, enabled=False):
            for number in range(count):
                for dy, matrix in enumerate(self._matrix[: 9 * channels].chunk(3)):
                    row = x[number, dy : dy + last : stride].reshape(height * width, 3 * channels)
                    if dy == 0:
                        torch.mm(row, matrix, out=acc[number])
                    else:
                        acc[number].addmm_(row, matrix)
                if beside is not None:
                    row = beside[number].reshape(height * width, -1)
                    acc[number].addmm_(row, self._matrix[9 * channels :])
        found = _requantise(acc, self._bias, self._shift, self._limit)
        return found.view(count, height, width, outputs)


def _requantise(acc: Tensor, bias: Tensor, shift: int, limit: int) -> Tensor:
    """Products with a matrix, changed in place -> uint8. Floats come with the shift in them."""
    acc += bias
    if not acc.is_floating_point():
        acc >>= shift
    return acc.clamp_(0, limit).to(torch.uint8)


def _lowered(x: Tensor) -> Tensor:
    """(..., inputs) uint8 -> (rows, inputs) int8, each 128 less."""
    return x.reshape(-1, x.shape[-1]).view(torch.int8) ^ -_INT8_OFFSET


def _neighbours(around: Tensor, height: int, width: int, stride: int) -> Tensor:
    """(n, height, width, 9 * C): the 3x3 of every place, ordered (row, column, channel)."""
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    return torch.cat(
        [
            around[:, dy : dy + rows : stride, dx : dx + columns : stride]
            for dy in range(3)
            for dx in range(3)
        ],
        dim=3,
    )


def _test_pattern(channels: int, height: int, width: int) -> Tensor:
    """(height, width, channels) int32 over [-255, 255], mostly small, the same everywhere."""
    n = torch.arange(channels * height * width, dtype=torch.int64, device="cpu")
    noise = (n * 2654435761 + 12345) % 4294967296 >> 8
    wide = noise % (2 * Z_LIMIT + 1) - Z_LIMIT
    small = noise % 9 - 4
    pattern = torch.where(n % 5 == 0, wide, small).reshape(channels, height, width)
    return pattern.permute(1, 2, 0).to(torch.int32)
