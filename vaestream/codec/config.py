"""Constants of the codec and the shape of its networks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .post_filter import filter_radius
from .transforms import receptive_radius

NUM_SCALES = 64
SCALE_MIN, SCALE_MAX = 0.11, 256.0
LAMBDA_MIN, LAMBDA_MAX = 0.0007, 0.22
"""Rate-distortion trade-off at quality 0 and 100: bits per pixel + lambda * MSE on 0..255."""

HYPER_STRIDE = 64
"""Pixels that a position of z spans in each direction."""

Z_LIMIT = 255


_Quality = TypeVar("_Quality", float, Tensor)


def quality_to_lambda(quality: _Quality) -> _Quality:
    """Trade-off lambda for qualities in [0, 100], log-linear."""
    weight: _Quality = LAMBDA_MIN * (LAMBDA_MAX / LAMBDA_MIN) ** (quality / 100)
    return weight


Cosets = tuple[tuple[int, int], ...]
"""Positions by the remainders of their row and column by 2."""

_EVEN: Cosets = ((0, 0), (1, 1))
_ODD: Cosets = ((0, 1), (1, 0))
_STEPS: dict[int, tuple[Cosets | None, ...]] = {
    1: (None,),
    2: (_EVEN, _ODD),
    3: (_EVEN[:1], _EVEN[1:], _ODD),
}
"""Where the steps in which a group is coded take place: at once, in the halves of a checkerboard,
or in two quarters and a half."""


@dataclass(frozen=True)
class CodingPass:
    """Symbols that are coded at once, given those of earlier passes.

    Channels [start, stop), at the positions in `cosets`, or at all (None). Their prior sees the
    channels [0, known), as zeros where not coded yet: those of the groups before, and its own
    channels where an earlier step has coded them.

    Sources: He et al., "Checkerboard context model for efficient learned image compression", CVPR
    2021; Minnen and Singh, "Channel-wise autoregressive entropy models", ICIP 2020.
    """

    start: int
    stop: int
    cosets: Cosets | None
    known: int

    @property
    def continues(self) -> bool:
        """Whether an earlier pass has coded the same channels at other positions."""
        return self.known == self.stop

    def grids(self) -> tuple[tuple[tuple[int, int], int], ...]:
        """Where the pass codes, as regular grids: row and column of the first position, and the
        stride."""
        if self.cosets is None:
            return (((0, 0), 1),)
        return tuple((coset, 2) for coset in self.cosets)

    def places(self) -> Iterator[tuple[slice, slice, slice]]:
        """`grids` as what picks them out of (tiles, h, w, ...)."""
        for (row, column), stride in self.grids():
            yield slice(None), slice(row, None, stride), slice(column, None, stride)

    def mask(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """(height, width) bool, True where the pass codes; None where it codes everywhere."""
        if self.cosets is None:
            return None
        chosen = torch.zeros((height, width), dtype=torch.bool, device=device)
        for (row, column), stride in self.grids():
            chosen[row::stride, column::stride] = True
        return chosen


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the networks; stored in the weights file.

    groups: latent channels in the order in which they are coded, split into groups that add up to
        `latent`; a later group's prior sees the symbols of the earlier ones. Empty: all at once,
        from z alone.
    steps: how many steps each group is coded in, 1 to 3; a later step's prior sees the symbols of
        the earlier ones around it. Empty: two for the first group and one for the others.
    mean_context_hidden: width of what steers the mean's contexts; 0: they are linear.
    lattice_from: the first table index whose symbols are on a lattice (`vaestream.codec.lattice`);
        `NUM_SCALES`: none are.
    filter_width, filter_blocks: shape of the post-filter; width 0: there is none.
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
    steps: tuple[int, ...] = ()
    mean_context_hidden: int = 0
    lattice_from: int = NUM_SCALES
    filter_width: int = 0
    filter_blocks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))  # JSON has lists alone
        object.__setattr__(
            self,
            "steps",
            tuple(self.steps) or (2, *(1 for _ in self.groups[1:]))[: len(self.groups)],
        )
        if self.groups and sum(self.groups) != self.latent:
            raise ValueError(f"groups {self.groups} do not add up to {self.latent} channels")
        if len(self.steps) != len(self.groups) or not set(self.steps) <= set(_STEPS):
            raise ValueError(f"steps {self.steps} are not 1 to 3 for each of groups {self.groups}")
        if self.filter_blocks and not self.filter_width:
            raise ValueError(f"filter_blocks {self.filter_blocks} of a post-filter without width")
        if not 0 <= self.lattice_from <= NUM_SCALES:
            raise ValueError(f"lattice_from {self.lattice_from} is outside 0 to {NUM_SCALES}")

    @property
    def passes(self) -> tuple["CodingPass", ...]:
        """The steps in which the symbols of a tile are coded."""
        if not self.groups:
            return (CodingPass(0, self.latent, None, 0),)
        passes: list[CodingPass] = []
        start = 0
        for size, steps in zip(self.groups, self.steps, strict=True):
            stop = start + size
            for number, cosets in enumerate(_STEPS[steps]):
                passes.append(CodingPass(start, stop, cosets, stop if number else start))
            start = stop
        return tuple(passes)

    @property
    def analysis_radius(self) -> int:
        """Halo, in latents, that a window needs for g_a to give the values of the whole."""
        return receptive_radius(self.analysis_blocks8, self.analysis_blocks16)

    @property
    def synthesis_radius(self) -> int:
        """Halo, in latents, that a window needs for g_s and the post-filter to give the values of
        the whole."""
        radius = receptive_radius(self.synthesis_blocks8, self.synthesis_blocks16)
        return radius + self.filter_radius

    @property
    def filter_radius(self) -> int:
        """How much of that halo the post-filter needs."""
        return filter_radius(self.filter_blocks) if self.filter_width else 0


STANDARD = ModelConfig(
    analysis_blocks16=4,
    synthesis_blocks16=4,
    groups=(16, 48, 64, 192),
    steps=(3, 2, 2, 1),
    mean_context_hidden=96,
    lattice_from=10,
    filter_width=16,
    filter_blocks=3,
)
"""What `vaestream train` trains from nothing."""
