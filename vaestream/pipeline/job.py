"""The job: sources -> plan -> Ray Data over shards -> archive."""

import logging
import os
import queue
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from vaestream.archive.manifest import Manifest, PartInfo, PartStats
from vaestream.archive.reader import open_archive
from vaestream.codec import Codec
from vaestream.errors import ArchiveError, VaestreamError
from vaestream.pipeline.compressor import Settings, Verify
from vaestream.pipeline.destination import Destination
from vaestream.pipeline.lease import Lease
from vaestream.pipeline.plan import Shard, SourceObject, list_sources, make_shards
from vaestream.pipeline.stores import options_for, store_of
from vaestream.pipeline.worker import ShardWorker, WorkerSpec, make_batch, part_of

Device = Literal["auto", "cpu", "cuda"]

_LOG = logging.getLogger("vaestream")
_WAVE = 1024
_ROUNDS = 10
_OBJECT_STORE_BYTES = 128 << 20
_GPU_SHARE = 0.25
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


def plan_pools(
    nodes: Sequence[Mapping[str, float]],
    *,
    shards: int,
    device: Device = "auto",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
) -> list[Pool]:
    """Decide how many workers there are, from what each node has (Ray's names for resources).

    On CPUs each worker has one core and one thread: entropy coding holds the interpreter's lock and
    would leave other threads idle, and with the number of threads always the same a photo's
    bitstream does not depend on the machine. On GPUs several workers share one, so that it
    computes for one while others code; every worker still wants a core of the GPU's node. With
    device "auto" the cores that remain get workers too, in a pool of their own: GPUs come first,
    in the list and where `workers` limits both. Errors: VaestreamError for device "cuda" where no
    worker fits on a GPU, and for numbers that make no sense.
    """
    if workers is not None and workers < 1:
        raise VaestreamError(f"workers must be at least 1, not {workers}")
    if gpus_per_worker is not None and not 0 < gpus_per_worker <= 8:
        raise VaestreamError(f"GPUs per worker must lie in (0, 8], not at {gpus_per_worker:g}")
    share = gpus_per_worker or _GPU_SHARE
    cores = sum(int(node.get("CPU", 0.0)) for node in nodes)
    on_gpus = sum(
        min(int(node.get("GPU", 0.0) / share), int(node.get("CPU", 0.0))) for node in nodes
    )
    if device == "cuda" and not any(node.get("GPU") for node in nodes):
        raise VaestreamError("device cuda: the Ray cluster has no GPU")
    if device == "cuda" and not on_gpus:
        raise VaestreamError(
            f"device cuda: no node of the Ray cluster has {share:g} GPUs and a core for a worker"
        )
    most = min(workers or max(1, cores), shards)
    pools: list[Pool] = []
    if device != "cpu" and on_gpus:
        pools.append(Pool(min(most, on_gpus), "cuda", 1.0, share))
    taken = sum(pool.workers for pool in pools)
    if device != "cuda" and most > taken:
        pools.append(Pool(most - taken, "cpu", 1.0, 0.0))
    return pools


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
    see `plan_pools`; on a cluster that is named by an address, nodes that join in mid job get
    workers too, as far as `workers` allows. verify: which bitstreams are decoded again before they
    are written. address: of a Ray cluster; without it the environment's RAY_ADDRESS counts, then a
    Ray of this process, and else one is started here and ended with the job. weights: other than
    the shipped ones. An object of more than max_object_bytes gets an error row without its bytes.
    effort: gradient steps that refine each photo's latents (`Codec.compress`), a hundred times
    slower. progress: called as shards end.

    Every object of the sources gets one row, whatever it is. Run again with the same arguments,
    the job goes on where it was, or finds that all is done; new objects make new parts. Objects
    that are no longer in the sources stay in the archive. overwrite: let the new archive take the
    place of one with other settings or of other objects; the old one can be read until then.

    Two jobs on one destination at a time end as one whole archive if their settings are the same:
    the second warns (logger "vaestream") and begins at the other end. They know of each other by
    notes in the destination, which is best effort: clocks that differ by minutes hide them.

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
    listing = list_sources(
        texts,
        destination=target,
        include=include,
        exclude=exclude,
        storage_options=storage_options,
    )

    def cut(objects: Iterable[SourceObject]) -> list[Shard]:
        return make_shards(
            objects,
            settings=settings.to_json(),
            model_id=codec.model_id,
            images=shard_images,
            max_bytes=shard_bytes,
        )

    new: list[PartInfo] = []
    run_id = uuid.uuid4().hex
    lease: Lease | None = None
    with ExitStack() as stack:
        for _ in range(_ROUNDS):
            place = Destination.open(
                fs, root, settings=settings.to_json(), model_id=codec.model_id, overwrite=overwrite
            )
            work = place.work(listing.objects, cut)
            if not work.shards and place.is_finished(work.parts):
                break
            if lease is None:
                lease = stack.enter_context(Lease(fs, root, run_id))
            others = lease.others()
            if others:
                _LOG.warning(
                    "another job is at work on %s (%s): this one begins at the other end, and "
                    "what both make is kept once",
                    target,
                    ", ".join(map(str, others)),
                )
            place.begin(codec.weights)
            made: list[PartInfo] = []
            if work.shards:
                with _ray(address) as elastic:
                    pools = plan_pools(
                        _nodes(),
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
                        device="cpu",
                        threads=1,
                        max_object_bytes=max_object_bytes,
                        run_id=run_id,
                    )
                    shards = work.shards[::-1] if others else work.shards
                    most = (workers or len(shards)) if elastic else None
                    for part in _run(shards, spec, pools, most):
                        made.append(part)
                        if progress is not None:
                            progress(_progress(shards, made, time.monotonic() - begin))
            new += made
            with lease.turn():
                if place.commit([*work.parts, *made], alone=not lease.others()):
                    break
        else:
            raise ArchiveError(f"{target}: other jobs commit to it time and again; run again later")
    if lease is not None and not lease.others():
        place.clear()
    assert place.manifest is not None
    return _summary(
        place.manifest,
        new,
        left_out=listing.left_out,
        model_bytes=len(codec.weights),
        seconds=time.monotonic() - begin,
        up_to_date=lease is None,
        errors=_errors(target, storage_options) if place.manifest.totals.errors else [],
    )


