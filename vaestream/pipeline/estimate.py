"""What a job would give and take, from a sample of its photos."""

import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from vaestream.archive.manifest import PartStats
from vaestream.errors import VaestreamError
from vaestream.pipeline.compressor import Compressor
from vaestream.pipeline.fetch import fetch_all
from vaestream.pipeline.members import MemberReader
from vaestream.pipeline.plan import SourceObject
from vaestream.pipeline.prepare import Prepared

_SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a job that was not run. objects, source_bytes: what is to be done, changed objects too;
    objects whose size is not known count as those whose size is, or as those of the sample.

    sampled: objects that were compressed for this; photos, kept, errors: of these. ratio,
    archive_bytes: source bytes by archive bytes, and what all would take at the sample's ratio.
    psnr: mean in dB of the sample's photos. worker_hours: of one worker on this machine (one core
    on a CPU), fetching included; divide by the number of workers.
    """

    objects: int
    source_bytes: int
    sampled: int
    photos: int
    kept: dict[str, int]
    errors: int
    ratio: float | None
    archive_bytes: int | None
    bpp: float | None
    psnr: float | None
    worker_hours: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def estimate(prepared: Prepared, *, sample: int = 32, max_object_bytes: int = 1 << 30) -> Estimate:
    """List the work to its end, compress `sample` of its objects here and write nothing.

    The sample is drawn with a fixed seed, every object as likely as any other, so the same sources
    give the same estimate but for the time. Errors: VaestreamError for a sample below 1,
    SourceError as the listing and `fetch_all` raise it.
    """
    if sample < 1:
        raise VaestreamError(f"the sample must have at least 1 object, not {sample}")
    objects, size, sized, chosen = _draw(
        (item for shard in prepared.work for item in shard.objects), sample
    )
    compressor = Compressor(prepared.codec, prepared.settings)
    members = MemberReader()
    stats = PartStats()
    begin = time.monotonic()
    try:
        fetched = fetch_all(
            chosen, prepared.listing.stores, members=members, max_object_bytes=max_object_bytes
        )
        for row in compressor.rows(fetched):
            stats.add(row)
    finally:
        members.close()
    seconds = time.monotonic() - begin
    known, count = (size, sized) if sized else (stats.source_bytes, len(chosen))
    total = size if sized == objects else round(known / max(1, count) * objects)
    ratio = stats.source_bytes / stats.coded_bytes if stats.coded_bytes else None
    return Estimate(
        objects=objects,
        source_bytes=total,
        sampled=len(chosen),
        photos=stats.photos_vae,
        kept=dict(stats.reasons),
        errors=stats.errors,
        ratio=ratio,
        archive_bytes=None if ratio is None else round(total / ratio),
        bpp=stats.bpp,
        psnr=stats.psnr,
        worker_hours=seconds / 3600 * objects / len(chosen) if chosen else 0.0,
    )


def _draw(objects: Iterable[SourceObject], count: int) -> tuple[int, int, int, list[SourceObject]]:
    """Number and bytes of all, number of those with known size, and a sample in their order."""
    rng = random.Random(_SEED)
    chosen: list[tuple[int, SourceObject]] = []
    number = size = sized = 0
    for item in objects:
        if item.version.size is not None:
            size += item.version.size
            sized += 1
        if number < count:
            chosen.append((number, item))
        elif (at := rng.randrange(number + 1)) < count:
            chosen[at] = (number, item)
        number += 1
    return number, size, sized, [item for _, item in sorted(chosen, key=lambda one: one[0])]
