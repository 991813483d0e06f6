"""The manifest: the file that makes a folder of parts an archive, written last.

It names every part with its size and hashes, the index, the model and the settings, and holds a
digest of itself.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import fsspec

from vaestream.archive.schema import FORMAT_VERSION, Row
from vaestream.archive.storage import (
    is_temporary,
    join,
    list_names,
    put_bytes,
    read_bytes,
    remove_temporaries,
    shown,
)
from vaestream.errors import ArchiveError, DamagedArchiveError

MANIFEST = "manifest.json"
REPORT = "report.html"
"""For people, beside the archive and no part of it."""
_FORMAT = "vaestream archive"


@dataclass(slots=True)
class PartStats:
    """Sums over the rows of a part; `a + b` are the sums over both.

    photos_vae, kept, errors: rows with a bitstream; kept sources; rows with an error (which are
    not counted as kept). source_bytes, coded_bytes: of the sources and of the blobs of all rows but
    those of objects that could not be read, which are not in the archive.
    vae_source_bytes, vae_coded_bytes, vae_pixels: of the rows with a bitstream alone.
    metadata_bytes: of the EXIF, XMP and ICC payloads. psnr_sum, psnr_count: dB, over the finite
    ones. reasons: number of kept rows by the reason.
    """

    photos_vae: int = 0
    kept: int = 0
    errors: int = 0
    source_bytes: int = 0
    coded_bytes: int = 0
    vae_source_bytes: int = 0
    vae_coded_bytes: int = 0
    vae_pixels: int = 0
    metadata_bytes: int = 0
    psnr_sum: float = 0.0
    psnr_count: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """All rows."""
        return self.photos_vae + self.kept + self.errors

    @property
    def bpp(self) -> float | None:
        """Bits per pixel of the photos with a bitstream, all their bits by all their pixels."""
        return 8 * self.vae_coded_bytes / self.vae_pixels if self.vae_pixels else None

    @property
    def psnr(self) -> float | None:
        """Their mean PSNR in dB."""
        return self.psnr_sum / self.psnr_count if self.psnr_count else None

    def add(self, row: Row) -> None:
        """Count one row in."""
        if not row.unread:
            self.source_bytes += row.source_size
        self.coded_bytes += len(row.data)
        self.metadata_bytes += sum(len(value or b"") for value in (row.exif, row.xmp, row.icc))
        if row.error is not None:
            self.errors += 1
        elif row.codec == "source":
            self.kept += 1
            if row.reason is not None:
                self.reasons[row.reason] = self.reasons.get(row.reason, 0) + 1
        else:
            self.photos_vae += 1
            self.vae_source_bytes += row.source_size
            self.vae_coded_bytes += len(row.data)
            self.vae_pixels += (row.width or 0) * (row.height or 0)
            if row.psnr is not None and row.psnr < float("inf"):
                self.psnr_sum += row.psnr
                self.psnr_count += 1

    def __add__(self, other: Self) -> "PartStats":
        reasons = dict(self.reasons)
        for reason, count in other.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        sums = {
            name.name: getattr(self, name.name) + getattr(other, name.name)
            for name in fields(self)
            if name.name != "reasons"
        }
        return PartStats(**sums, reasons=dict(sorted(reasons.items())))


@dataclass(frozen=True, slots=True)
class PartInfo:
    """A committed part.

    name: the file's. size: bytes of the file. body_size: of these, the bytes before the footer.
    body_sha256, footer_sha256: hex SHA-256 of the bytes before the footer, and of the footer with
    its own digest in it taken as 64 zeros. Together they cover every byte. replaces: file name of
    an earlier part, all of whose keys this one has too.
    """

    name: str
    part_id: str
    size: int
    body_size: int
    body_sha256: str
    footer_sha256: str
    num_rows: int
    stats: PartStats
    replaces: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict that JSON can hold and `from_json` takes back."""
        values = asdict(self)
        if self.replaces is None:
            del values["replaces"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**values, "stats": PartStats(**values["stats"])})


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive is made of.

    settings: whatever the job that wrote it needs to know its settings again (JSON).
    model_id: hex SHA-256 of the model in models/; None where no row needs one.
    parts: by name. index_sha256: hex, of the whole of index.parquet.
    """

    settings: dict[str, Any]
    model_id: str | None
    parts: tuple[PartInfo, ...]
    index_sha256: str
    version: int = FORMAT_VERSION

    @property
    def totals(self) -> PartStats:
        """The sums over all parts."""
        return sum((part.stats for part in self.parts), PartStats())

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.num_rows for part in self.parts)


def write_manifest(
    fs: fsspec.AbstractFileSystem,
    root: str,
    *,
    settings: dict[str, Any],
    model_id: str | None,
    parts: Sequence[PartInfo],
    index_sha256: str,
    alone: bool = True,
) -> Manifest:
    """Write the manifest, the last step of a commit, and clear away what killed writers left,
    unless other writers are at work there (not `alone`).

    The same arguments give the same bytes. Raises ArchiveError when it cannot be written.
    """
    ordered = tuple(sorted(parts, key=lambda part: part.name))
    manifest = Manifest(settings, model_id, ordered, index_sha256)
    values: dict[str, Any] = {
        "format": _FORMAT,
        "version": manifest.version,
        "model_id": model_id,
        "settings": settings,
        "totals": asdict(manifest.totals),
        "index_sha256": index_sha256,
        "parts": [part.to_json() for part in ordered],
    }
    values["sha256"] = _digest(values)
    put_bytes(fs, join(root, MANIFEST), json.dumps(values, indent=1, sort_keys=True).encode())
    if alone:
        remove_temporaries(fs, root)
    return manifest


def read_manifest(fs: fsspec.AbstractFileSystem, root: str) -> Manifest:
    """Read the manifest of the archive in folder `root`.

    Raises ArchiveError when there is none (no finished archive) or when a later version wrote
    it, DamagedArchiveError when its bytes are not those that were written.
    """
    path = join(root, MANIFEST)
    try:
        data = read_bytes(fs, path)
    except FileNotFoundError as error:
        raise ArchiveError(_no_archive(fs, root)) from error
    try:
        values = json.loads(data)
        if values["format"] != _FORMAT:
            raise ArchiveError(f"{path}: is no manifest of a vaestream archive")
        version, digest = int(values["version"]), values.pop("sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedArchiveError(f"{path}: manifest: is damaged ({error!r})") from error
    if digest != _digest(values):
        raise DamagedArchiveError(f"{path}: manifest: its own digest does not fit")
    if version > FORMAT_VERSION:
        raise ArchiveError(
            f"{path}: the archive has format version {version}; this vaestream reads up to "
            f"{FORMAT_VERSION}, a newer one is needed"
        )
    return Manifest(
        settings=values["settings"],
        model_id=values["model_id"],
        parts=tuple(PartInfo.from_json(part) for part in values["parts"]),
        index_sha256=values["index_sha256"],
        version=version,
    )


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _no_archive(fs: fsspec.AbstractFileSystem, root: str) -> str:
    names = list_names(fs, root)
    parts = [name for name in names if name.endswith(".parquet") and not is_temporary(name)]
    if parts:
        return (
            f"{shown(fs, root)}: no finished archive: {len(parts)} Parquet files and no "
            f"{MANIFEST}; the job that wrote them did not end, run it again to finish"
        )
    return f"{shown(fs, root)}: no archive there ({MANIFEST} not found)"