def _run(
    shards: Sequence[Shard], spec: WorkerSpec, pools: Sequence[Pool], most: int | None
) -> Iterator[PartInfo]:
    """The parts of `shards`, as they end. Long lists go in waves, as from_items is eager.

    most: up to how many workers a pool may grow; None where pools keep their size.
    """
    for start in range(0, len(shards), _WAVE):
        wave = shards[start : start + _WAVE]
        if len(pools) == 1:
            yield from _run_pool(wave, spec, pools[0], most)
        else:
            yield from _run_both(wave, spec, pools, most)


def _run_both(
    shards: Sequence[Shard], spec: WorkerSpec, pools: Sequence[Pool], most: int | None
) -> Iterator[PartInfo]:
    """Two pools on the same shards, from both ends towards each other.

    What one has committed the other passes over, and what one has in hand when the other gets there
    goes to the faster (`ShardWorker`): so neither waits for the other, however fast each is, and
    nothing has to be shared but the destination.
    """
    ended: queue.Queue[PartInfo | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def run(ordered: Sequence[Shard], pool: Pool) -> None:
        try:
            for part in _run_pool(ordered, spec, pool, most):
                ended.put(part)
                if stop.is_set():
                    return
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    ways = (list(shards), list(reversed(shards)))
    for ordered, pool in zip(ways, pools, strict=True):
        threading.Thread(target=run, args=(ordered, pool), daemon=True).start()
    running, done = len(pools), set[str]()
    try:
        # Until both have ended, so that no worker is at work when the archive is committed.
        while running:
            told = ended.get()
            if isinstance(told, BaseException):
                raise told
            if told is None:
                running -= 1
            elif told.part_id not in done:
                done.add(told.part_id)
                yield told
    finally:
        stop.set()


def _run_pool(
    shards: Sequence[Shard], spec: WorkerSpec, pool: Pool, most: int | None
) -> Iterator[PartInfo]:
    import ray.data
    from ray.exceptions import RayError

    wave = make_batch(shards)
    # A block is a shard: a worker's death repeats one shard, and each reports as it ends.
    dataset = ray.data.from_items(wave, override_num_blocks=len(wave))
    dataset.context.enable_progress_bars = False
    size = min(pool.workers, len(wave))
    limit = size if most is None else max(size, min(most, len(wave)))
    # With one shard in flight a worker is never busier than this: then the pool may grow.
    dataset.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    parts = dataset.map_batches(
        ShardWorker,
        fn_constructor_args=(replace(spec, device=pool.device),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=size if most is None else 1,
            max_size=limit,
            initial_size=size,
            max_tasks_in_flight_per_actor=1,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    try:
        for row in parts.iter_rows():
            yield part_of(row["part"])
    except RayError as error:
        raise _cause(error) from error


def _nodes() -> list[Mapping[str, float]]:
    """What each node of the cluster has."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _cause(error: BaseException) -> VaestreamError:
    """What is behind an error of Ray's, in a line: the last one told of that is not Ray's own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = [line for line in lines if _ERROR_LINE.match(line)]
    return VaestreamError(f"the Ray job failed: {(told or lines)[-1]}")


@contextmanager
def _ray(address: str | None) -> Iterator[bool]:
    """A Ray to work with; one that was started here ends here. Gives whether it is a cluster that
    was named, which may grow."""
    # Ray Data sets its loggers up when it is imported: first that, then their level.
    import ray.data

    where = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        yield where != "local"
        return
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
        yield where != "local"
    except ConnectionError as error:
        raise VaestreamError(f"no Ray cluster at {where}: {error}") from error
    finally:
        logger.setLevel(level)
        ray.shutdown()


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
