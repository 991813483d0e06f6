"""One training loop, fed by files, by an archive or by WebDataset shards: docs/training-loops.md

python examples/training_loops.py files FOLDER
python examples/training_loops.py archive ARCHIVE
python examples/training_loops.py webdataset 'SHARDS-{000000..000003}.tar'

It learns to tell by how many quarter turns a photo is turned, for which no photo needs a label.
"""

import argparse
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, Dataset

from vaestream.connectors.torch import ArchiveDataset, ArchiveLoader

SIZE = 224
SUFFIXES = (".jpg", ".jpeg", ".png")


def upright(image: Image.Image) -> Tensor:
    """(3, H, W) uint8; cameras leave it to the reader to turn what they took on its side."""
    pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def crop(photo: Tensor) -> Tensor:
    """A random square of it; what a smaller photo does not fill is black."""
    photo = pad(photo, (0, max(0, SIZE - photo.shape[2]), 0, max(0, SIZE - photo.shape[1])))
    top, left = (int(torch.randint(length - SIZE + 1, ())) for length in photo.shape[1:])
    return photo[:, top : top + SIZE, left : left + SIZE].contiguous()


# The three sources: each gives batches (N, 3, SIZE, SIZE) uint8, in another order in each epoch.


class PhotoFiles(Dataset[Tensor]):
    def __init__(self, folder: str) -> None:
        self.paths = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in SUFFIXES]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> Tensor:
        with Image.open(self.paths[position]) as image:
            return crop(upright(image))


def files(folder: str, batch_size: int, workers: int, seed: int) -> Iterable[Tensor]:
    order = torch.Generator().manual_seed(seed)
    photos = PhotoFiles(folder)
    return DataLoader(photos, batch_size, shuffle=True, generator=order, num_workers=workers)


def archive(url: str, batch_size: int, workers: int, seed: int) -> Iterable[Tensor]:
    dataset = ArchiveDataset(url, transform=crop)
    return ArchiveLoader(
        dataset,
        batch_size,
        shuffle=True,
        seed=seed,
        num_workers=workers,
        synthesis="workers",  # left out where the dataset is given a GPU as its device
        collate_fn=torch.stack,
    )


def webdataset(shards: str, batch_size: int, workers: int, seed: int) -> Iterable[Tensor]:
    dataset = (
        wds.WebDataset(
            shards,
            nodesplitter=wds.split_by_node,  # by worker it splits unasked
            shardshuffle=100,
            detshuffle=True,  # without it the shards come in the same order in every epoch
            seed=seed,
        )
        .compose(wds.detshuffle(1000, seed=seed))
        .decode("pil")
        .to_tuple("jpg;jpeg;png")
        .map(itemgetter(0))
        .map(upright)
        .map(crop)
        .batched(batch_size, collation_fn=torch.stack)
    )
    # Workers count the epochs: new ones would begin with the first again.
    loader: Iterable[Tensor] = wds.WebLoader(
        dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return loader


def train(batches: Iterable[Tensor], epochs: int) -> None:
    """The loop, wherever its photos come from."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 5, stride=4), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 4 * 4, 4)),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(epochs):
        seen, total = 0, 0.0
        for photos in batches:
            turns = torch.randint(4, (len(photos),))
            turned = [one.rot90(int(n), (1, 2)) for one, n in zip(photos, turns, strict=True)]
            loss = cross_entropy(model(torch.stack(turned).float() / 255), turns)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += len(photos)
            total += loss.item() * len(photos)
        print(f"epoch {epoch}: {seen} photos, loss {total / max(1, seen):.4f}")


if __name__ == "__main__":  # workers are spawned, or may be
    sources = {"files": files, "archive": archive, "webdataset": webdataset}
    parser = argparse.ArgumentParser()
    parser.add_argument("source", choices=sources)
    parser.add_argument("where")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    batches = sources[args.source](args.where, args.batch_size, args.workers, args.seed)
    train(batches, args.epochs)
