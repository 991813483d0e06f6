"""What symbols cost by counted tables, as tensors, for whoever weighs bits against error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import NUM_SCALES
from .entropy import Table
from .rounding import rounding_offset

_MAGNITUDES = 64
_ESCAPE_BITS = 8.0  # of the value itself: a varint, mostly of one byte


class CodingCosts:
    """Bits of a symbol by its table and magnitude, and how they change with either.

    All methods take table indices (int64) and values of one shape and return float32 of that shape.
    Magnitudes beyond 63 count as 63.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        """tables: counted, one a table index."""
        bits = torch.stack([_bits_of(table) for table in tables]).to(device)
        rows = torch.arange(NUM_SCALES, device=device)
        above, below = (rows + 1).clamp_max(NUM_SCALES - 1), (rows - 1).clamp_min(0)
        self._bits = bits.flatten()
        self._by_index = ((bits[above] - bits[below]) / 2).flatten()
        first, second = torch.diff(bits[:, :3]).unbind(1)
        self._offset = torch.cat(rounding_offset(first, second))

    def round(self, index: Tensor, value: Tensor) -> Tensor:
        """The symbols that the encoder makes of values: rounded with a dead zone."""
        magnitude = value.abs()
        offset = self._offset[index + NUM_SCALES * (magnitude >= 1)]
        return torch.copysign(torch.floor(magnitude + offset), value)

    def bits(self, index: Tensor, symbol: Tensor) -> Tensor:
        """Bits of symbols."""
        return self._bits[_cell(index, symbol)]

    def by_index(self, index: Tensor, symbol: Tensor) -> Tensor:
        """How the bits grow from one table to the next, taken on both sides."""
        return self._by_index[_cell(index, symbol)]

    def slope(self, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """How the bits of a value's symbol grow with it, if half a step of uniform noise to either
        side is added before it is rounded; and whether that can change the symbol at all."""
        magnitude = value.abs()
        larger = self.round(index, magnitude + 0.5)
        smaller = self.round(index, magnitude - 0.5).abs()
        rise = self.bits(index, larger) - self.bits(index, smaller)
        return rise * torch.sign(value), larger != smaller


def _cell(index: Tensor, value: Tensor) -> Tensor:
    return index * _MAGNITUDES + value.abs().long().clamp_max(_MAGNITUDES - 1)


def _bits_of(table: Table) -> Tensor:
    """Bits of a symbol by its magnitude, (_MAGNITUDES,), the mean over its signs."""
    counts = torch.from_numpy(table.counts).double()
    bits = torch.log2(counts.sum()) - torch.log2(counts)
    radius = min(-table.low, _MAGNITUDES - 1)
    inside = bits[-table.low - radius : -table.low + radius + 1]
    found = torch.full((_MAGNITUDES,), float(bits[-1]) + _ESCAPE_BITS)
    found[: radius + 1] = ((inside + inside.flip(0)) / 2)[radius:].float()
    return found
