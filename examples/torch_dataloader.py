"""Feed a training loop from an archive: python examples/torch_dataloader.py ARCHIVE"""

import sys

import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from vaestream.connectors.torch import ArchiveDataset


def resize(photo: torch.Tensor) -> torch.Tensor:
    """One size for all, so that photos stack; at the top level, so that workers can be spawned."""
    small = interpolate(photo[None].float(), size=(224, 224), mode="bilinear", antialias=True)
    return small[0] / 255


if __name__ == "__main__":
    dataset = ArchiveDataset(sys.argv[1], transform=resize)
    for batch in DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn"):
        print(tuple(batch.shape), f"mean {batch.mean():.3f}")
