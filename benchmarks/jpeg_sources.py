"""The same JPEG files as `DataLoader`s read them one by one, and as WebDataset shards: tensors
(3, H, W) uint8, in lists."""

from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class JpegFiles(Dataset[Tensor]):
    """Pictures by position."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Tensor:
        with Image.open(self.files[position]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return pixels.permute(2, 0, 1).contiguous()


def write_shards(files: list[Path], folder: Path, count: int) -> list[Path]:
    """The files in `count` tars, of about as many bytes each."""
    shares: list[list[Path]] = [[] for _ in range(count)]
    for path in sorted(files, key=lambda path: path.stat().st_size, reverse=True):
        min(shares, key=lambda share: sum(one.stat().st_size for one in share)).append(path)
    shards = []
    for number, share in enumerate(shares):
        shards.append(folder / f"{number:06d}.tar")
        with wds.TarWriter(str(shards[-1])) as writer:
            for path in share:
                writer.write({"__key__": path.stem, "jpg": path.read_bytes()})
    return shards


def shard_loader(shards: list[Path], batch_size: int, workers: int) -> Iterable[list[Tensor]]:
    """Shuffled batches of what is in the shards, from spawned workers that stay."""
    dataset = (
        wds.WebDataset([str(shard) for shard in shards], shardshuffle=100)
        .shuffle(1000)
        .decode("torchrgb8")
        .map(itemgetter("jpg"))
        .batched(batch_size, collation_fn=list)
    )
    loader: Iterable[list[Tensor]] = wds.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    return loader
