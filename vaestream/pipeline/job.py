"""The job: sources -> plan -> Ray Data over shards -> archive."""

import logging
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vaestream.archive.manifest import Manifest, PartInfo, PartStats
from vaestream.archive.reader import open_archive
from vaestream.codec import Codec
from vaestream.errors import VaestreamError
from vaestream.pipeline.compressor import Settings, Verify
from vaestream.pipeline.destination import Destination
from vaestream.pipeline.plan import Shard, list_sources, make_shards
from vaestream.pipeline.report import REPORT, Moment, Run, write_report
from vaestream.pipeline.stores import options_for, store_of
from vaestream.pipeline.worker import ShardWorker, WorkerSpec, make_batch, part_of

Device = Literal["auto", "cpu", "cuda"]

_WAVE = 1024
_OBJECT_STORE_BYTES = 128 << 20
_GPU_SHARE = 0.25
_log = logging.getLogger(__name__)
_ERROR_LINE = re.compile(r"(?!ray\.)[A-Za-z_][\w.]*: ")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. objects, shards: all of this run; done: what has ended so far.

    stats: sums over the parts that this run has made. seconds: since it began.
    """

    objects: int
    shards: int
    done_objects: int
    done_shards: int
    stats: PartStats
    seconds: float

    @property
    def megapixels_per_second(self) -> float:
        """Of the photos that were compressed."""
        return self.stats.vae_pixels / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate from the objects done so far; None before the first."""
        if not self.done_objects:
            return None
        return self.seconds / self.done_objects * (self.objects - self.done_objects)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job has done, JSON-able by `to_json`.

    objects: rows of the archive, of which photos are compressed, kept (by reason) are kept as their
    source, errors (by error) are broken or unread. left_out: objects of the sources that patterns
    left out. source_bytes, archive_bytes: of all sources and of all parts; the archive's model has
    model_bytes beside that. bpp, psnr: of the compressed photos: all their bits by all their
    pixels, and the mean in dB. megapixels, seconds, megapixels_per_second: of this run.
    up_to_date: whether there was nothing to do.
    """

    objects: int
    photos: int
    kept: dict[str, int]
    errors: dict[str, int]
    left_out: int
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


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers of a job and what each of them is given."""

    workers: int
    device: Literal["cpu", "cuda"]
    num_cpus: float
    num_gpus: float


def plan_pool(
    resources: Mapping[str, float],
    *,
    shards: int,
    device: Device = "auto",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
) -> Pool:
    """Decide how many workers there are, from the cluster's `resources` (Ray's names).

    On CPUs each worker has one core and one thread: entropy coding holds the interpreter's lock and
    would leave other threads idle, and with the number of threads always the same a photo's
    bitstream does not depend on the machine. On GPUs several workers share one, so that it
    computes for one while others code; every worker still wants a core. Errors: VaestreamError for
    device "cuda" without a GPU, and for numbers that make no sense.
    """
    if workers is not None and workers < 1:
        raise VaestreamError(f"workers must be at least 1, not {workers}")
    if gpus_per_worker is not None and not 0 < gpus_per_worker <= 8:
        raise VaestreamError(f"GPUs per worker must lie in (0, 8], not at {gpus_per_worker:g}")
    cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
    if device == "cuda" and gpus == 0:
        raise VaestreamError("device cuda: the Ray cluster has no GPU")
    if device == "cpu" or gpus == 0:
        most = workers or max(1, int(cpus))
        return Pool(min(most, shards), "cpu", 1.0, 0.0)
    share = gpus_per_worker or _GPU_SHARE
    most = workers or max(1, min(int(gpus / share), int(cpus)))
    return Pool(min(most, shards), "cuda", 1.0, share)


