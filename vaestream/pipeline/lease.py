"""Who is at work on a destination: a note there for each driver, to warn and to take turns."""

import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from fsspec import AbstractFileSystem

from vaestream.archive.storage import is_temporary, join, list_names, put_bytes, read_bytes
from vaestream.errors import ArchiveError
from vaestream.pipeline.attempts import JOB_FOLDER

FRESH_SECONDS = 90.0
"""Age up to which a note counts; clocks of drivers on several machines may differ by less."""

_BEAT_SECONDS = 20.0
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Driver:
    """Another driver with a fresh note. commits: whether it is at the commit."""

    host: str
    pid: int
    commits: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """This driver's note in the destination, kept fresh within the `with` block by a thread.

    Best effort: stores have no locks, and clocks may differ. Nothing that is made twice does harm;
    the note is there to tell of it, and so that two commits don't mix (`turn`). Errors:
    ArchiveError where the note cannot be written at first; later failures are passed over.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, run_id: str) -> None:
        self._fs, self._folder, self._name = fs, join(root, f"{JOB_FOLDER}/drivers"), run_id
        self._lock = threading.Lock()
        self._commits = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="vaestream-lease", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        with self._lock, suppress(Exception):  # whatever a store raises: the note gets old instead
            self._fs.rm_file(join(self._folder, self._name))

    def others(self) -> list[Driver]:
        """The other drivers at work there, as far as notes tell."""
        found: list[Driver] = []
        for name in list_names(self._fs, self._folder):
            if name == self._name or is_temporary(name):
                continue
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                note = json.loads(read_bytes(self._fs, join(self._folder, name)))
                if _lives(note):
                    found.append(Driver(str(note["host"]), int(note["pid"]), bool(note["commits"])))
        return found

    def alone(self) -> bool:
        """Whether there are none."""
        return not self.others()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block for one driver at a time; the others wait for it.

        Each tells first and looks then, so of two that come at once one at least sees the other,
        and both step back for a while.
        """
        while True:
            self._tell(commits=True)
            if not any(other.commits for other in self.others()):
                break
            self._tell(commits=False)
            time.sleep(random.uniform(0.2, 1.0) * _PAUSE_SECONDS)
        try:
            yield
        finally:
            with suppress(ArchiveError):
                self._tell(commits=False)

    def _tell(self, *, commits: bool) -> None:
        self._commits = commits
        self._write()

    def _write(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            note = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": time.time(),
                "commits": self._commits,
            }
            put_bytes(self._fs, join(self._folder, self._name), json.dumps(note).encode())

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with suppress(ArchiveError):
                self._write()


def _lives(note: dict[str, Any]) -> bool:
    if abs(time.time() - note["time"]) > FRESH_SECONDS:
        return False
    if note["host"] == socket.gethostname():
        # A driver that was killed a moment ago is no reason for a warning.
        try:
            os.kill(note["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
    return True
