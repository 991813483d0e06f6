"""Which photos make which batch of an epoch, on which rank."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from .dataset import ArchiveDataset
from .order import Even, Positions, mixed, share


class ArchiveSampler(Sampler[list[int]]):
    """Batches of positions for one rank: the `batch_sampler` of a DataLoader.

    Unshuffled, the epoch is the dataset's order. Shuffled, its blocks come in random order, and
    photos are mixed within windows of so many blocks: enough to part neighbours, while what is
    read lies within a few blocks at a time. Either way a rank has one run of that sequence, and
    what it gets follows from these arguments and the epoch alone.

    batch_size: photos; the last batch may have fewer, or with drop_last is left out.
    seed: 0 or more, the same on every rank.
    window: blocks that are mixed.
    rank, world_size: by default those of `torch.distributed`, where it is initialised.
    even: what becomes of photos that do not divide by world_size. "pad": ranks have equally many,
        and fewer than world_size photos come twice. "drop": ranks have equally many, and fewer than
        world_size photos do not come. "none": every photo comes once, and some ranks have one more.

    Raises ValueError for values that make no sense.
    """

    def __init__(
        self,
        dataset: ArchiveDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        window: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        even: Even = "pad",
        drop_last: bool = False,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        if rank is None:
            rank = dist.get_rank() if distributed else 0
        if world_size is None:
            world_size = dist.get_world_size() if distributed else 1
        if not 0 <= rank < world_size:
            raise ValueError(f"there is no rank {rank} of {world_size}")
        if even not in ("pad", "drop", "none"):
            raise ValueError(f"even {even!r}: one of pad, drop, none")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("window", window, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} {value}: at least {least}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.window = window
        self.rank = rank
        self.world_size = world_size
        self.even: Even = even
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0
        """Photos of the epoch that the next iteration passes over."""

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self.epoch = epoch

    def positions(self) -> Positions:
        """(photos of this rank,): the positions that the epoch is made of, in order."""
        count = len(self.dataset)
        begin, size = share(count, self.rank, self.world_size, self.even)
        places = (begin + np.arange(size)) % max(1, count)
        if not self.shuffle:
            return places
        blocks = self.dataset.reader.blocks
        ordered = blocks.shuffled(self.seed, self.epoch)[places]
        window = self.window * self.dataset.reader.block_size
        return mixed(ordered, window, self.seed, self.epoch, self.rank)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        _, size = share(len(self.dataset), self.rank, self.world_size, self.even)
        return size // self.batch_size if self.drop_last else -(-size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        positions = self.positions()[self.start :]
        for at in range(0, len(positions), self.batch_size):
            batch = positions[at : at + self.batch_size].tolist()
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def fingerprint(self) -> dict[str, Any]:
        """What the order follows from, but for rank and epoch: plain values."""
        return {
            "shuffle": self.shuffle,
            "seed": self.seed,
            "window": self.window,
            "world_size": self.world_size,
            "even": self.even,
            "photos_sha256": self._photos_sha256,  # last: it follows from `shuffle` too
        }

    @cached_property
    def _photos_sha256(self) -> str:
        """Of the keys, and of the blocks if they count."""
        digest = hashlib.sha256("\0".join(self.dataset.keys).encode())
        if self.shuffle:
            blocks = self.dataset.reader.blocks
            for array in (blocks.positions, blocks.bounds):
                digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()
