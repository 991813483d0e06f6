"""Crops that the codec has coded once, for decoders to learn from without coding anew."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaestream.codec.encoder import Encoder
from vaestream.codec.transforms import STRIDE

from .data import PhotoSet, stratified


@dataclass(frozen=True)
class CodedCrops:
    """Square crops and what decoding each starts from.

    pixels: (side, side, 3) uint8 each. latents: (side/16, side/16, latent) float16 each, y_hat with
    the gain removed. quality: (N,) float32, rising from 0 to 100.
    """

    pixels: list[NDArray[np.uint8]]
    latents: list[NDArray[np.float16]]
    quality: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        photos: PhotoSet,
        count: int,
        side: int,
        rng: np.random.Generator,
        *,
        enlarged: float = 0.0,
    ) -> "CodedCrops":
        """Code `count` crops of photos (`PhotoSet.crops`), each at a quality of its own."""
        qualities = stratified(count, 100, rng).round(2)
        pixels, latents = [], []
        for quality in qualities.tolist():
            (crop,) = photos.crops(1, side, rng, enlarged=enlarged)
            pixels.append((crop + 128).byte().permute(1, 2, 0).numpy())
            y_hat = encoder.decoded_latents(pixels[-1], quality)
            latents.append(y_hat.half().cpu().numpy())
        return cls(pixels, latents, qualities.astype(np.float32))

    def batch(
        self, count: int, side: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Parts of crops that span the qualities, on the grid of latents: y_hat (count, latent,
        side/16, side/16), x (count, 3, side, side) pixels minus 128, quality (count,); float32."""
        size = side // STRIDE
        chosen = stratified(count, len(self.quality), rng).astype(np.int64)
        latents = np.empty((count, size, size, self.latents[0].shape[2]), np.float16)
        pixels = np.empty((count, side, side, 3), np.uint8)
        for n, i in enumerate(chosen):
            top, left = rng.integers(len(self.latents[i]) - size + 1, size=2)
            latents[n] = self.latents[i][top:, left:][:size, :size]
            pixels[n] = self.pixels[i][STRIDE * top :, STRIDE * left :][:side, :side]
        y_hat = torch.from_numpy(latents).permute(0, 3, 1, 2).float()
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 128
        return y_hat, x, torch.from_numpy(self.quality[chosen])
