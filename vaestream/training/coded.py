"""Crops that the codec has coded once, for decoders to learn from without coding anew."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaestream.codec.encoder import Encoder
from vaestream.codec.transforms import STRIDE

from .data import PhotoSet


@dataclass(frozen=True)
class CodedCrops:
    """Square crops and what decoding each starts from.

    pixels: (N, side, side, 3) uint8. latents: (N, side/16, side/16, latent) float16, y_hat with the
    gain removed. quality: (N,) float32, rising from 0 to 100.
    """

    pixels: NDArray[np.uint8]
    latents: NDArray[np.float16]
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
        quality = ((np.arange(count) + rng.random(count)) * (100 / count)).round(2)
        pixels = np.empty((count, side, side, 3), np.uint8)
        latents: NDArray[np.float16] | None = None
        for i in range(count):
            (crop,) = photos.crops(1, side, rng, enlarged=enlarged)
            pixels[i] = (crop + 128).permute(1, 2, 0).numpy()
            y_hat = encoder.decoded_latents(pixels[i], float(quality[i])).cpu()
            if latents is None:
                latents = np.empty((count, *y_hat.shape), np.float16)
            latents[i] = y_hat.numpy()
        if latents is None:
            raise ValueError(f"{count} crops to code")
        return cls(pixels, latents, quality.astype(np.float32))

    def batch(
        self, count: int, side: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Parts of crops that span the qualities, on the grid of latents: y_hat (count, latent,
        side/16, side/16), x (count, 3, side, side) pixels minus 128, quality (count,); float32."""
        total, rows = self.latents.shape[:2]
        size = side // STRIDE
        chosen = ((np.arange(count) + rng.random(count)) * (total / count)).astype(np.int64)
        corners = rng.integers(rows - size + 1, size=(count, 2))
        latents = np.stack(
            [
                self.latents[i, top : top + size, left : left + size]
                for i, (top, left) in zip(chosen, corners, strict=True)
            ]
        )
        pixels = np.stack(
            [
                self.pixels[i, top : top + side, left : left + side]
                for i, (top, left) in zip(chosen, corners * STRIDE, strict=True)
            ]
        )
        y_hat = torch.from_numpy(latents).permute(0, 3, 1, 2).float()
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 128
        return y_hat, x, torch.from_numpy(self.quality[chosen])
