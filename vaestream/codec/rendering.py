"""From latents to the pixels of a view."""

import torch
from torch import Tensor

from .bitstream import Header, Rectangle
from .config import ModelConfig
from .networks import Networks
from .transforms import STRIDE
from .view import View


def wanted_latents(config: ModelConfig, header: Header, view: View) -> Rectangle:
    """The latents that a view follows from."""
    return view.latents(*header.latent_size, halo=config.synthesis_radius)


def render(networks: Networks, y_hat: Tensor, header: Header, view: View) -> Tensor:
    """The view, (H, W, 3) or (H, W) uint8.

    y_hat: what `wanted_latents` names, (rows, columns, channels) float32, the gain removed.
    """
    top, left, bottom, right = (STRIDE * at for at in wanted_latents(networks.config, header, view))
    if view.shrink == 1:
        coded_width, coded_height = header.coded_size
        height, width = min(bottom, coded_height) - top, min(right, coded_width) - left
        quality = networks.quality(header.coded_quality)
        pixels = networks.synthesise(y_hat, quality, height, width)
    else:
        pixels = networks.synthesise_reduced(y_hat, view.shrink)
    if header.channels == 1:
        pixels = _to_gray(pixels)
    if view.is_crop:
        return pixels[view.place(top, left)].contiguous()
    return torch.from_numpy(view.show(pixels.cpu().numpy(), top, left)).to(networks.device)


def _to_gray(pixels: Tensor) -> Tensor:
    """(H, W, 3) uint8 -> (H, W) uint8, the rounded mean of the channels."""
    return ((pixels.int().sum(2) * 2 + 3) // 6).to(torch.uint8)