def compress(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
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
    weights: str | os.PathLike[str] | None = None,
    max_pixels: int = 256_000_000,
    max_object_bytes: int = 1 << 30,
    effort: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Compress photos from any store into a Parquet archive in any store, by a Ray job.

    sources: files, folders, globs or fsspec URLs (see `plan.list_sources`); destination: a folder
    or URL. quality (0 to 100, 50 when nothing is said), target_bpp and target_psnr exclude each
    other; min_psnr has a default that follows from them (`Settings.of`). workers, gpus_per_worker:
    see `plan_pool`. verify: which bitstreams are decoded again before they are written. address: of
    a Ray cluster; without it the environment's RAY_ADDRESS counts, then a Ray of this process, and
    else one is started here and ended with the job. weights: other than the shipped ones. An
    object of more than max_object_bytes gets an error row without its bytes. effort: gradient steps
    that refine each photo's latents (`Codec.compress`), a hundred times slower. progress: called
    when the workers begin, and as shards end.

    Every object of the sources gets one row, whatever it is. Run again with the same arguments,
    the job goes on where it was, or finds that all is done; new objects make new parts. Objects
    that are no longer in the sources stay in the archive. overwrite: let the new archive take the
    place of one with other settings or of other objects; the old one can be read until then. Let
    no two jobs write to one destination at a time.

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
    if shard_images < 1 or shard_bytes < 1 or max_object_bytes < 1:
        raise VaestreamError("shard images, shard bytes and object bytes must be at least 1")
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    texts = [os.fspath(source) for source in listed]
    target = os.fspath(destination)
    fs, path = store_of(target, storage_options)
    root = path.rstrip("/")
    codec = Codec.load(
        weights,
        device="cpu",
        storage_options=None if weights is None else options_for(str(weights), storage_options),
    )
    place = Destination.open(
        fs, root, settings=settings.to_json(), model_id=codec.model_id, overwrite=overwrite
    )
    listing = list_sources(
        texts,
        destination=target,
        include=include,
        exclude=exclude,
        storage_options=storage_options,
    )
    work = place.work(
        listing.objects,
        lambda objects: make_shards(
            objects,
            settings=place.settings,
            model_id=place.model_id,
            images=shard_images,
            max_bytes=shard_bytes,
        ),
    )
    new: list[PartInfo] = []
    moments: list[Moment] = []
    up_to_date = not work.shards and place.is_finished(work.parts)
    if not up_to_date:
        place.begin(codec.weights)
        if work.shards:
            with _ray(address):
                import ray

                pool = plan_pool(
                    ray.cluster_resources(),  # type: ignore[no-untyped-call]
                    shards=len(work.shards),
                    device=device,
                    workers=workers,
                    gpus_per_worker=gpus_per_worker,
                )
                spec = WorkerSpec(
                    stores=tuple(listing.stores),
                    fs=fs,
                    root=root,
                    model_id=codec.model_id,
                    settings=settings,
                    verify=verify,
                    device=pool.device,
                    threads=1,
                    max_object_bytes=max_object_bytes,
                    run_id=uuid.uuid4().hex,
                )
                if progress is not None:
                    progress(_progress(work.shards, new, time.monotonic() - begin))
                for part in _run(work.shards, spec, pool):
                    new.append(part)
                    moments.append(_moment(moments, part, time.monotonic() - begin))
                    if progress is not None:
                        progress(_progress(work.shards, new, time.monotonic() - begin))
        place.commit([*work.parts, *new])
    assert place.manifest is not None
    seconds = time.monotonic() - begin
    if not up_to_date:
        _report(target, Run(seconds, moments), storage_options)
    return _summary(
        place.manifest,
        new,
        left_out=listing.left_out,
        model_bytes=len(codec.weights),
        seconds=seconds,
        up_to_date=up_to_date,
        errors=_errors(target, storage_options) if place.manifest.totals.errors else [],
    )


def _run(shards: Sequence[Shard], spec: WorkerSpec, pool: Pool) -> Iterator[PartInfo]:
    """The parts of `shards`, as they end. Long lists go in waves, as from_items is eager."""
    import ray.data
    from ray.exceptions import RayError

    for start in range(0, len(shards), _WAVE):
        wave = make_batch(shards[start : start + _WAVE])
        # A block is a shard: a worker's death repeats one shard, and each reports as it ends.
        dataset = ray.data.from_items(wave, override_num_blocks=len(wave))
        dataset.context.enable_progress_bars = False
        parts = dataset.map_batches(
            ShardWorker,
            fn_constructor_args=(spec,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(pool.workers, len(wave)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
        try:
            for row in parts.iter_rows():
                yield part_of(row["part"])
        except RayError as error:
            raise _cause(error) from error


def _cause(error: BaseException) -> VaestreamError:
    """What is behind an error of Ray's, in a line: the last one told of that is not Ray's own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = [line for line in lines if _ERROR_LINE.match(line)]
    return VaestreamError(f"the Ray job failed: {(told or lines)[-1]}")


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A Ray to work with; one that was started here ends here."""
    # Ray Data sets its loggers up when it is imported: first that, then their level.
    import ray.data

    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if where == "local":
        # Only descriptions of shards pass through the object store.
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's core writes errors that are none to stderr, past every logger.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    logger = logging.getLogger("ray.data")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        ray.init(address=where, **options)
        if main and handler is not None:
            # Ray puts its own in place, which ends the process without a word.
            signal.signal(signal.SIGTERM, handler)
        yield
    except ConnectionError as error:
        raise VaestreamError(f"no Ray cluster at {where}: {error}") from error
    finally:
        logger.setLevel(level)
        ray.shutdown()


def _report(url: str, run: Run, storage_options: Mapping[str, Any] | None) -> None:
    """Write the report of a committed archive. It is no part of it: without it the job is as done,
    and whatever keeps it from being written is a warning."""
    try:
        archive = open_archive(url, storage_options=options_for(url, storage_options))
        write_report(archive, run=run, storage_options=storage_options)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        _log.warning("%s: %s was not written: %s", url, REPORT, told)


def _moment(moments: Sequence[Moment], part: PartInfo, seconds: float) -> Moment:
    """Where the run stands with one more part."""
    objects, megapixels = part.num_rows, part.stats.vae_pixels / 1e6
    if moments:
        objects, megapixels = moments[-1].objects + objects, moments[-1].megapixels + megapixels
    return Moment(seconds, len(moments) + 1, objects, megapixels)


def _progress(shards: Sequence[Shard], parts: Sequence[PartInfo], seconds: float) -> Progress:
    return Progress(
        objects=sum(len(shard.objects) for shard in shards),
        shards=len(shards),
        done_objects=sum(part.num_rows for part in parts),
        done_shards=len(parts),
        stats=sum((part.stats for part in parts), PartStats()),
        seconds=seconds,
    )


def _errors(url: str, storage_options: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Key and error of each row that has one."""
    index = open_archive(url, storage_options=options_for(url, storage_options)).index
    broken = index.filter(index["error"].is_valid())
    return list(zip(broken["key"].to_pylist(), broken["error"].to_pylist(), strict=True))


def _summary(
    manifest: Manifest,
    new: Sequence[PartInfo],
    *,
    left_out: int,
    model_bytes: int,
    seconds: float,
    up_to_date: bool,
    errors: Sequence[tuple[str, str]],
) -> Summary:
    totals = manifest.totals
    archive_bytes = sum(part.size for part in manifest.parts)
    megapixels = sum(part.stats.vae_pixels for part in new) / 1e6
    kinds: dict[str, int] = {}
    for _, error in errors:
        kinds[error] = kinds.get(error, 0) + 1
    return Summary(
        objects=manifest.num_rows,
        photos=totals.photos_vae,
        kept=dict(totals.reasons),
        errors=kinds,
        left_out=left_out,
        source_bytes=totals.source_bytes,
        archive_bytes=archive_bytes,
        model_bytes=model_bytes,
        ratio=totals.source_bytes / archive_bytes if archive_bytes else None,
        bpp=8 * totals.vae_coded_bytes / totals.vae_pixels if totals.vae_pixels else None,
        psnr=totals.psnr_sum / totals.psnr_count if totals.psnr_count else None,
        megapixels=megapixels,
        seconds=seconds,
        megapixels_per_second=megapixels / seconds if megapixels else None,
        up_to_date=up_to_date,
        failed=[key for key, _ in errors],
    )
