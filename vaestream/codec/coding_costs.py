"""What symbols cost by counted tables, as tensors, for whoever weighs bits against error."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .config import NUM_SCALES
from .entropy import MAGNITUDES, Table
from .lattice import LatticeRounding
from .rounding import DEAD_ZONE, rounding_offsets


class CodingCosts:
    """Bits of a symbol by its table and magnitude, and how they change with either.

    Methods take table indices (int64) and values of one shape, any but for `code`, and what they
    return is float32 of that shape, `slope`'s second part bool.
    Magnitudes beyond 63 count as 63. offsets: `rounding_offsets`, flat.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        device: torch.device,
        lattice: LatticeRounding | None = None,
        *,
        dead_zone: float = DEAD_ZONE,
    ) -> None:
        """tables: counted, one a table index. lattice: what puts symbols on one, if they are.
        dead_zone: see `rounding_offsets`."""
        self._lattice = lattice
        bits = torch.from_numpy(np.stack([t.magnitude_bits for t in tables])).to(device)
        rows = torch.arange(NUM_SCALES, device=device)
        above, below = (rows + 1).clamp_max(NUM_SCALES - 1), (rows - 1).clamp_min(0)
        self._bits = bits.flatten()
        self._by_index = ((bits[above] - bits[below]) / 2).flatten()
        self.offsets = torch.from_numpy(rounding_offsets(tables, dead_zone)).flatten().to(device)

    def round(self, index: Tensor, value: Tensor) -> Tensor:
        """The symbols that the encoder makes of values: rounded with a dead zone."""
        magnitude = value.abs()
        offset = self.offsets[index + NUM_SCALES * (magnitude >= 1)]
        return torch.copysign(torch.floor(magnitude + offset), value)

    def code(self, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The symbols that the encoder makes of a whole pass of tiles, and their bits.

        All (tiles, channels, places).
        """
        symbols = self.round(index, value)
        if self._lattice is None:
            return symbols, self.bits(index, symbols)
        # As they are coded, the channels of a place side by side.
        upright = symbols.cpu().transpose(1, 2).contiguous()
        flat = upright.flatten(1).numpy()
        flat_index = index.to("cpu", torch.uint8).transpose(1, 2).flatten(1).numpy()
        self._lattice.apply(value.cpu().transpose(1, 2).flatten(1).numpy(), flat_index, flat)
        free = torch.from_numpy(self._lattice.free_bits(flat_index, flat)).view(upright.shape)
        symbols = upright.transpose(1, 2).to(value.device)
        return symbols, self.bits(index, symbols) - free.transpose(1, 2).to(value.device)

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
    return index * MAGNITUDES + value.abs().long().clamp_max(MAGNITUDES - 1)
