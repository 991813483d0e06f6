"""Random crops of a photo collection, for training."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vaestream.errors import SourceError
from vaestream.images import Photo, load

_ENLARGE = 3.0
_MAX_BYTES = 1 << 30  # of a file: photos have fewer, videos may not fit into memory


@dataclass(frozen=True)
class PhotoSet:
    """Decoded photos in memory, each (H, W, 3) uint8 and at least one crop large."""

    photos: tuple[NDArray[np.uint8], ...]
    names: tuple[str, ...]

    def crops(
        self, count: int, size: int, rng: np.random.Generator, *, enlarged: float = 0.0
    ) -> Tensor:
        """(count, 3, size, size) float32 pixels minus 128, channels-last.

        Photos are drawn in proportion to their area, places uniformly; half are mirrored.
        enlarged: the share that shows less of its photo, enlarged up to `_ENLARGE` times: as smooth
        as photos straight from a camera, where a collection holds shrunk ones.
        """
        areas = np.array([p.shape[0] * p.shape[1] for p in self.photos], np.float64)
        batch = np.empty((count, size, size, 3), np.uint8)
        for i, index in enumerate(rng.choice(len(areas), count, p=areas / areas.sum())):
            photo = self.photos[index]
            side = size
            if rng.random() < enlarged:
                side = round(size / rng.uniform(1.0, _ENLARGE))
            top = rng.integers(photo.shape[0] - side + 1)
            left = rng.integers(photo.shape[1] - side + 1)
            crop = photo[top : top + side, left : left + side]
            if side < size:
                picture = Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC)
                crop = np.asarray(picture)
            batch[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
        return torch.from_numpy(batch).permute(0, 3, 1, 2).float() - 128


def stratified(count: int, limit: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Random numbers of [0, limit) that rise and span it: one of each of `count` equal parts."""
    return (np.arange(count) + rng.random(count)) * (limit / count)


def list_photos(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files under folders, recursively, and files as they are; each once, sorted by path."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path)]
        elif path.is_file():
            files.append(path)
        else:
            raise SourceError(f"{path}: no such file or folder")
    return sorted(set(files))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def split(
    files: Sequence[Path], count: int, *, min_side: int, size: int, max_bytes: int
) -> tuple[PhotoSet, Tensor]:
    """Photos to train on, of at least `min_side` and up to `max_bytes`, and the middle of each of
    `count` photos that are set aside: (count, 3, size, size) float32 pixels minus 128.

    With fewer than three files to train on for each that would be set aside, all are both. Raises
    SourceError when there are none.
    """
    held = set_aside(files, count, min_side=size)
    aside = frozenset(held)
    rest = [file for file in files if file not in aside]
    # Not those that fit into memory: large photos are few there, and still many files.
    there = list(islice(_of_side(rest, min_side), 3 * count))
    if len(there) < 3 * count:
        held = rest = sorted([*there, *_of_side(held, min_side)])
    training = load_photos(rest, min_side=min_side, max_bytes=max_bytes)
    middle = [_middle(p, size) for p in (_pixels(f, size) for f in held) if p is not None]
    return training, torch.from_numpy(np.stack(middle)).permute(0, 3, 1, 2).float() - 128


def _middle(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A copy, so that the photo itself need not stay in memory."""
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].copy()


def set_aside(files: Sequence[Path], count: int, *, min_side: int) -> list[Path]:
    """The first photo in each part of `files`, a part one in `count` of them, up to `count`."""
    size = max(1, len(files) // count)
    parts = (files[start : start + size] for start in range(0, len(files), size))
    found = (next((f for f in part if _pixels(f, min_side) is not None), None) for part in parts)
    return list(islice((file for file in found if file is not None), count))


def load_photos(files: Iterable[Path], *, min_side: int, max_bytes: int) -> PhotoSet:
    """Decode photos until `max_bytes` of pixels are in memory; what is no photo is passed over.

    Raises SourceError when none is there.
    """
    photos, names, total = [], [], 0
    for file in files:
        pixels = _pixels(file, min_side)
        if pixels is None:
            continue
        total += pixels.nbytes
        if total > max_bytes:
            break
        photos.append(pixels)
        names.append(file.name)
    if not photos:
        room = f", nor one that fits into {max_bytes / 1e9:g} GB" if total else ""
        raise SourceError(f"no photo of at least {min_side} pixels a side{room}")
    return PhotoSet(tuple(photos), tuple(names))


def read_photo(file: Path) -> NDArray[np.uint8] | None:
    """(H, W, 3) or (H, W), or None where the file is no photo."""
    if file.stat().st_size > _MAX_BYTES:
        return None
    loaded = load(file.read_bytes(), name=str(file))
    return loaded.pixels if isinstance(loaded, Photo) else None


def _of_side(files: Iterable[Path], min_side: int) -> Iterator[Path]:
    """The photos among files, of at least that side."""
    return (file for file in files if _pixels(file, min_side) is not None)


def _pixels(file: Path, min_side: int) -> NDArray[np.uint8] | None:
    """(H, W, 3), or None where the file is no photo, or too small a one."""
    pixels = read_photo(file)
    if pixels is None or min(pixels.shape[:2]) < min_side:
        return None
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
