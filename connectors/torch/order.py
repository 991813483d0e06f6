"""The order of an epoch: blocks of photos that lie together, a share for each rank, mixed.

All of it follows from its arguments, on any machine and with any version of NumPy: raw output of
a bit generator is what NumPy promises to keep, its permutations are not.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Even = Literal["pad", "drop", "none"]
"""What becomes of photos that do not divide by the number of ranks: see `share`."""

Positions = NDArray[np.int64]

_BLOCKS, _WINDOWS = 0, 1  # what a stream of random numbers is for


@dataclass(frozen=True)
class Blocks:
    """Positions of a dataset in runs that lie together in a part of the archive.

    positions: (photos,), in the order in which they are stored. bounds: (blocks + 1,), where in it
    each block begins, and the end.
    """

    positions: Positions
    bounds: Positions

    @classmethod
    def cut(
        cls,
        parts: NDArray[np.integer],
        groups: NDArray[np.integer],
        rows: NDArray[np.integer],
        size: int,
    ) -> "Blocks":
        """Blocks of `size` photos, the last of each part smaller.

        parts, groups, rows: (photos,), the part that holds each photo, its row group there, and
        its row in that.
        """
        positions = np.lexsort((rows, groups, parts)).astype(np.int64)
        ordered = parts[positions]
        count = len(ordered)
        at = np.arange(count)
        begins = np.ones(count, bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        within = at - np.maximum.accumulate(np.where(begins, at, 0))
        bounds = np.append(np.flatnonzero(within % size == 0), count)
        return cls(positions, bounds.astype(np.int64))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> Positions:
        """The positions in a block."""
        return self.positions[self.bounds[number] : self.bounds[number + 1]]

    def numbers(self) -> Positions:
        """(photos,): the block that each position is in."""
        found = np.empty(len(self.positions), np.int64)
        found[self.positions] = np.repeat(np.arange(len(self)), np.diff(self.bounds))
        return found

    def shuffled(self, seed: int, epoch: int) -> Positions:
        """All positions, block after block in random order."""
        order = np.argsort(_noise(len(self), seed, epoch, _BLOCKS), kind="stable")
        sizes = np.diff(self.bounds)[order]
        starts = np.cumsum(sizes) - sizes
        places = np.arange(sizes.sum()) + np.repeat(self.bounds[order] - starts, sizes)
        found: Positions = self.positions[places]
        return found


def share(photos: int, rank: int, world_size: int, even: Even) -> tuple[int, int]:
    """Where the share of a rank in a sequence of photos begins and how many it has.

    Shares are runs, so that each rank reads blocks of its own. "none": their sizes differ by one at
    most, and every photo is in one. "drop": all have photos // world_size, the last photos of the
    sequence are in none. "pad": all have that rounded up; a share that passes the end of the
    sequence goes on at its beginning.
    """
    if even == "none":
        begin, end = (photos * r // world_size for r in (rank, rank + 1))
        return begin, end - begin
    size = photos // world_size if even == "drop" else -(-photos // world_size)
    return rank * size, size


def mixed(positions: Positions, window: int, seed: int, epoch: int, rank: int) -> Positions:
    """The positions in random order within each run of `window`."""
    noise = _noise(len(positions), seed, epoch, _WINDOWS, rank)
    order: Positions = np.lexsort((noise, np.arange(len(positions)) // window))
    found: Positions = positions[order]
    return found


def _noise(count: int, *entropy: int) -> NDArray[np.uint64]:
    generator = np.random.PCG64(np.random.SeedSequence(entropy))
    noise: NDArray[np.uint64] = np.asarray(generator.random_raw(count), np.uint64)
    return noise
