"""Models inside an archive, and the codecs made of them."""

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import fsspec

from vaestream.archive.storage import file_size, join, put_bytes, read_bytes, shown
from vaestream.errors import DamagedArchiveError, WeightsError

if TYPE_CHECKING:
    from vaestream.codec import Codec


def model_path(root: str, model_id: str) -> str:
    """Where the archive in folder `root` keeps a model."""
    return join(root, f"models/{model_id}.safetensors")


def write_model(fs: fsspec.AbstractFileSystem, root: str, data: bytes) -> str:
    """Put a model into the archive's `models/`; returns its id, the hex SHA-256 of `data`."""
    model_id = hashlib.sha256(data).hexdigest()
    path = model_path(root, model_id)
    try:
        present = file_size(fs, path) == len(data)
    except FileNotFoundError:
        present = False
    if not present:
        put_bytes(fs, path, data)
    return model_id


@lru_cache(maxsize=4)
def shared_codec(fs: fsspec.AbstractFileSystem, root: str, model_id: str, device: str) -> "Codec":
    """`load_codec`, one for all in this process that want the same: pickled archives, say."""
    return load_codec(fs, root, model_id, device=device)


def load_codec(
    fs: fsspec.AbstractFileSystem, root: str, model_id: str, *, device: str = "auto"
) -> "Codec":
    """The codec with a model that lies in folder `root`.

    Raises DamagedArchiveError when it is not there, or not the one that was written, WeightsError
    when this version cannot use it.
    """
    from vaestream.codec import Codec

    path = model_path(root, model_id)
    try:
        data = read_bytes(fs, path)
    except FileNotFoundError as error:
        raise DamagedArchiveError(f"{shown(fs, path)}: the model is missing") from error
    if hashlib.sha256(data).hexdigest() != model_id:
        raise DamagedArchiveError(f"{shown(fs, path)}: model: its SHA-256 is not its name")
    try:
        return Codec.of(data, device=device)
    except WeightsError as error:
        raise WeightsError(f"{shown(fs, path)}: {error}") from error
