"""An archive as a map-style dataset."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vaestream.archive.reader import Archive, open_archive
from vaestream.codec.hardware import device_of
from vaestream.codec.view import Region
from vaestream.errors import VaestreamError

from .cache import BlobCache
from .reader import Coded, PhotoReader

OnError = Literal["raise", "skip"] | Callable[[str, VaestreamError], Tensor]


class ArchiveDataset(Dataset[Any]):
    """Photos of an archive by position, in the order of `keys`.

    An item is a uint8 tensor of shape (3, H, W), RGB, on `device`, or what `transform` makes of it;
    gray photos are repeated over the three channels. Photos have sizes of their own: stack them in
    `transform` (a crop or a resize) or collate into a list. A DataLoader asks for a batch at once,
    which is one batched read.

    archive: its URL, or the archive itself, whose device then counts.
    keys: by default all photos, which leaves out broken ones and objects that are no pictures this
        package reads.
    columns: fields of `RowInfo` ("key", "width", "psnr", ...). With them, even with an empty list,
        an item is a dict of "image" and the columns. Those that the index has are free; for others
        a row group's small columns are read.
    region, max_size: the part of each photo to decode, and the size to shrink it to, in pixels
        (`Archive.read`): less work than a crop or a resize of the whole. A photo that does not have
        the region is a broken one.
    transform: from the image's tensor to anything; picklable where a DataLoader spawns workers.
    on_error: what becomes of a photo that is damaged, or kept as a source without 8-bit picture.
        "raise" raises; "skip" leaves it out, so that a batch has fewer items; a function of its
        key and the error gives an image that takes its place, before `transform`.
    cache: where bytes from the store are kept on a local disk. Reading then takes whole blocks.
    block_size: photos in a block, the unit that a shuffle keeps together and that a cache reads.
    device: where the synthesis runs. With a plain DataLoader's workers it stays at "cpu";
        `ArchiveLoader` decodes on any device.
    storage_options: for the store, as fsspec takes them.

    The dataset pickles without open files and opens its own in each process.

    Errors: IndexError past the end. ArchiveError for a key that is not there, and, whatever
    `on_error` says, where the store does not answer; with "raise" also DamagedArchiveError and
    ArchiveError as `Archive.read` has them. ValueError for a column that is not there.
    """

    def __init__(
        self,
        archive: str | os.PathLike[str] | Archive,
        *,
        keys: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        region: Region | None = None,
        max_size: int | None = None,
        transform: Callable[[Tensor], Any] | None = None,
        on_error: OnError = "raise",
        cache: BlobCache | None = None,
        block_size: int = 32,
        device: str = "cpu",
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(archive, Archive):
            archive = open_archive(archive, device=device, storage_options=storage_options)
        if isinstance(on_error, str) and on_error not in ("raise", "skip"):
            raise ValueError(f"on_error {on_error!r}: one of raise, skip, or a function")
        self.columns = columns
        self.transform = transform
        self.on_error = on_error
        self.reader = PhotoReader(
            archive,
            keys,
            columns=columns or (),
            region=region,
            max_size=max_size,
            cache=cache,
            block_size=block_size,
        )

    @property
    def archive(self) -> Archive:
        """The archive the photos come from."""
        return self.reader.archive

    @property
    def keys(self) -> list[str]:
        """The keys, in the order of their positions."""
        return self.reader.keys

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> Any:
        """The item at a position; a photo that cannot be had raises also where others skip it."""
        (coded,) = self.reader.read([range(len(self))[position]])
        if self.on_error == "skip" and isinstance(coded.content, VaestreamError):
            raise coded.content
        return self.items([coded])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """The items at `positions`, in that order: what a DataLoader calls for a batch."""
        return self.items(self.reader.read([range(len(self))[at] for at in positions]))

    def items(self, photos: Iterable[Coded]) -> list[Any]:
        """The items of photos that `reader` has read, here or in another process."""
        found = []
        for photo in photos:
            content = photo.content
            if not isinstance(content, VaestreamError):
                image = self._image(content)
            elif self.on_error == "raise":
                raise content
            elif self.on_error == "skip":
                continue
            else:
                image = self.on_error(photo.key, content)
            item = image if self.transform is None else self.transform(image)
            found.append(item if self.columns is None else {"image": item, **photo.columns})
        return found

    def _image(self, content: Any) -> Tensor:
        """(3, H, W) uint8 on the device, of latents or of a source's pixels."""
        if isinstance(content, Tensor):  # of a kept source, which needs no model
            pixels = content.to(device_of(self.archive.device))
        else:
            pixels = self.archive.codec.render(content)
        if pixels.ndim == 2:
            return pixels.expand(3, -1, -1).contiguous()
        return pixels.permute(2, 0, 1).contiguous(memory_format=torch.contiguous_format)
