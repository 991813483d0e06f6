"""Jobs in the process of the test: for what a job does, wherever its shards are done."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from vaestream.pipeline import job
from vaestream.pipeline.cluster import Pool
from vaestream.pipeline.worker import (
    Made,
    PackedShard,
    ShardWorker,
    WorkerSpec,
    made_of,
    make_batch,
)


@contextmanager
def without_ray() -> Iterator[None]:
    """Within the block jobs do their shards one after the other in this process, which saves the
    seconds in which Ray starts processes that import torch. The archives are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "ray_session", lambda address: nullcontext(False))
        patch.setattr(job, "cluster_nodes", lambda: [{"CPU": 1.0}])
        patch.setattr(job, "run_shards", _run_shards)
        yield


def _run_shards(
    shards: Sequence[PackedShard], spec: WorkerSpec, pools: Sequence[Pool], most: int | None
) -> Iterator[Made]:
    worker = ShardWorker(pickle.loads(pickle.dumps(spec)))  # as it goes through Ray
    for row in make_batch(shards):
        (outcome,) = worker({"shard": np.array([row["shard"]], object)})["made"]
        yield made_of(outcome)
