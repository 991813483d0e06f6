"""What the encoder really codes, as training sees it: dead zones, and bits by counted tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vaestream.codec.config import NUM_SCALES
from vaestream.codec.entropy import Table
from vaestream.codec.rate_control import rounding_offset

_MAGNITUDES = 64
_ESCAPE_BITS = 8.0  # of the value itself: a varint, mostly of one byte


class RealCoding:
    """A `Relaxation` that takes the encoder at its word.

    With noise in place of rounding, the networks learn for symbols that lie evenly around each
    value and cost what a Gaussian gives them. Real symbols have a dead zone, and tables that were
    counted: here both are as in coding. Gradients: the table index sees the cost of the symbol in
    the neighbouring tables, the latents the slope of the cost under noise and the reconstruction
    straight through, and the prediction the error that it leaves where a symbol does not change.

    Source: Guo et al., "Soft then hard: rethinking the quantization in neural image compression",
    ICML 2021 (the two phases).
    """

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        """tables: counted, one a table index."""
        bits = torch.stack([_bits_of(table) for table in tables]).to(device)
        rows = torch.arange(NUM_SCALES, device=device)
        above, below = (rows + 1).clamp_max(NUM_SCALES - 1), (rows - 1).clamp_min(0)
        # By index and magnitude: bits, and how they grow from one to the next of either.
        self._bits = bits.flatten()
        self._by_index = ((bits[above] - bits[below]) / 2).flatten()
        self._by_magnitude = torch.diff(bits, dim=1, append=bits[:, -1:]).flatten()
        self._offset = rounding_offset(bits[:, 1] - bits[:, 0])

    def __call__(self, y: Tensor, prediction: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        x = y - prediction
        row, value = index.detach().long(), x.detach()
        symbol = torch.copysign(torch.floor(value.abs() + self._offset[row]), value)
        cell = _cell(row, symbol)
        noisy = value + torch.rand_like(value) - 0.5
        rise = self._by_magnitude[_cell(row, noisy)] * torch.sign(noisy)
        bits = self._bits[cell] + self._by_index[cell] * (index - index.detach())
        return bits + rise * (x - value), symbol + (y - y.detach())


def _cell(row: Tensor, value: Tensor) -> Tensor:
    return row * _MAGNITUDES + value.abs().long().clamp_max(_MAGNITUDES - 1)


def _bits_of(table: Table) -> Tensor:
    """Bits of a symbol by its magnitude, (_MAGNITUDES,), the mean over its signs."""
    counts = torch.from_numpy(table.counts).double()
    bits = torch.log2(counts.sum()) - torch.log2(counts)
    radius = min(-table.low, _MAGNITUDES - 1)
    inside = bits[-table.low - radius : -table.low + radius + 1]
    found = torch.full((_MAGNITUDES,), float(bits[-1]) + _ESCAPE_BITS)
    found[: radius + 1] = ((inside + inside.flip(0)) / 2)[radius:].float()
    return found
