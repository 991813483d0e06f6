"""Feed a training loop, stop it and go on: python examples/torch_dataloader.py ARCHIVE"""

import itertools
import sys

import torch
from torch.nn.functional import interpolate

from vaestream.connectors.torch import ArchiveDataset, ArchiveLoader


def resize(photo: torch.Tensor) -> torch.Tensor:
    """One size for all, so that photos stack; on the device, since it comes after the decoding."""
    small = interpolate(photo[None].float(), size=(224, 224), mode="bilinear", antialias=True)
    return small[0] / 255


def loader(archive: str) -> ArchiveLoader:
    dataset = ArchiveDataset(archive, transform=resize, on_error="skip", device="auto")
    return ArchiveLoader(dataset, 2, shuffle=True, num_workers=1, collate_fn=torch.stack)


if __name__ == "__main__":
    first = loader(sys.argv[1])
    for batch in itertools.islice(first, 1):
        print(tuple(batch.shape), f"mean {batch.mean():.3f}")
    checkpoint = first.state_dict()

    second = loader(sys.argv[1])
    second.load_state_dict(checkpoint)
    print(f"going on in epoch {second.epoch} after {checkpoint['taken']} photos")
    for batch in second:
        print(tuple(batch.shape), f"mean {batch.mean():.3f}")
