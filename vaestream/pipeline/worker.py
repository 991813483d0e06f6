"""The Ray actor of a job: a shard's description in, its committed part's description out."""

import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fsspec import AbstractFileSystem

from vaestream.archive.manifest import PartInfo
from vaestream.archive.schema import Row
from vaestream.archive.writer import find_part, model_path, write_part
from vaestream.codec import Codec
from vaestream.errors import DamagedArchiveError
from vaestream.pipeline.attempts import ISOLATE_AFTER, begin_attempt, end_attempts
from vaestream.pipeline.compressor import Compressor, Settings, Verify, failed
from vaestream.pipeline.fetch import Fetched, fetch_all
from vaestream.pipeline.isolate import IsolatedCompressor, MakesRows
from vaestream.pipeline.plan import Shard


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to know, picklable.

    stores: by `SourceObject.store`. fs, root: the destination, where the model lies already.
    device: "cpu" or "cuda". threads: torch's, within one operation. run_id: of this run of the job.
    """

    stores: tuple[AbstractFileSystem, ...]
    fs: AbstractFileSystem
    root: str
    model_id: str
    settings: Settings
    verify: Verify
    device: str
    threads: int
    max_object_bytes: int
    run_id: str

    def __call__(self) -> Compressor:
        """Make the compressor of this process (see `isolate.Make`)."""
        torch.set_num_threads(self.threads)
        path = model_path(self.root, self.model_id)
        codec = Codec.load(
            self.fs.unstrip_protocol(path),
            device=self.device,
            storage_options=dict(self.fs.storage_options),
        )
        return Compressor(codec, self.settings, self.verify)


class ShardWorker:
    """A callable for `Dataset.map_batches`: column "shard" (pickled `Shard`) in, "part" (JSON of a
    `PartInfo`) out, a batch of any size.

    A shard whose part is committed is passed over, so a job that is run again, or a shard that Ray
    tries again, repeats nothing. The model is loaded with the first shard that needs it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._compressor: Compressor | None = None

    def __call__(self, batch: dict[str, "np.ndarray[Any, Any]"]) -> dict[str, list[str]]:
        """Do the shards of a batch, one after the other."""
        parts = [self.run(pickle.loads(shard)) for shard in batch["shard"]]
        return {"part": [json.dumps(part.to_json()) for part in parts]}

    def run(self, shard: Shard) -> PartInfo:
        """Compress one shard and commit its part, unless that is done.

        Errors: ArchiveError where the destination cannot be written, SourceError where the source's
        store fails, VaestreamError where the shard kills every process; nothing is left then.
        """
        spec = self._spec
        done = committed(spec.fs, spec.root, shard.part_id)
        if done is not None:
            return done
        attempts = begin_attempt(spec.fs, spec.root, shard.part_id, spec.run_id)
        try:
            if attempts >= ISOLATE_AFTER:
                with IsolatedCompressor(spec) as isolated:
                    return self._write(shard, isolated)
            if self._compressor is None:
                self._compressor = spec()
            return self._write(shard, self._compressor)
        finally:
            # Also after an error in Python: only a death in mid shard counts as a failed attempt.
            end_attempts(spec.fs, spec.root, shard.part_id)

    def _write(self, shard: Shard, compressor: MakesRows) -> PartInfo:
        spec = self._spec
        fetched = fetch_all(shard.objects, spec.stores, max_object_bytes=spec.max_object_bytes)
        return write_part(spec.fs, spec.root, shard.part_id, _rows(fetched, compressor))


def committed(fs: AbstractFileSystem, root: str, part_id: str) -> PartInfo | None:
    """The part, if it stands in the destination; one whose footer is damaged does not count."""
    try:
        return find_part(fs, root, part_id)
    except DamagedArchiveError:
        return None


def make_batch(shards: Sequence[Shard]) -> list[dict[str, bytes]]:
    """Rows of a dataset for `ShardWorker`; pickled, as Arrow takes no name that is not UTF-8."""
    return [{"shard": pickle.dumps(shard)} for shard in shards]


def _rows(fetched: Iterable[Fetched], compressor: MakesRows) -> Iterator[Row]:
    for got in fetched:
        if got.data is None:
            yield failed(got.item, None, got.error or "cannot be read")
        else:
            yield compressor.row(got.item, got.data)
