"""The job: sources -> plan -> Ray Data over shards -> archive."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from vaestream.archive.manifest import REPORT, Manifest, PartInfo, PartStats
from vaestream.archive.reader import open_archive
from vaestream.archive.schema import MAX_VALUE_BYTES
from vaestream.archive.storage import exists, join
from vaestream.archive.writer import part_id_of
from vaestream.errors import ArchiveError, VaestreamError
from vaestream.pipeline.cluster import (
    Device,
    cluster_nodes,
    plan_pools,
    ray_session,
    run_shards,
)
from vaestream.pipeline.compressor import Settings, Verify
from vaestream.pipeline.lease import Lease
from vaestream.pipeline.prepare import Paths, Prepared, prepare
from vaestream.pipeline.report import Moment, Run, write_report
from vaestream.pipeline.stores import options_for
from vaestream.pipeline.work import Counts, ForeignObjectError, Work
from vaestream.pipeline.worker import Made, PackedShard, WorkerSpec
from vaestream.text import describe
from vaestream.urls import public_text, public_url

_LOG = logging.getLogger("vaestream")
_WAVE = 1024
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. objects, shards: of this run, as far as the sources have been listed (to
    their end where `listed`); done: what has ended so far. share: of the bytes to read, how many
    the ended shards had.

    stats: sums over the new parts that this run has made. seconds: since it began.
    """

    objects: int
    shards: int
    listed: bool
    done_objects: int
    done_shards: int
    share: float
    stats: PartStats
    seconds: float

    @property
    def megapixels_per_second(self) -> float:
        """Of the photos that were compressed."""
        return self.stats.vae_pixels / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate from the bytes done so far; None before the first, and while objects are still
        being listed."""
        if not self.share or not self.listed:
            return None
        return self.seconds / self.share * (1 - self.share)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job has done, JSON-able by `to_json`.

    objects: rows of the archive, of which photos are compressed, kept (by reason) are kept as their
    source, errors (by error) are broken or unread; also those that could not be read in the version
    that they have now, so that their row is of an earlier one. left_out: objects of the sources
    that patterns left out. changed: objects that had changed, whose rows this run has replaced
    where it could read them; unlisted: rows of objects that the sources do not have (any more),
    which stay. source_bytes, archive_bytes: of all sources and of all parts; the archive's model
    has model_bytes beside that. bpp, psnr: of the compressed photos: all their bits by all their
    pixels, and the mean in dB. megapixels, seconds, megapixels_per_second: of this run.
    up_to_date: whether there was nothing to do.
    """

    objects: int
    photos: int
    kept: dict[str, int]
    errors: dict[str, int]
    left_out: int
    changed: int
    unlisted: int
    source_bytes: int
    archive_bytes: int
    model_bytes: int
    ratio: float | None
    bpp: float | None
    psnr: float | None
    megapixels: float
    seconds: float
    megapixels_per_second: float | None
    up_to_date: bool
    failed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compress(
    sources: Paths,
    destination: str | os.PathLike[str],
    *,
    quality: float | None = None,
    target_bpp: float | None = None,
    target_psnr: float | None = None,
    min_psnr: float | None = None,
    device: Device = "auto",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    shard_images: int = 256,
    shard_bytes: int = 256 << 20,
    verify: Verify = "sample",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    address: str | None = None,
    overwrite: bool = False,
    moved: bool = False,
    weights: str | os.PathLike[str] | None = None,
    max_pixels: int = 256_000_000,
    max_object_bytes: int = 1 << 30,
    effort: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Compress photos from any store into a Parquet archive in any store, by a Ray job.

    sources: files, folders, globs or fsspec URLs, and tars, zips, Parquet files and lists (see
    `listing.list_sources`); destination: a folder or URL. quality (0 to 100, 50 when nothing is
    said), target_bpp and target_psnr exclude each other; min_psnr has a default that follows from
    them (`Settings.of`). workers, gpus_per_worker: see `cluster.plan_pools`; on a cluster that is
    named by an address, nodes that join in mid job get workers too, as far as `workers` allows.
    verify: which bitstreams are decoded again before they are written. address: of a Ray cluster;
    without it the environment's RAY_ADDRESS counts, then a Ray of this process, and else one is
    started here and ended with the job. weights: the archive's own when nothing is said, of a new
    archive the shipped ones. An object of more than max_object_bytes gets an error row without its
    bytes. effort: gradient steps that refine each photo's latents (`Codec.compress`); 8 take some
    16 times as long. progress: called when the work begins, and as shards end.

    Every object of the sources gets one row, whatever it is. Run again with the same arguments,
    the job goes on where it was, or finds that all is done; new objects make new parts. An object
    that has changed since (size, time or ETag) gets a new row in place of the old one, and the part
    that held it is written again. Objects that are no longer in the sources stay in the archive.
    overwrite: let the new archive take the place of one with other settings or of other objects;
    the old one can be read until then. moved: the sources have moved since: an object at another
    URL is the archive's of the same key, even if it has changed, too. Without it that is an error,
    as folders of one camera have pictures of the same names.

    Two jobs on one destination at a time end as one whole archive if their settings are the same:
    the second warns (logger "vaestream") and begins at the other end. They know of each other by
    notes in the destination, which is best effort: clocks that differ by minutes hide them.

    Work begins before the sources are listed to their end, and what is kept in memory of the
    objects does not grow with those still to come.

    Errors: SourceError, SettingsMismatchError, ArchiveError, WeightsError, VaestreamError.
    """
    begin = time.monotonic()
    settings = Settings.of(
        quality=quality,
        target_bpp=target_bpp,
        target_psnr=target_psnr,
        min_psnr=min_psnr,
        max_pixels=max_pixels,
        effort=effort,
    )
    if max_object_bytes < 1:
        raise VaestreamError("object bytes must be at least 1")
    max_object_bytes = min(max_object_bytes, MAX_VALUE_BYTES)
    new: list[PartInfo] = []
    unread: dict[str, str] = {}
    moments: list[Moment] = []
    crew = _Crew(address, device, workers, gpus_per_worker, verify, max_object_bytes)
    lease: Lease | None = None
    with ExitStack() as stack:
        for _ in range(_ROUNDS):
            prepared = prepare(
                sources,
                destination,
                settings=settings,
                shard_images=shard_images,
                shard_bytes=shard_bytes,
                max_object_bytes=max_object_bytes,
                include=include,
                exclude=exclude,
                storage_options=storage_options,
                overwrite=overwrite,
                moved=moved,
                weights=weights,
            )
            codec, place, work = prepared.codec, prepared.place, prepared.work
            with _Waves(work) as waves:
                if not waves.first and place.is_finished(work):
                    break
                if lease is None:
                    lease = stack.enter_context(Lease(place.fs, place.root, crew.run_id))
                others = lease.others()
                if others:
                    _LOG.warning(
                        "another job is at work on %s (%s): this one begins at the other end, and "
                        "what both make is kept once",
                        public_url(prepared.url),
                        ", ".join(map(str, others)),
                    )
                place.begin(codec.weights)
                made: list[PartInfo] = []
                if progress is not None:
                    progress(waves.progress(time.monotonic() - begin))
                try:
                    for one in crew.make(prepared, waves, backwards=bool(others)):
                        made.append(one.part)
                        unread |= one.unread
                        waves.ended(one.part)
                        moments.append(_moment(moments, one.part, time.monotonic() - begin))
                        if progress is not None:
                            progress(waves.progress(time.monotonic() - begin))
                except ForeignObjectError:
                    # What was made before it was found has no place here: the next run, of other
                    # sources, would take it in.
                    if lease.alone():
                        place.discard(made)
                    raise
            new += (part for part in made if part.part_id not in waves.rewritten)
            # One worker may have left a part as it was where another had more luck.
            replaced = {part.replaces for part in made}
            made = [part for part in made if part.name not in replaced]
            with lease.turn():
                parts = [*work.parts, *made]
                if place.commit(parts, dropped=work.dropped, alone=lease.alone):
                    break
        else:
            raise ArchiveError(
                f"{public_url(prepared.url)}: other jobs commit to it time and again; "
                "run again later"
            )
    # Also where there was nothing to do: the run before may have been killed just before this.
    if (lease or Lease(place.fs, place.root, crew.run_id)).alone():
        place.clear()
    assert place.manifest is not None
    seconds = time.monotonic() - begin
    errors = _errors(prepared.url, storage_options) if place.manifest.totals.errors else {}
    stale = {key: error for key, error in unread.items() if key not in errors}
    for key, error in stale.items():
        _LOG.warning("%s: %s; the row of its earlier version stays", key, error)
    if lease is not None:
        _report(prepared.url, Run(seconds, moments), storage_options)
    elif not exists(place.fs, join(place.root, REPORT)):
        _report(prepared.url, None, storage_options)
    return _summary(
        place.manifest,
        new,
        left_out=prepared.listing.left_out,
        counts=work.counts,
        model_bytes=len(codec.weights),
        seconds=seconds,
        up_to_date=lease is None,
        errors=errors | stale,
    )


@dataclass(frozen=True, slots=True)
class _Crew:
    """Who does the work: the arguments of `compress` that no row depends on."""

    address: str | None
    device: Device
    workers: int | None
    gpus_per_worker: float | None
    verify: Verify
    max_object_bytes: int
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def make(self, prepared: Prepared, waves: "_Waves", *, backwards: bool) -> Iterator[Made]:
        """What becomes of all shards, as they end; each wave begins with its smallest if
        `backwards`, else with its largest."""
        if not waves.first:
            return
        with ray_session(self.address) as elastic:
            pools = plan_pools(
                cluster_nodes(),
                shards=len(waves.first),
                device=self.device,
                workers=self.workers,
                gpus_per_worker=self.gpus_per_worker,
            )
            for wave in waves:
                spec = WorkerSpec(
                    stores=tuple(prepared.listing.stores),
                    fs=prepared.place.fs,
                    root=prepared.place.root,
                    model_id=prepared.codec.model_id,
                    settings=prepared.settings,
                    verify=self.verify,
                    device="cpu",
                    threads=1,
                    max_object_bytes=self.max_object_bytes,
                    run_id=self.run_id,
                )
                # Largest first: at the end, workers then wait for small ones.
                shards = sorted(wave, key=lambda s: s.source_bytes, reverse=not backwards)
                most = (self.workers or len(shards)) if elastic else None
                yield from run_shards(shards, spec, pools, most)


class _Waves:
    """Shards in waves of at most `_WAVE`, the next one listed while one is at work.

    shards, objects: listed so far; listed: whether that is all. rewritten: ids of parts that also
    hold rows of the part they replace, and of that one, should it stay. Errors of the listing come
    with the wave that they end.
    """

    def __init__(self, work: Work) -> None:
        self._shards = iter(work)
        self._sizes: dict[str, tuple[int, int]] = {}  # objects and bytes, by part
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="listing")
        self.shards = self.objects = self._bytes = 0
        self.listed = False
        self.rewritten: set[str] = set()
        self._done_shards = self._done_objects = self._done_bytes = 0
        self._stats = PartStats()
        self.first = self._next()

    def __enter__(self) -> "_Waves":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[list[PackedShard]]:
        wave = self.first
        while wave:
            coming = self._pool.submit(self._next)
            yield wave
            wave = coming.result()

    def ended(self, part: PartInfo) -> None:
        """Count a shard as done."""
        objects, size = self._sizes[part.part_id]
        self._done_shards += 1
        self._done_objects += objects
        self._done_bytes += size
        if part.part_id not in self.rewritten:
            self._stats += part.stats

    def progress(self, seconds: float) -> Progress:
        """Where the run stands."""
        return Progress(
            objects=self.objects,
            shards=self.shards,
            listed=self.listed,
            done_objects=self._done_objects,
            done_shards=self._done_shards,
            share=self._done_bytes / self._bytes if self._done_shards else 0.0,
            stats=self._stats,
            seconds=seconds,
        )

    def _next(self) -> list[PackedShard]:
        wave: list[PackedShard] = []
        for shard in islice(self._shards, _WAVE):
            if self._stopped.is_set():
                break
            packed = PackedShard.of(shard)
            wave.append(packed)
            ids = {shard.part_id}
            if shard.base is not None:
                ids.add(part_id_of(shard.base) or "")
                self.rewritten |= ids
            for part_id in ids:
                self._sizes[part_id] = len(shard.objects), packed.source_bytes
            self.objects += len(shard.objects)
        self.shards += len(wave)
        self._bytes += sum(shard.source_bytes for shard in wave)
        self.listed = len(wave) < _WAVE
        return wave


def _report(url: str, run: Run | None, storage_options: Mapping[str, Any] | None) -> None:
    """Write the report of a committed archive. It is no part of it: without it the job is as done,
    and whatever keeps it from being written is a warning."""
    try:
        archive = open_archive(url, storage_options=options_for(url, storage_options))
        write_report(archive, run=run, storage_options=storage_options)
    except Exception as error:
        told = public_text(describe(error))
        _LOG.warning("%s: %s was not written: %s", public_url(url), REPORT, told)


def _moment(moments: Sequence[Moment], part: PartInfo, seconds: float) -> Moment:
    """Where the run stands with one more part."""
    objects, megapixels = part.num_rows, part.stats.vae_pixels / 1e6
    if moments:
        objects, megapixels = moments[-1].objects + objects, moments[-1].megapixels + megapixels
    return Moment(seconds, len(moments) + 1, objects, megapixels)


def _errors(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, str]:
    """The error of each row that has one, by key."""
    index = open_archive(url, storage_options=options_for(url, storage_options)).index
    broken = index.filter(index["error"].is_valid())
    return dict(zip(broken["key"].to_pylist(), broken["error"].to_pylist(), strict=True))


def _summary(
    manifest: Manifest,
    new: Sequence[PartInfo],
    *,
    left_out: int,
    counts: Counts,
    model_bytes: int,
    seconds: float,
    up_to_date: bool,
    errors: Mapping[str, str],
) -> Summary:
    totals = manifest.totals
    archive_bytes = sum(part.size for part in manifest.parts)
    megapixels = sum(part.stats.vae_pixels for part in new) / 1e6
    kinds: dict[str, int] = {}
    for error in errors.values():
        kinds[error] = kinds.get(error, 0) + 1
    return Summary(
        objects=manifest.num_rows,
        photos=totals.photos_vae,
        kept=dict(totals.reasons),
        errors=kinds,
        left_out=left_out,
        changed=counts.changed,
        unlisted=counts.unlisted,
        source_bytes=totals.source_bytes,
        archive_bytes=archive_bytes,
        model_bytes=model_bytes,
        ratio=totals.source_bytes / archive_bytes if archive_bytes else None,
        bpp=totals.bpp,
        psnr=totals.psnr,
        megapixels=megapixels,
        seconds=seconds,
        megapixels_per_second=megapixels / seconds if megapixels else None,
        up_to_date=up_to_date,
        failed=list(errors),
    )
