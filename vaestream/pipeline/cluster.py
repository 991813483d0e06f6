"""Ray: workers on a cluster's cores and GPUs, or on this machine's, and shards for them."""

import logging
import os
import queue
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from vaestream.errors import VaestreamError
from vaestream.pipeline.worker import (
    Made,
    PackedShard,
    ShardWorker,
    WorkerSpec,
    made_of,
    make_batch,
)

Device = Literal["auto", "cpu", "cuda"]

_OBJECT_STORE_BYTES = 128 << 20
_GPU_SHARE = 0.25
_ERROR_LINE = re.compile(r"(?!ray\.)[A-Za-z_][\w.]*: ")


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


def run_shards(
    shards: Sequence[PackedShard], spec: WorkerSpec, pools: Sequence[Pool], most: int | None
) -> Iterator[Made]:
    """What becomes of `shards`, as they end.

    spec: its device is the pool's. pools: of `plan_pools`. most: up to how many workers a pool may
    grow; None where pools keep their size. Errors: VaestreamError, as workers and Ray tell them.
    """
    if len(pools) == 1:
        yield from _run_pool(shards, spec, pools[0], most)
    else:
        yield from _run_both(shards, spec, pools, most)


def _run_both(
    shards: Sequence[PackedShard], spec: WorkerSpec, pools: Sequence[Pool], most: int | None
) -> Iterator[Made]:
    """Two pools on the same shards, from both ends towards each other.

    What one has committed the other passes over, and what one has in hand when the other gets there
    goes to the faster (`ShardWorker`): so neither waits for the other, however fast each is, and
    nothing has to be shared but the destination.
    """
    ended: queue.Queue[Made | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def run(ordered: Sequence[PackedShard], pool: Pool) -> None:
        try:
            for made in _run_pool(ordered, spec, pool, most):
                ended.put(made)
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
            elif told.part.part_id not in done:
                done.add(told.part.part_id)
                yield told
    finally:
        stop.set()


def _run_pool(
    shards: Sequence[PackedShard], spec: WorkerSpec, pool: Pool, most: int | None
) -> Iterator[Made]:
    rows = make_batch(shards)
    spec = replace(spec, device=pool.device)
    return (made_of(row["made"]) for row in map_rows(ShardWorker, (spec,), rows, pool, most))


def map_rows(
    worker: type,
    args: tuple[object, ...],
    rows: Sequence[Mapping[str, Any]],
    pool: Pool,
    most: int | None,
) -> Iterator[dict[str, Any]]:
    """What `worker(*args)`, called with batches of one row in the pool's processes, makes of
    `rows`, in any order, each as it ends. most: as for `run_shards`. Errors: VaestreamError with
    Ray's reason."""
    import ray.data
    from ray.exceptions import RayError

    # A block is a row: a worker's death repeats one row, and each reports as it ends.
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    size = min(pool.workers, len(rows))
    limit = size if most is None else max(size, min(most, len(rows)))
    # With one row in flight a worker is never busier than this: then the pool may grow.
    dataset.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    results = dataset.map_batches(
        worker,
        fn_constructor_args=args,
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
        yield from results.iter_rows()
    except RayError as error:
        raise cause_of(error) from error


def cluster_nodes() -> list[Mapping[str, float]]:
    """What each node of the cluster has."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def cause_of(error: BaseException) -> VaestreamError:
    """What is behind an error of Ray's, in a line: the last one told of that is not Ray's own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = [line for line in lines if _ERROR_LINE.match(line)]
    return VaestreamError(f"the Ray job failed: {(told or lines)[-1]}")


@contextmanager
def ray_session(address: str | None) -> Iterator[bool]:
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
        logger.setLevel(level)
    except ConnectionError as error:
        logger.setLevel(level)
        raise VaestreamError(f"no Ray cluster at {where}: {error}") from error
    except BaseException:
        # Threads of Ray Data that are not done yet would report the end as an error of theirs.
        logger.setLevel(logging.CRITICAL)
        raise
    finally:
        ray.shutdown()
