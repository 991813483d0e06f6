"""Windows over a grid of latents, so that memory does not grow with the photo."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Margins:
    """How many samples at each edge are there only to be seen by what lies within."""

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    def scaled(self, factor: int) -> "Margins":
        """The same, where a sample has become so many in each direction."""
        return Margins(*(factor * m for m in astuple(self)))

    def split(self, keep: int) -> tuple["Margins", "Margins"]:
        """The innermost samples of each margin, at most `keep`, and the others."""
        inner = Margins(*(min(m, keep) for m in astuple(self)))
        return inner, Margins(*(m - i for m, i in zip(astuple(self), astuple(inner), strict=True)))

    def crop(self, x: Tensor, keep: int = 0) -> tuple[Tensor, "Margins"]:
        """x (N, C, H, W) with at most `keep` samples of each margin, and what they are then."""
        kept, _ = self.split(keep)
        height, width = x.shape[2:]
        inner = x[
            :,
            :,
            self.top - kept.top : height - self.bottom + kept.bottom,
            self.left - kept.left : width - self.right + kept.right,
        ]
        return inner, kept


NO_MARGINS = Margins()


@dataclass(frozen=True)
class Window:
    """A rectangle of latents, and the larger one that a network must see to compute it."""

    top: int
    left: int
    bottom: int
    right: int
    outer_top: int
    outer_left: int
    outer_bottom: int
    outer_right: int

    @property
    def margins(self) -> Margins:
        """What the outer rectangle has more."""
        return Margins(
            self.top - self.outer_top,
            self.left - self.outer_left,
            self.outer_bottom - self.bottom,
            self.outer_right - self.right,
        )


def windows(rows: int, columns: int, *, size: int, halo: int) -> Iterator[Window]:
    """Cut a rows x columns grid into near-equal windows of at most size x size.

    The outer rectangle reaches `halo` further on every side, as far as the grid goes.
    """
    for top, bottom in _spans(rows, size):
        for left, right in _spans(columns, size):
            yield Window(
                top,
                left,
                bottom,
                right,
                max(0, top - halo),
                max(0, left - halo),
                min(rows, bottom + halo),
                min(columns, right + halo),
            )


def _spans(length: int, size: int) -> list[tuple[int, int]]:
    count = -(-length // size)
    edges = [length * i // count for i in range(count + 1)]
    return list(pairwise(edges))
