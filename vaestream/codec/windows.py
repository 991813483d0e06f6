"""Windows over a grid of latents, so that memory does not grow with the photo."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise


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

    def inner(self, unit: int) -> tuple[slice, slice]:
        """Where the window lies inside its outer rectangle, for `unit` samples a latent."""
        return (
            slice((self.top - self.outer_top) * unit, (self.bottom - self.outer_top) * unit),
            slice((self.left - self.outer_left) * unit, (self.right - self.outer_left) * unit),
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
