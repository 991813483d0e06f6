"""The Ray actor of a job: a shard's description in, its committed part's description out."""

import heapq
import json
import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from fsspec import AbstractFileSystem

from vaestream import errors
from vaestream.archive.manifest import PartInfo
from vaestream.archive.models import load_codec
from vaestream.archive.rows import read_rows
from vaestream.archive.schema import Row
from vaestream.archive.storage import join
from vaestream.archive.writer import committed_part, part_id_of, write_part
from vaestream.errors import VaestreamError
from vaestream.pipeline.allocator import keep_freed_memory
from vaestream.pipeline.attempts import ISOLATE_AFTER, begin_attempt, end_attempts
from vaestream.pipeline.compressor import Compressor, Settings, Verify
from vaestream.pipeline.fetch import Witnesses, fetch_all
from vaestream.pipeline.isolate import IsolatedCompressor, MakesRows
from vaestream.pipeline.members import MemberReader
from vaestream.pipeline.plan import Shard

_LOOK_SECONDS = 10.0


class _Overtaken(Exception):
    """Somebody else has committed the shard in hand."""

    def __init__(self, part: PartInfo) -> None:
        self.part = part


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
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        codec = load_codec(self.fs, self.root, self.model_id, device=self.device)
        return Compressor(codec, self.settings, self.verify)


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a shard.

    part: the shard's; its base, where nothing that was to take a place there could be read. unread:
    error of each of these objects, by key; in the part is the row that they had.
    """

    part: PartInfo
    unread: dict[str, str] = field(default_factory=dict)


class ShardWorker:
    """A callable for `Dataset.map_batches`: column "shard" (pickled `Shard`) in, "made" (text for
    `made_of`) out, a batch of any size.

    A shard whose part is committed is passed over, so a job that is run again, or a shard that Ray
    tries again, repeats nothing. The model is loaded with the first shard that needs it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._compressor: Compressor | None = None
        self._members = MemberReader()
        self._witnesses: Witnesses = {}

    def __call__(self, batch: dict[str, "np.ndarray[Any, Any]"]) -> dict[str, list[str]]:
        """Do the shards of a batch, one after the other."""
        return {"made": [self._outcome(pickle.loads(shard)) for shard in batch["shard"]]}

    def _outcome(self, shard: Shard) -> str:
        try:
            made = self.run(shard)
            return json.dumps({"part": made.part.to_json(), "unread": made.unread})
        except VaestreamError as error:
            # Raised, Ray would hand on its own words instead of these.
            kind = next(k for k in type(error).__mro__ if k.__module__ == errors.__name__)
            return json.dumps({"error": kind.__name__, "message": str(error)})

    def run(self, shard: Shard) -> Made:
        """Compress one shard and commit its part, unless that is done.

        Errors: ArchiveError where the destination cannot be written, SourceError where the source's
        store fails, VaestreamError where the shard kills every process; nothing is left then.
        """
        spec = self._spec
        done = committed_part(spec.fs, spec.root, shard.part_id)
        if done is not None:
            return Made(done)
        attempts = begin_attempt(spec.fs, spec.root, shard.part_id, spec.run_id)
        try:
            if attempts >= ISOLATE_AFTER:
                with IsolatedCompressor(spec) as isolated:
                    return self._write(shard, isolated)
            if self._compressor is None:
                self._compressor = spec()
            return self._write(shard, self._compressor)
        except _Overtaken as overtaken:
            return Made(overtaken.part)
        finally:
            # Also after an error in Python: only a death in mid shard counts as a failed attempt.
            end_attempts(spec.fs, spec.root, shard.part_id)

    def _write(self, shard: Shard, compressor: MakesRows) -> Made:
        spec = self._spec
        fetched = fetch_all(
            shard.objects,
            spec.stores,
            members=self._members,
            max_object_bytes=spec.max_object_bytes,
            witnesses=self._witnesses,
        )
        rows: Iterator[Row] = compressor.rows(fetched)
        unread: dict[str, str] = {}
        if shard.base is not None:
            first: list[Row] = []
            for row in rows:
                first.append(row)
                if not row.unread:
                    break
            else:
                # Somebody else may have had more luck.
                done = committed_part(spec.fs, spec.root, shard.part_id)
                if done is not None:
                    return Made(done)
                base = committed_part(spec.fs, spec.root, part_id_of(shard.base) or "")
                if base is not None:
                    return Made(base, {row.key: str(row.error) for row in first})
            old = read_rows(spec.fs, join(spec.root, shard.base))
            rows = _renewed(old, chain(first, rows), unread)
        # Another worker may have the same shard in hand, on another device, with other bytes: the
        # part that stood first is the one that a manifest may name already.
        part = write_part(
            spec.fs,
            spec.root,
            shard.part_id,
            self._unless_overtaken(shard, rows),
            replaces=shard.base,
            replace=False,
        )
        return Made(part, unread)

    def _unless_overtaken(self, shard: Shard, rows: Iterator[Row]) -> Iterator[Row]:
        """`rows`, as long as nobody else commits the same shard."""
        looked = time.monotonic()
        for row in rows:
            if time.monotonic() - looked > _LOOK_SECONDS:
                part = committed_part(self._spec.fs, self._spec.root, shard.part_id)
                if part is not None:
                    raise _Overtaken(part)
                looked = time.monotonic()
            yield row


def _renewed(old: Iterable[Row], new: Iterable[Row], unread: dict[str, str]) -> Iterator[Row]:
    """The rows of a part with new ones in their places, both ascending by key. An object that could
    not be read keeps the row that it had, whatever its bytes were, and goes to `unread`."""
    both = heapq.merge(old, new, key=lambda row: row.key)
    for key, rows in groupby(both, key=lambda row: row.key):
        was, *anew = rows
        if anew and anew[0].unread:
            unread[key] = str(anew[0].error)
            yield was
        else:
            yield anew[0] if anew else was


def made_of(outcome: str) -> Made:
    """That of which a worker's answer tells. Raises the VaestreamError that it tells of."""
    told = json.loads(outcome)
    if "error" in told:
        kind: type[VaestreamError] = getattr(errors, told["error"])
        raise kind(told["message"])
    return Made(PartInfo.from_json(told["part"]), told["unread"])


@dataclass(frozen=True, slots=True)
class PackedShard:
    """A shard on its way to a worker, in a fraction of its memory. data: for `ShardWorker`."""

    source_bytes: int
    data: bytes

    @classmethod
    def of(cls, shard: Shard) -> "PackedShard":
        """Pickled, as Arrow takes no name that is not UTF-8."""
        return cls(shard.source_bytes, pickle.dumps(shard))


def make_batch(shards: Sequence[PackedShard]) -> list[dict[str, bytes]]:
    """Rows of a dataset for `ShardWorker`."""
    return [{"shard": shard.data} for shard in shards]
