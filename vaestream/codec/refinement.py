"""Refining the latents of one photo by gradient descent: fewer bits, or less error, same decoder.

The networks give every photo the latents that are best on average. Here the latents themselves
descend on bits + lambda * distortion of the photo at hand, with rounding replaced by a random
choice between the two neighbouring integers that grows ever more certain.

Source: Yang, Bamler and Mandt, "Improving inference for neural image compression", NeurIPS 2020
(stochastic Gumbel annealing).
"""

import torch
from torch import Tensor

from .bitstream import TILE
from .config import quality_to_lambda
from .networks import Networks
from .priors import gaussian_bits, scale_of_index
from .transforms import STRIDE

_BLOCK = 2 * TILE  # latents; memory grows with its area
_LEARNING_RATE = 0.02  # steps of the quantiser
_WARM, _COLD = 0.5, 0.1  # temperatures


def refine(
    networks: Networks, pixels: Tensor, y: Tensor, z_hat: Tensor, quality: Tensor, *, steps: int
) -> Tensor:
    """Better latents for the same z_hat.

    pixels: (H, W, 3) uint8. y: (rows, columns, latent) float32, scaled by the gain. z_hat: (1,
    hyper, h, w) int32. quality: (1,). steps: gradient steps for every block of 1024x1024 pixels.
    Returns scaled latents, near integers from their means.
    """
    # Called from inside inference mode, whose tensors autograd does not take.
    with torch.inference_mode(False), torch.enable_grad():
        picture = pixels.clone().float().sub_(128).permute(2, 0, 1)[None]
        quality = quality.clone()
        z = z_hat.clone().float()
        model = networks.model
        with torch.no_grad():
            mean = model.h_s_mean(z, quality)
            features = model.h_s_scale.features(z)
        latents = y.clone().permute(2, 0, 1)[None]
        rows, columns = latents.shape[2:]
        mean, features = mean[:, :, :rows, :columns], features[:, :, :rows, :columns]
        refined = latents.clone()
        for top in range(0, rows, _BLOCK):
            for left in range(0, columns, _BLOCK):
                block = slice(top, top + _BLOCK), slice(left, left + _BLOCK)
                _Block(networks, picture, latents, mean, features, quality, block).descend(
                    steps, refined
                )
        return refined[0].permute(1, 2, 0)


class _Block:
    """One block of latents, with enough around it to see what it does to the picture."""

    def __init__(
        self,
        networks: Networks,
        picture: Tensor,
        latents: Tensor,
        mean: Tensor,
        features: Tensor,
        quality: Tensor,
        block: tuple[slice, slice],
    ) -> None:
        self._model = networks.model
        self._quality = quality
        self._gain = networks.gain(quality).clone()[None, :, None, None]
        self._weight = float(quality_to_lambda(quality))
        self._block = block
        self._y = latents[:, :, *block].clone().requires_grad_(True)
        self._mean, self._features = mean[:, :, *block], features[:, :, *block]
        # Latents around the block stay as rounding leaves them, about.
        halo = networks.config.synthesis_radius
        rows, columns = latents.shape[2:]
        top, left = max(0, block[0].start - halo), max(0, block[1].start - halo)
        bottom = min(rows, block[0].start + self._y.shape[2] + halo)
        right = min(columns, block[1].start + self._y.shape[3] + halo)
        outer = slice(top, bottom), slice(left, right)
        self._around = mean[:, :, *outer] + torch.round(latents[:, :, *outer] - mean[:, :, *outer])
        self._at = (block[0].start - top, block[1].start - left)
        crop = picture[:, :, top * STRIDE : bottom * STRIDE, left * STRIDE : right * STRIDE]
        self._picture = crop.to(memory_format=torch.channels_last)
        # The same photo gives the same bytes.
        self._noise = torch.Generator(networks.device).manual_seed(0)

    def descend(self, steps: int, refined: Tensor) -> None:
        """Take the steps, and write the result into its place in `refined`."""
        optimizer = torch.optim.Adam([self._y], lr=_LEARNING_RATE)
        for step in range(steps):
            progress = step / steps
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * (1 - progress)
            temperature = _WARM * (_COLD / _WARM) ** progress
            loss = self._cost(temperature)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        refined[:, :, *self._block] = self._y.detach()

    def _cost(self, temperature: float) -> Tensor:
        """Bits + lambda * squared error, over all pixels that the block has a say in."""

        def relax(y: Tensor, prediction: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            uniform = torch.rand(y.shape, generator=self._noise, device=y.device)
            soft = _soft_round(y - prediction, temperature, uniform)
            return gaussian_bits(soft, scale_of_index(index)), soft

        y_hat, bits = zip(
            *(
                self._model.relaxed_code(y, mean, features, relax)
                for y, mean, features in self._tiles()
            ),
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
        decoded = self._model.g_s(whole / self._gain, self._quality)
        target = self._picture
        error = (decoded[:, :, : target.shape[2], : target.shape[3]] - target).square().sum()
        # lambda is per MSE of the three samples of a pixel together.
        cost: Tensor = torch.stack([b.sum() for b in bits]).sum() + self._weight / 3 * error
        return cost

    def _tiles(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        height, width = self._y.shape[2:]
        return [
            (
                self._y[:, :, r : r + TILE, c : c + TILE],
                self._mean[:, :, r : r + TILE, c : c + TILE],
                self._features[:, :, r : r + TILE, c : c + TILE],
            )
            for r in range(0, height, TILE)
            for c in range(0, width, TILE)
        ]


def _soft_round(x: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """A sample between floor(x) and floor(x) + 1: the nearer is the likelier.

    The logits are -atanh of the distances, over the temperature; the sample is that of a binary
    concrete distribution. uniform: as x, in [0, 1).
    """
    low = torch.floor(x)
    up = (x - low).clamp(1e-4, 1 - 1e-4)
    logit = (torch.atanh(up) - torch.atanh(1 - up)) / temperature
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    return low + torch.sigmoid((logit + noise) / temperature)
