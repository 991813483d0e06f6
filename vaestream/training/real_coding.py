"""What the encoder really codes, as training sees it: dead zones, and bits by counted tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vaestream.codec.coding_costs import CodingCosts
from vaestream.codec.config import NUM_SCALES
from vaestream.codec.entropy import Table
from vaestream.codec.lattice import LatticeRounding


class RealCoding:
    """A `Relaxation` that takes the encoder at its word.

    With noise in place of rounding, the networks learn for symbols that lie evenly around each
    value and cost what a Gaussian gives them. Real symbols have a dead zone, and tables that were
    counted: here both are as in coding. Gradients of the latents are those of what half a step of
    uniform noise to either side would give on average, so none where it could not change the
    symbol; the table index sees the cost of the symbol in the neighbouring tables, the prediction
    the error that it leaves where a symbol does not change.

    Source: Guo et al., "Soft then hard: rethinking the quantization in neural image compression",
    ICML 2021 (the two phases).
    """

    def __init__(
        self, tables: Sequence[Table], device: torch.device, lattice_from: int = NUM_SCALES
    ) -> None:
        """tables: counted, one a table index. lattice_from: see `ModelConfig`."""
        lattice = LatticeRounding(tables, lattice_from) if lattice_from < NUM_SCALES else None
        self._costs = CodingCosts(tables, device, lattice)

    def __call__(self, y: Tensor, prediction: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        costs, x = self._costs, y - prediction
        row, value = index.detach().long(), x.detach()
        (symbol, bits), (rise, changes) = costs.code(row, value), costs.slope(row, value)
        bits = bits + costs.by_index(row, symbol) * (index - index.detach())
        moved = x - value
        # What is decoded, symbol + prediction, follows the prediction only where the symbol stays.
        # Where it changes that must cancel: it would add up from pass to pass.
        return bits + rise * moved, symbol + changes * moved
