"""Constants of the codec and the shape of its networks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .transforms import receptive_radius

NUM_SCALES = 64
SCALE_MIN, SCALE_MAX = 0.11, 256.0
LAMBDA_MIN, LAMBDA_MAX = 0.0007, 0.22
"""Rate-distortion trade-off at quality 0 and 100: bits per pixel + lambda * MSE on 0..255."""

HYPER_STRIDE = 64
"""Pixels that a position of z spans in each direction."""

Z_LIMIT = 255


def quality_to_lambda(quality: Tensor) -> Tensor:
    """Trade-off lambda for qualities in [0, 100], log-linear."""
    return LAMBDA_MIN * (LAMBDA_MAX / LAMBDA_MIN) ** (quality / 100)


@dataclass(frozen=True)
class CodingPass:
    """Symbols that are coded at once, given those of earlier passes.

    Channels [start, stop), at the positions whose row + column is even (parity 0) or odd (1), or
    at all (None). Their prior sees the channels [0, known), as zeros where not coded yet.

    Sources: He et al., "Checkerboard context model for efficient learned image compression", CVPR
    2021; Minnen and Singh, "Channel-wise autoregressive entropy models", ICIP 2020.
    """

    start: int
    stop: int
    parity: int | None
    known: int

    def mask(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """(height, width) bool, True where the pass codes; None where it codes everywhere."""
        if self.parity is None:
            return None
        rows = torch.arange(height, device=device)[:, None]
        chosen: Tensor = (rows + torch.arange(width, device=device)) % 2 == self.parity
        return chosen


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the networks; stored in the weights file.

    groups: latent channels in the order in which they are coded, split into groups that add up to
        `latent`; a later group's prior sees the symbols of the earlier ones, and the first group
        is coded in two halves of a checkerboard. Empty: all at once, from z alone.
    """

    latent: int = 320
    hyper: int = 96
    width8: int = 128
    width16: int = 192
    analysis_blocks8: int = 6
    analysis_blocks16: int = 2
    synthesis_blocks8: int = 5
    synthesis_blocks16: int = 2
    mean_width: int = 96
    scale_width: int = 64
    groups: tuple[int, ...] = ()
    mean_context_width: int = 64
    scale_context_width: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))  # JSON has lists alone
        if self.groups and sum(self.groups) != self.latent:
            raise ValueError(f"groups {self.groups} do not add up to {self.latent} channels")

    @property
    def passes(self) -> tuple["CodingPass", ...]:
        """The steps in which the symbols of a tile are coded."""
        if not self.groups:
            return (CodingPass(0, self.latent, None, 0),)
        first = self.groups[0]
        passes = [CodingPass(0, first, 0, 0), CodingPass(0, first, 1, first)]
        for size in self.groups[1:]:
            start = passes[-1].stop
            passes.append(CodingPass(start, start + size, None, start))
        return tuple(passes)

    @property
    def analysis_radius(self) -> int:
        """Halo, in latents, that a window needs for g_a to give the values of the whole."""
        return receptive_radius(self.analysis_blocks8, self.analysis_blocks16)

    @property
    def synthesis_radius(self) -> int:
        """Halo, in latents, that a window needs for g_s to give the values of the whole."""
        return receptive_radius(self.synthesis_blocks8, self.synthesis_blocks16)


STANDARD = ModelConfig(groups=(16, 48, 256))
"""What `vaestream train` trains from nothing."""
