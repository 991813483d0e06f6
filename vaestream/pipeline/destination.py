"""The destination of a job: what stands there already, and the last step that makes it an archive.

A running job keeps `.vaestream-job/` there: with which settings it runs, so that it can only be
continued with the same, the attempts at its shards, and which drivers are at work (`lease`).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from fsspec import AbstractFileSystem

from vaestream.archive.index import INDEX, build_index, load_index
from vaestream.archive.manifest import (
    MANIFEST,
    REPORT,
    Manifest,
    PartInfo,
    read_manifest,
    write_manifest,
)
from vaestream.archive.models import model_path, write_model
from vaestream.archive.storage import (
    exists,
    join,
    list_names,
    put_bytes,
    read_bytes,
    remove,
    remove_folder,
    shown,
)
from vaestream.archive.writer import committed_part, part_id_of
from vaestream.errors import ArchiveError, DamagedArchiveError, SettingsMismatchError
from vaestream.pipeline.attempts import JOB_FOLDER
from vaestream.pipeline.held import HeldRows
from vaestream.pipeline.plan import Cutter, SourceObject
from vaestream.pipeline.work import Growth, Replacement, Work

_RECORD = f"{JOB_FOLDER}/job.json"
_THREADS = 16


@dataclass(slots=True)
class Destination:
    """A folder in a store, opened for a job with these settings and this model (`open`).

    manifest: of the archive that stands there, if one does. replace: whether the new archive takes
    the place of that one; otherwise it grows. names: of the files that stand there.
    """

    fs: AbstractFileSystem
    root: str
    settings: dict[str, Any]
    model_id: str
    manifest: Manifest | None = None
    replace: bool = False
    names: list[str] = field(default_factory=list)
    _left: set[str] = field(default_factory=set)
    """Parts of an archive that has been replaced, where that job did not get to remove them."""

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
        left: set[str] = set()
        if running is not None and running.replace:
            if manifest is not None and running.over != manifest.index_sha256:
                # That job's archive stands there; only what it replaced may still lie about.
                left = {name for name in names if part_id_of(name)}
                left -= {part.name for part in manifest.parts}
                running = None
            elif not overwrite:
                # Parts of what it replaces lie beside its own.
                raise SettingsMismatchError(
                    f"{shown(fs, root)}: a job that replaces what is there has not ended: "
                    "overwrite, to go on with it"
                )
        found: dict[str, Any] | None = None
        if (standing := running or manifest) is not None:
            found = {"settings": standing.settings, "model_id": standing.model_id}
        has_parts = any(part_id_of(name) for name in names)
        if not overwrite:
            if found is not None and found != wanted:
                raise SettingsMismatchError(f"{shown(fs, root)}: {_differences(found, wanted)}")
            if found is None and has_parts:
                raise SettingsMismatchError(
                    f"{shown(fs, root)}: holds parts of an archive, but neither {MANIFEST} "
                    "nor the record of a job; choose another destination, or overwrite"
                )
        names = [name for name in names if name not in left]
        # Where nothing stands yet there is nothing to replace, and any later run may go on.
        replace = overwrite and (found is not None or has_parts)
        return cls(fs, root, settings, model_id, manifest, replace, names, left)

    def work(
        self,
        objects: Iterable[SourceObject],
        cutter: Cutter,
        *,
        max_object_bytes: int = 1 << 30,
        moved: bool = False,
    ) -> Work:
        """Divide `objects` into what the archive holds already and shards of what is to be done.

        max_object_bytes, moved: as `Growth` takes them.
        """
        listed = {part.name: part for part in self.manifest.parts} if self.manifest else {}
        loose = self._committed(name for name in self.names if name not in listed)
        if self.replace:
            return Replacement(objects, cutter, [*self._present(listed), *loose])
        present = self._present(listed)
        gone = sorted(set(listed) - {part.name for part in present})
        lost = self._keys_of(gone) if gone else set()
        return Growth(
            self.fs,
            self.root,
            objects,
            cutter,
            present,
            loose,
            gone=gone,
            lost=lost,
            max_object_bytes=max_object_bytes,
            moved=moved,
        )

    def is_finished(self, work: Work) -> bool:
        """Whether the archive stands there, whole, with just the parts of `work`, which has nothing
        to be done."""
        return (
            self.manifest is not None
            and not work.dropped
            and INDEX in self.names
            and exists(self.fs, model_path(self.root, self.model_id))
            and {part.name for part in work.parts} == {part.name for part in self.manifest.parts}
            and self.manifest.settings == self.settings
            and self.manifest.model_id == self.model_id
        )

    def begin(self, model: bytes) -> None:
        """Record the job and lay down the model, which workers load from here."""
        over = self.manifest.index_sha256 if self.replace and self.manifest else None
        record = _Record(self.settings, self.model_id, self.replace, over)
        text = json.dumps(asdict(record), indent=1)
        put_bytes(self.fs, join(self.root, _RECORD), text.encode())
        write_model(self.fs, self.root, model)

    def commit(
        self,
        parts: Sequence[PartInfo],
        *,
        dropped: Iterable[str] = (),
        alone: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Make an archive of `parts`: the index, then the manifest, then clear away what is no
        longer part of it, `dropped` too. A report of what stood here goes first.

        alone: whether no other job is at work on this destination now; one that is keeps its files.
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
        # It tells of the archive that stood here, and a kill may come before the next one.
        remove(self.fs, join(self.root, REPORT))
        index_sha256 = build_index(self.fs, self.root, [part.name for part in parts])
        manifest = write_manifest(
            self.fs,
            self.root,
            settings=self.settings,
            model_id=self.model_id,
            parts=parts,
            index_sha256=index_sha256,
            alone=alone(),
        )
        stays = {part.name for part in parts}
        old = self.manifest.parts if self.manifest else ()
        replaced = {*dropped, *(part.name for part in old), *self._left}
        if self.replace:
            replaced |= set(self.names)
        if alone():
            replaced |= self._doubled(parts, replaced)
        self._remove(name for name in replaced if part_id_of(name) and name not in stays)
        if self.manifest and self.manifest.model_id not in (None, self.model_id):
            remove(self.fs, model_path(self.root, str(self.manifest.model_id)))
        self.manifest = manifest
        return True

    def discard(self, parts: Iterable[PartInfo]) -> None:
        """Remove parts that have been made and not committed."""
        self._remove(part.name for part in parts)

    def clear(self) -> None:
        """Remove what only a running job needs, and has left; call it when none is."""
        stays = {part.name for part in self.manifest.parts} if self.manifest else set()
        self._remove(self._left - stays)
        remove_folder(self.fs, join(self.root, JOB_FOLDER))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            remove(self.fs, join(self.root, name))

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
        held = HeldRows(self.fs, self.root, parts)
        return {part.name for part in HeldRows(self.fs, self.root, strays).sharing(held)}

    def _present(self, listed: Mapping[str, PartInfo]) -> list[PartInfo]:
        present = set(self.names)
        return [part for part in listed.values() if part.name in present]

    def _keys_of(self, names: Sequence[str]) -> set[str]:
        """What the index says that parts held which are there no longer."""
        assert self.manifest is not None
        try:
            index = load_index(self.fs, self.root, self.manifest.index_sha256)
        except DamagedArchiveError as error:
            raise DamagedArchiveError(
                f"{join(self.root, names[0])}: the part is missing, and so is the index that tells "
                f"what it held ({error}): put it back, or overwrite"
            ) from error
        held = pc.is_in(index["part"].cast(pa.string()), pa.array(names))
        return set(index["key"].filter(held).to_pylist())

    def _committed(self, names: Iterable[str]) -> list[PartInfo]:
        """Parts among these files; one with a damaged footer does not count and is made again."""

        ids = [part_id for name in names if (part_id := part_id_of(name))]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda part_id: committed_part(self.fs, self.root, part_id), ids)
            return [part for part in found if part is not None]


def model_at(fs: AbstractFileSystem, root: str) -> str | None:
    """Id of the model of what stands in a folder: of a job that has not ended, else of an archive.

    Raises ArchiveError where its record or manifest cannot be read.
    """
    record = _read_record(fs, root)
    if record is not None:
        return record.model_id
    return read_manifest(fs, root).model_id if exists(fs, join(root, MANIFEST)) else None


@dataclass(frozen=True, slots=True)
class _Record:
    """What a running job does. over: index_sha256 of the archive that it replaces, if it does."""

    settings: dict[str, Any]
    model_id: str
    replace: bool
    over: str | None = None


def _read_record(fs: AbstractFileSystem, root: str) -> _Record | None:
    try:
        return _Record(**json.loads(read_bytes(fs, join(root, _RECORD))))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"{join(root, _RECORD)}: is damaged; remove it to go on") from error


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
