"""What every job begins with: its settings, model, destination and sources, checked and opened."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem

from vaestream.archive.models import load_codec, model_path
from vaestream.archive.storage import exists
from vaestream.codec import Codec
from vaestream.errors import VaestreamError
from vaestream.pipeline.compressor import Settings
from vaestream.pipeline.destination import Destination, model_at
from vaestream.pipeline.listing import Listing, list_sources
from vaestream.pipeline.plan import Cutter
from vaestream.pipeline.stores import options_for, store_of
from vaestream.pipeline.work import Work

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that could begin. Nothing is written yet, and `work` lists the sources as it goes."""

    url: str
    settings: Settings
    codec: Codec
    place: Destination
    listing: Listing
    work: Work


def prepare(
    sources: Paths,
    destination: str | os.PathLike[str],
    *,
    settings: Settings,
    shard_images: int = 256,
    shard_bytes: int = 256 << 20,
    max_object_bytes: int = 1 << 30,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    moved: bool = False,
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Prepared:
    """Open all that a job needs; the arguments are those of `job.compress`.

    Errors: as `job.compress`, for what can be known before the first photo.
    """
    if shard_images < 1 or shard_bytes < 1:
        raise VaestreamError("shard images and shard bytes must be at least 1")
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    url = os.fspath(destination)
    fs, path = store_of(url, storage_options)
    root = path.rstrip("/")
    codec = Codec.load(
        weights,
        device=device,
        storage_options=None if weights is None else options_for(str(weights), storage_options),
    )
    if weights is None and not overwrite:
        codec = _with_model_at(fs, root, codec, device)
    place = Destination.open(
        fs,
        root,
        settings=settings.to_json(),
        model_id=codec.model_id,
        overwrite=overwrite,
    )
    listing = list_sources(
        [os.fspath(source) for source in listed],
        destination=url,
        include=include,
        exclude=exclude,
        storage_options=storage_options,
    )
    cutter = Cutter(place.settings, place.model_id, images=shard_images, max_bytes=shard_bytes)
    work = place.work(listing, cutter, max_object_bytes=max_object_bytes, moved=moved)
    return Prepared(url, settings, codec, place, listing, work)


def _with_model_at(fs: AbstractFileSystem, root: str, codec: Codec, device: str) -> Codec:
    """`codec`, or where an archive stands the one that it was made with, so that it goes on after
    an update too."""
    model_id = model_at(fs, root)
    if model_id in (None, codec.model_id) or not exists(fs, model_path(root, str(model_id))):
        return codec
    return load_codec(fs, root, str(model_id), device=device)
