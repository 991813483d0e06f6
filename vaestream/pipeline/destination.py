"""The destination of a job: what stands there already, and the last step that makes it an archive.

A running job keeps `.vaestream-job/` there: with which settings it runs, so that it can only be
continued with the same, the attempts at its shards, and which drivers are at work (`lease`).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from vaestream.archive.index import INDEX, build_index
from vaestream.archive.manifest import (
    MANIFEST,
    Manifest,
    PartInfo,
    read_manifest,
    write_manifest,
)
from vaestream.archive.storage import RangeFile, join, list_names, put_bytes, read_bytes
from vaestream.archive.writer import committed_part, model_path, write_model
from vaestream.errors import ArchiveError, DamagedArchiveError, SettingsMismatchError, SourceError
from vaestream.pipeline.attempts import JOB_FOLDER
from vaestream.pipeline.plan import Shard, SourceObject, Version

_RECORD = f"{JOB_FOLDER}/job.json"
_THREADS = 16


@dataclass(slots=True)
class Work:
    """What a run has to do. parts: what stays; shards: what is to be compressed beside it."""

    parts: list[PartInfo]
    shards: list[Shard]


@dataclass(slots=True)
class Destination:
    """A folder in a store, opened for a job with these settings and this model (`open`).

    manifest: of the archive that stands there, if one does. replace: whether the new archive takes
    the place of that one; otherwise it grows.
    """

    fs: AbstractFileSystem
    root: str
    settings: dict[str, Any]
    model_id: str
    manifest: Manifest | None = None
    replace: bool = False
    _names: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        fs: AbstractFileSystem,
        root: str,
        *,
        settings: dict[str, Any],
        model_id: str,
        overwrite: bool,
    ) -> "Destination":
        """Look at what stands in `root`; nothing is written.

        Errors: SettingsMismatchError where an archive, finished or not, was made with other
        settings or another model, or where parts lie without a word of their settings, unless
        `overwrite`; DamagedArchiveError for a damaged manifest, unless `overwrite`.
        """
        names = list_names(fs, root)
        manifest = None
        if MANIFEST in names:
            try:
                manifest = read_manifest(fs, root)
            except DamagedArchiveError:
                if not overwrite:
                    raise
        wanted = {"settings": settings, "model_id": model_id}
        running = _read_record(fs, root)
        replace = overwrite
        if running is not None and running.pop("replace"):
            replace = replace or running == wanted
        found = running
        if found is None and manifest is not None:
            found = {"settings": manifest.settings, "model_id": manifest.model_id}
        if not overwrite:
            if found is not None and found != wanted:
                raise SettingsMismatchError(f"{root}: {_differences(found, wanted)}")
            if found is None and any(_part_id(name) for name in names):
                raise SettingsMismatchError(
                    f"{root}: holds parts of an archive, but neither {MANIFEST} nor the record of "
                    "a job; choose another destination, or overwrite"
                )
        return cls(fs, root, settings, model_id, manifest, replace, names)

    def work(
        self, objects: Sequence[SourceObject], cut: Callable[[Iterable[SourceObject]], list[Shard]]
    ) -> Work:
        """Divide `objects` into what is in the archive already and shards, made by `cut`.

        Shards are cut from what the archive did not hold when the first of the interrupted runs
        began, so that a run in several goes makes the same parts as one in peace. Errors:
        SourceError for an object that is in the archive in another state.
        """
        listed = {part.name: part for part in self.manifest.parts} if self.manifest else {}
        loose = self._committed(name for name in self._names if name not in listed)
        if self.replace:
            shards = cut(objects)
            names = {part.part_id: part for part in [*listed.values(), *loose]}
            done = [names[shard.part_id] for shard in shards if self._stands(shard, names)]
            ids = {part.part_id for part in done}
            return Work(done, [shard for shard in shards if shard.part_id not in ids])
        present = set(self._names)
        parts = [part for part in listed.values() if part.name in present]
        shards = cut(self._without(objects, parts))
        ids = {shard.part_id for shard in shards}
        parts += (part for part in loose if part.part_id in ids)
        # Parts of another go over other objects: the source has changed in between.
        foreign = [part for part in loose if part.part_id not in ids]
        if foreign:
            foreign = self._disjoint(foreign, self._keys(parts))
            parts += foreign
        done_ids = {part.part_id for part in loose}
        shards = [shard for shard in shards if shard.part_id not in done_ids]
        if foreign and shards:
            before = [item for shard in shards for item in shard.objects]
            rest = self._without(before, foreign)
            if len(rest) < len(before):
                shards = cut(rest)
        return Work(parts, shards)

    def is_finished(self, parts: Sequence[PartInfo]) -> bool:
        """Whether the archive stands there, whole, with just these parts."""
        return (
            self.manifest is not None
            and INDEX in self._names
            and self.fs.exists(model_path(self.root, self.model_id))
            and {part.name for part in parts} == {part.name for part in self.manifest.parts}
            and self.manifest.settings == self.settings
            and self.manifest.model_id == self.model_id
        )

    def begin(self, model: bytes) -> None:
        """Record the job and lay down the model, which workers load from here."""
        record = {
            "settings": self.settings,
            "model_id": self.model_id,
            "replace": self.replace,
        }
        put_bytes(self.fs, join(self.root, _RECORD), json.dumps(record, indent=1).encode())
        write_model(self.fs, self.root, model)

    def commit(self, parts: Sequence[PartInfo], *, alone: bool = True) -> bool:
        """Make an archive of `parts`: the index, then the manifest, then clear away what is no
        longer part of it.

        alone: whether no other job is at work on this destination; one that is keeps its files.
        False, and nothing is done, where another job has committed or removed parts meanwhile that
        don't go with these: open the destination anew then, and do what is left.
        """
        now = self._manifest_now()
        if now is not None and now != self.manifest:
            ours = {part.name for part in parts}
            same = now.settings == self.settings and now.model_id == self.model_id
            if not same or not ours.issuperset(part.name for part in now.parts):
                return False
        standing = self._as_they_stand(parts)
        if standing is None:
            return False
        parts = standing
        index_sha256 = build_index(self.fs, self.root, [part.name for part in parts])
        manifest = write_manifest(
            self.fs,
            self.root,
            settings=self.settings,
            model_id=self.model_id,
            parts=parts,
            index_sha256=index_sha256,
            alone=alone,
        )
        stays = {part.name for part in parts}
        old = self.manifest.parts if self.manifest else ()
        replaced = {part.name for part in old} | (set(self._names) if self.replace else set())
        if alone:
            replaced |= self._doubled(parts, replaced)
        for name in replaced:
            if _part_id(name) and name not in stays:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(join(self.root, name))
        if self.manifest and self.manifest.model_id not in (None, self.model_id):
            with suppress(FileNotFoundError):
                self.fs.rm_file(model_path(self.root, str(self.manifest.model_id)))
        self.manifest = manifest
        return True

    def clear(self) -> None:
        """Remove what only a running job needs; call it when none is."""
        # Workers have written there, which this process's cached listings don't show.
        self.fs.invalidate_cache()
        with suppress(OSError):
            self.fs.rm(join(self.root, JOB_FOLDER), recursive=True)

    def _manifest_now(self) -> Manifest | None:
        if MANIFEST in list_names(self.fs, self.root):
            with suppress(DamagedArchiveError):
                return read_manifest(self.fs, self.root)
        return None

    def _as_they_stand(self, parts: Sequence[PartInfo]) -> list[PartInfo] | None:
        """`parts`, those new to the archive as their footers describe them now: another job may
        have made the same ones, with other bytes. None where one is not there any more."""
        old = () if self.replace or self.manifest is None else self.manifest.parts
        kept = {part.name for part in old}
        found = self._committed(part.name for part in parts if part.name not in kept)
        standing = [part for part in parts if part.name in kept] + found
        return standing if len(standing) == len(parts) else None

    def _doubled(self, parts: Sequence[PartInfo], besides: set[str]) -> set[str]:
        """Names of parts that stand beside `parts`, and `besides`, with objects that `parts` hold:
        of a job that ran at the same time over another listing."""
        names = {part.name for part in parts} | besides
        strays = self._committed(
            name for name in list_names(self.fs, self.root) if name not in names
        )
        if not strays:
            return set()
        apart = {part.name for part in self._disjoint(strays, self._keys(parts))}
        return {part.name for part in strays} - apart

    def _keys(self, parts: Sequence[PartInfo]) -> set[str]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return {key for versions in pool.map(self._versions, parts) for key in versions}

    def _disjoint(self, parts: Sequence[PartInfo], held: set[str]) -> list[PartInfo]:
        """Those of `parts` that share no key with `held` or with one before."""
        apart: list[PartInfo] = []
        for part in sorted(parts, key=lambda part: part.name):
            keys = set(self._versions(part))
            if held.isdisjoint(keys):
                apart.append(part)
                held |= keys
        return apart

    def _stands(self, shard: Shard, parts: dict[str, PartInfo]) -> bool:
        part = parts.get(shard.part_id)
        return part is not None and part.name in self._names

    def _committed(self, names: Iterable[str]) -> list[PartInfo]:
        """Parts among these files; one with a damaged footer does not count and is made again."""

        ids = [part_id for name in names if (part_id := _part_id(name))]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda part_id: committed_part(self.fs, self.root, part_id), ids)
            return [part for part in found if part is not None]

    def _without(
        self, objects: Iterable[SourceObject], parts: Sequence[PartInfo]
    ) -> list[SourceObject]:
        """The objects that are not in `parts`."""
        held: dict[str, Version] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for versions in pool.map(self._versions, parts):
                held.update(versions)
        rest: list[SourceObject] = []
        changed: list[SourceObject] = []
        for item in objects:
            if item.key not in held:
                rest.append(item)
            elif not item.version.matches(held[item.key]):
                changed.append(item)
        if changed:
            raise SourceError(
                f"{len(changed)} objects are in the archive {self.root} already, but with another "
                f"size, time or ETag, the first of them {changed[0].url} (as "
                f"{changed[0].key!r}): an archive keeps what it has; choose another destination, "
                "leave them out with exclude, or overwrite the archive"
            )
        return rest

    def _versions(self, part: PartInfo) -> dict[str, Version]:
        columns = ["key", "source_size", "source_mtime", "source_etag"]
        path = join(self.root, part.name)
        try:
            parquet = pq.ParquetFile(RangeFile(self.fs, path, part.size), pre_buffer=False)
            table = parquet.read(columns, use_threads=False)
        except (OSError, ValueError) as error:
            raise DamagedArchiveError(
                f"{path}: cannot be read ({error}): verify tells more; remove the file and run "
                "again to make it anew"
            ) from error
        values = zip(*(table[name].to_pylist() for name in columns), strict=True)
        return {key: Version(size, mtime, etag) for key, size, mtime, etag in values}


def _read_record(fs: AbstractFileSystem, root: str) -> dict[str, Any] | None:
    try:
        record = json.loads(read_bytes(fs, join(root, _RECORD)))
        return {name: record[name] for name in ("settings", "model_id", "replace")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"{join(root, _RECORD)}: is damaged; remove it to go on") from error


def _part_id(name: str) -> str | None:
    return name[5:-8] if name.startswith("part-") and name.endswith(".parquet") else None


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    if found["model_id"] != wanted["model_id"]:
        return (
            f"the archive there was made with model {str(found['model_id'])[:12]}, this is "
            f"{wanted['model_id'][:12]}; choose another destination, or overwrite"
        )
    have, want = found["settings"], wanted["settings"]
    names = [name for name in sorted({*have, *want}) if have.get(name) != want.get(name)]
    told = ", ".join(f"{name} {have.get(name)} (now {want.get(name)})" for name in names)
    return (
        f"the archive there was made with other settings: {told}; choose the same, another "
        "destination, or overwrite"
    )
