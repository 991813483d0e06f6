"""Refining the latents of one photo by gradient descent: fewer bits, or less error, same decoder.

The analysis transform cannot know how the latents will be rounded, so it leaves it to chance how
the errors of neighbours add up in the picture. Here the latents of the photo at hand follow the
error that coding really leaves: a step rounds them as the encoder will, takes the gradient of bits
+ lambda * squared error there, and moves each latent part of the way to where it were best if all
others stayed.

Sources: Campos et al., "Content adaptive optimization for neural image compression", CVPRW 2019
(descent on one photo's latents); the steps are those of damped Jacobi iteration.
"""

import torch
from torch import Tensor

from .bitstream import TILE
from .coding_costs import CodingCosts
from .config import quality_to_lambda
from .networks import Networks
from .rounding import SQUARED_ERROR_OF_A_BIT
from .transforms import STRIDE

_BLOCK = 2 * TILE  # latents; memory grows with its area
_DAMPING = 0.5  # of the first step; then falling to 0, so that neighbours don't overshoot
_OWN_BITS = 0.25
"""Share of a symbol's bits that counts in the gradient of its own latent, not only in that of its
prediction: dead zones and the search on the lattice charge for them too."""


def refine(
    networks: Networks,
    costs: CodingCosts,
    pixels: Tensor,
    y: Tensor,
    z_hat: Tensor,
    quality: Tensor,
    *,
    steps: int,
) -> Tensor:
    """Better latents for the same z_hat.

    pixels: (H, W, 3) uint8. y: (rows, columns, latent) float32, scaled by the gain. z_hat: (1,
    hyper, h, w) int32. quality: (1,). steps: gradient steps for every block of 1024x1024 pixels,
    each of which costs about two syntheses. Returns scaled latents, to be coded as y would be.
    """
    # Called from inside inference mode, whose tensors autograd does not take.
    with torch.inference_mode(False), torch.enable_grad():
        picture = pixels.clone().permute(2, 0, 1)[None]
        quality = quality.clone()
        z = z_hat.clone().float()
        model = networks.model
        with torch.no_grad():
            of_mean, of_scale = model.features(z, quality)
        latents = y.clone().permute(2, 0, 1)[None]
        rows, columns = latents.shape[2:]
        features = of_mean[:, :, :rows, :columns], of_scale[:, :, :rows, :columns]
        refined = latents.clone()
        for top in range(0, rows, _BLOCK):
            for left in range(0, columns, _BLOCK):
                block = slice(top, top + _BLOCK), slice(left, left + _BLOCK)
                piece = _Block(networks, costs, picture, latents, features, quality, block)
                piece.descend(steps, refined)
        return refined[0].permute(1, 2, 0)


class _Block:
    """One block of latents, with enough around it to see what it does to the picture."""

    def __init__(
        self,
        networks: Networks,
        costs: CodingCosts,
        picture: Tensor,
        latents: Tensor,
        features: tuple[Tensor, Tensor],
        quality: Tensor,
        block: tuple[slice, slice],
    ) -> None:
        self._model = networks.model
        self._costs = costs
        self._quality = quality
        self._gain = networks.gain(quality).clone()[None, :, None, None]
        self._weight = float(quality_to_lambda(quality))
        self._block = block
        self._y = latents[:, :, *block].clone()
        self._features = features
        # Latents around the block stay as rounding leaves them, about.
        halo = networks.config.synthesis_radius
        rows, columns = latents.shape[2:]
        top, left = max(0, block[0].start - halo), max(0, block[1].start - halo)
        bottom = min(rows, block[0].start + self._y.shape[2] + halo)
        right = min(columns, block[1].start + self._y.shape[3] + halo)
        outer = slice(top, bottom), slice(left, right)
        with torch.no_grad():
            mean = self._model.h_s_mean.project(features[0][:, :, *outer])
        self._around = mean + torch.round(latents[:, :, *outer] - mean)
        self._at = (block[0].start - top, block[1].start - left)
        crop = picture[:, :, top * STRIDE : bottom * STRIDE, left * STRIDE : right * STRIDE]
        self._picture = crop.float().sub_(128).contiguous(memory_format=torch.channels_last)

    def descend(self, steps: int, refined: Tensor) -> None:
        """Take the steps, and write the result into its place in `refined`."""
        for step in range(steps):
            y = self._y.clone().requires_grad_(True)
            cost, decoded = self._cost(y)
            cost.backward()  # type: ignore[no-untyped-call]
            assert y.grad is not None
            # The cost's second derivative, in bits: about alike for all latents, since the gains
            # balance error and rate.
            best = decoded - y.grad * (SQUARED_ERROR_OF_A_BIT / 2)
            self._y = torch.lerp(self._y, best, _DAMPING * (1 - step / steps))
        refined[:, :, *self._block] = self._y

    def _cost(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Bits + lambda * squared error over all pixels that the block has a say in, and what is
        decoded of its latents. Gradients pass straight through the rounding.
        """

        def relax(y: Tensor, prediction: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            row, value = index.long(), (y - prediction).detach()
            (symbol, bits), (rise, _) = self._costs.code(row, value), self._costs.slope(row, value)
            moved, predicted = y - y.detach(), prediction - prediction.detach()
            bits = bits + rise * (_OWN_BITS * moved - predicted)
            # A symbol follows its prediction, so that what is decoded stays with y.
            return bits, symbol + moved - predicted

        y_hat, bits = zip(
            *(self._model.relaxed_code(part, features, relax) for part, features in self._tiles(y)),
            strict=True,
        )
        height, width = self._y.shape[2:]
        columns = -(-width // TILE)
        block = torch.cat(
            [torch.cat(y_hat[i : i + columns], dim=3) for i in range(0, len(y_hat), columns)],
            dim=2,
        )
        top, left = self._at
        whole = self._around.clone()
        whole[:, :, top : top + height, left : left + width] = block
        decoded = self._model.synthesise(whole / self._gain, self._quality)
        target = self._picture
        error = (decoded[:, :, : target.shape[2], : target.shape[3]] - target).square().sum()
        # lambda is per MSE of the three samples of a pixel together.
        cost: Tensor = torch.stack([b.sum() for b in bits]).sum() + self._weight / 3 * error
        return cost, block.detach()

    def _tiles(self, y: Tensor) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        height, width = self._y.shape[2:]
        of_mean, of_scale = (f[:, :, *self._block] for f in self._features)
        tiles = [
            (slice(r, r + TILE), slice(c, c + TILE))
            for r in range(0, height, TILE)
            for c in range(0, width, TILE)
        ]
        return [(y[:, :, *t], (of_mean[:, :, *t], of_scale[:, :, *t])) for t in tiles]
