"""Proof, photo by photo, that an archive stands for its sources: before these are deleted."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vaestream import images
from vaestream.archive.reader import Archive
from vaestream.archive.schema import MAX_VALUE_BYTES, RowInfo
from vaestream.codec.metrics import psnr
from vaestream.errors import VaestreamError
from vaestream.pipeline.fetch import Fetched, fetch_all
from vaestream.pipeline.listing import list_sources
from vaestream.pipeline.members import MemberReader
from vaestream.pipeline.plan import SourceObject

_WAVE = 256
_PSNR_TOLERANCE = 0.05
"""dB that another device or precision may cost."""
_ALIKE = 60.0
"""dB: pictures equal on one device may differ by a level here and there on another."""


@dataclass(slots=True)
class Proof:
    """What was found. objects: of the sources; photos: compressed ones that decode to the PSNR that
    their row claims, with their EXIF, XMP and ICC; verbatim: objects kept byte for byte; unlisted:
    rows that the sources do not have; problems: key and what is wrong with its row."""

    objects: int = 0
    photos: int = 0
    verbatim: int = 0
    unlisted: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)


def prove(
    archive: Archive,
    sources: Sequence[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    max_object_bytes: int = 1 << 30,
    progress: Callable[[Proof], None] | None = None,
) -> Proof:
    """Read every object of `sources` again and hold the archive's row against it.

    sources, include and exclude as the archive was made with, as keys follow from them. A row is
    right when it was made from the very bytes that the source has now and gives them back (kept
    objects, broken ones too) or decodes to within 0.05 dB of the PSNR that it claims, with the
    metadata that the source has. Works in one process. Errors: SourceError for sources that cannot
    be listed, and where a store fails; all else is in the result.
    """
    listing = list_sources(
        sources,
        destination=archive.url,
        include=include,
        exclude=exclude,
        storage_options=storage_options,
    )
    max_object_bytes = min(max_object_bytes, MAX_VALUE_BYTES)
    proof = Proof()
    members = MemberReader()
    held = 0
    try:
        for wave in _waves(listing, _WAVE):
            fetched = fetch_all(
                wave, listing.stores, members=members, max_object_bytes=max_object_bytes
            )
            for got in fetched:
                proof.objects += 1
                held += got.item.key in archive
                problem = _check(archive, got, proof, max_object_bytes)
                if problem is not None:
                    proof.problems.append((got.item.key, problem))
            if progress is not None:
                progress(proof)
    finally:
        members.close()
    proof.unlisted = len(archive) - held
    return proof


def _waves(objects: Iterator[SourceObject] | Any, size: int) -> Iterator[list[SourceObject]]:
    wave: list[SourceObject] = []
    for item in objects:
        wave.append(item)
        if len(wave) == size:
            yield wave
            wave = []
    if wave:
        yield wave


def _check(archive: Archive, got: Fetched, proof: Proof, max_object_bytes: int) -> str | None:
    """What is wrong with the row of an object, None where nothing is."""
    key = got.item.key
    if key not in archive:
        return "is not in the archive"
    if got.data is None:
        return f"the source {got.error}"
    try:
        row = archive.row(key)
        if row.source_sha256 != hashlib.sha256(got.data).hexdigest():
            if row.unread:
                return f"its bytes are not in the archive: {row.error}"
            return "the source is not what the row was made from"
        blob = archive.blob(key)
        if row.codec == "source":
            if blob != got.data:
                return f"its bytes are not in the archive: {row.error or 'they differ'}"
            proof.verbatim += 1
            return None
        problem = _check_photo(archive, row, blob, got.data)
    except VaestreamError as error:
        return str(error)
    proof.photos += problem is None
    return problem


def _check_photo(archive: Archive, row: RowInfo, blob: bytes, data: bytes) -> str | None:
    photo = images.load(data, name=row.key, max_pixels=2**40)
    if not isinstance(photo, images.Photo):
        return "the source does not read as a photo here"
    (decoded,) = archive.codec.decode([blob], max_pixels=None)
    if decoded.shape != photo.pixels.shape:
        return f"decodes to {_size(decoded)}, but the source has {_size(photo.pixels)}"
    if row.psnr is not None:
        reached = psnr(photo.pixels, decoded)
        if not reached >= min(row.psnr, _ALIKE) - _PSNR_TOLERANCE:
            return f"decodes to {reached:.2f} dB, but its row claims {row.psnr:.2f} dB"
    (extra,) = archive.payloads([row.key])
    for name in ("exif", "xmp", "icc"):
        if getattr(extra, name) != getattr(photo, name):
            return f"its {name.upper()} is not the source's"
    return None


def _size(pixels: npt.NDArray[np.uint8]) -> str:
    return "x".join(map(str, (pixels.shape[1], pixels.shape[0], *pixels.shape[2:])))
