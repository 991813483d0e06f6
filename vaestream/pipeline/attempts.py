"""How often a shard has been begun: a note in the destination that outlives a killed worker."""

import json
from contextlib import suppress
from typing import Any

from fsspec import AbstractFileSystem

from vaestream.archive.storage import join, put_bytes, read_bytes, remove
from vaestream.errors import VaestreamError

ISOLATE_AFTER = 2
"""Failed attempts after which a shard's photos are compressed in a process of their own."""

GIVE_UP_AFTER = 5
"""Failed attempts in one run of a job after which the job ends with an error."""

JOB_FOLDER = ".vaestream-job"
"""Folder in the destination for what only a running job needs; gone when it has ended."""


def begin_attempt(fs: AbstractFileSystem, root: str, part_id: str, run_id: str) -> int:
    """Note that a shard is begun and return how many attempts at it have failed before.

    Attempts count over runs, so that a photo that kills the whole job is found too. Errors:
    VaestreamError after `GIVE_UP_AFTER` failures in the run `run_id`: then it is no single photo.
    """
    path = _path(root, part_id)
    before: dict[str, Any] = {"attempts": 0, "run": run_id, "in_run": 0}
    with suppress(FileNotFoundError, ValueError):
        before = json.loads(read_bytes(fs, path))
    in_run = before["in_run"] if before["run"] == run_id else 0
    if in_run >= GIVE_UP_AFTER:
        raise VaestreamError(
            f"shard {part_id} has killed its worker {in_run} times, also with its photos in a "
            "process of their own; the workers' logs, or the machine's for lack of memory, may "
            "say why"
        )
    attempts: int = before["attempts"]
    now = {"attempts": attempts + 1, "run": run_id, "in_run": in_run + 1}
    put_bytes(fs, path, json.dumps(now).encode())
    return attempts


def end_attempts(fs: AbstractFileSystem, root: str, part_id: str) -> None:
    """Forget the attempts at a shard: its part is in place, or it has ended in peace."""
    remove(fs, _path(root, part_id))


def _path(root: str, part_id: str) -> str:
    return join(root, f"{JOB_FOLDER}/attempts/{part_id}")
