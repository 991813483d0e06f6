"""Tiles: which of them are computed together, and where they lie."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .bitstream import Header, Rectangle

_AT_ONCE = 8


def batches(
    tiles: Mapping[int, Rectangle], *, part: bool = False
) -> Iterator[tuple[list[int], list[Rectangle]]]:
    """Tiles, by number, that are computed together: some of one shape, with their numbers.

    part: whether they are part of a picture. A few tiles then are all there is, and would take more
    memory together than all else that a region needs: they come one by one.
    """
    at_once = 1 if part else _AT_ONCE
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, (top, left, bottom, right) in tiles.items():
        by_shape.setdefault((bottom - top, right - left), []).append(number)
    for numbers in by_shape.values():
        for start in range(0, len(numbers), at_once):
            chosen = numbers[start : start + at_once]
            yield chosen, [tiles[n] for n in chosen]


def paste(
    y: Tensor, place: Rectangle, rectangles: Sequence[Rectangle], tiles: Tensor, gain: Tensor
) -> None:
    """Write tiles of scaled latents, with the gain removed, into y (rows, columns, channels), what
    of them lies in its place."""
    for rectangle, tile in zip(rectangles, tiles, strict=True):
        top, left = (max(rectangle[i], place[i]) for i in (0, 1))
        bottom, right = (min(rectangle[i], place[i]) for i in (2, 3))
        own = tile[
            top - rectangle[0] : bottom - rectangle[0], left - rectangle[1] : right - rectangle[1]
        ]
        y_part = y[top - place[0] : bottom - place[0], left - place[1] : right - place[1]]
        torch.div(own, gain, out=y_part)


def overlapping(header: Header, wanted: Rectangle) -> dict[int, Rectangle]:
    """The tiles, by number, that hold some of the latents that are wanted."""
    return {n: tile for n, tile in enumerate(header.tiles()) if _overlap(tile, wanted)}


def hull(rectangles: Iterable[Rectangle]) -> Rectangle:
    """The smallest rectangle around others."""
    tops, lefts, bottoms, rights = zip(*rectangles, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
