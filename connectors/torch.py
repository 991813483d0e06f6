"""An archive as a map-style torch dataset.

>>> from torch.utils.data import DataLoader
>>> from vaestream.connectors.torch import ArchiveDataset
>>> dataset = ArchiveDataset("s3://bucket/archive")                       # doctest: +SKIP
>>> loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=list)   # doctest: +SKIP
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from vaestream.archive.reader import Archive, open_archive


class ArchiveDataset(Dataset[Any]):
    """Photos of an archive by position, in the order of `keys`.

    An item is a uint8 tensor of shape (3, H, W), RGB, or what `transform` makes of it; gray photos
    are repeated over the three channels. Photos have sizes of their own: stack them in `transform`
    (a crop or a resize) or collate into a list. A DataLoader asks for a batch at once, which is one
    batched read and one batched decode.

    keys: by default all photos, which leaves out broken ones and objects that are no pictures this
    package reads. transform: from tensor to anything; picklable where
    workers are spawned. device: where photos are decoded; with workers it stays at "cpu". The
    dataset pickles without open files, so it works under spawn as under fork.

    Errors: IndexError past the end; ArchiveError and DamagedArchiveError as the archive raises
    them, also for a kept source that Pillow cannot open.
    """

    def __init__(
        self,
        archive: str | Archive,
        *,
        keys: Sequence[str] | None = None,
        transform: Callable[[torch.Tensor], Any] | None = None,
        device: str = "cpu",
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(archive, str):
            archive = open_archive(archive, device=device, storage_options=storage_options)
        self.archive = archive
        self.transform = transform
        if keys is None:
            index = archive.index
            photos = index.filter(pc.and_(index["error"].is_null(), index["width"].is_valid()))
            keys = photos["key"].to_pylist()
        self.keys: list[str] = list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """The items at `positions`, in that order: what a DataLoader calls for a batch."""
        photos = self.archive.read([self.keys[position] for position in positions])
        tensors = [_to_tensor(photo) for photo in photos]
        return tensors if self.transform is None else [self.transform(one) for one in tensors]


def _to_tensor(photo: np.ndarray[Any, Any]) -> torch.Tensor:
    if photo.ndim == 2:
        return torch.from_numpy(photo).expand(3, -1, -1).contiguous()
    return torch.from_numpy(photo).permute(2, 0, 1).contiguous()
