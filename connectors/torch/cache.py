"""Blobs of archives kept on a local disk, within a limit."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK, _TEMPORARY = ".lock", ".writing"
_LEAVE = 0.9


class BlobCache:
    """Blobs by their SHA-256, in a folder that any number of processes and archives may share.

    What was used least recently leaves first. A blob is checked when it is read, so a damaged file
    is one that is not there, and another archive's blob cannot stand for it. (fsspec's own caches
    keep whole files, or blocks of them, without a limit on their size.)

    folder: made if it is not there; of this cache alone. max_bytes: of all blobs in it, never
    exceeded. Raises OSError where the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._total_locked():
            pass

    def __contains__(self, sha256: bytes) -> bool:
        return self._path(sha256).exists()

    def get(self, sha256: bytes) -> bytes | None:
        """The blob with this digest, or None where it is not at hand."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
            # File systems mostly do not note every read.
            os.utime(path)
        except OSError:
            return None
        return data if hashlib.sha256(data).digest() == sha256 else None

    def put(self, sha256: bytes, data: bytes) -> None:
        """Keep a blob, and let older ones go for it. A disk that takes no more is no error."""
        if len(data) > self.max_bytes:
            return
        path = self._path(sha256)
        # Under the lock: no two processes then count at once, and only one file is ever unfinished.
        with suppress(OSError), self._total_locked() as total:
            if path.exists():
                # Not the whole blob, or else nobody would want it kept: see `get`.
                total[0] -= path.stat().st_size
                path.unlink()
            if total[0] + len(data) > self.max_bytes:
                total[0] = self._shrink(
                    min(int(_LEAVE * self.max_bytes), self.max_bytes - len(data))
                )
            temporary = self.folder / _TEMPORARY
            try:
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(path)
            except OSError:
                # What is counted stays so: a full disk had better not be counted time and again.
                temporary.unlink(missing_ok=True)
            else:
                total[0] += len(data)

    @contextmanager
    def filling(self, sha256: bytes) -> Iterator[None]:
        """Held by one process at a time for the same digest, so that one alone fetches a blob."""
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        # One file for many digests, so that there are never more than these.
        with (locks / sha256[:1].hex()).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, sha256: bytes) -> Path:
        name = sha256.hex()
        return self.folder / "blobs" / name[:2] / name[2:]

    @contextmanager
    def _total_locked(self) -> Iterator[list[int]]:
        """The bytes kept, as a list of one number to change, while no other process counts."""
        with (self.folder / _LOCK).open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (self.folder / "blobs").mkdir(exist_ok=True)
            file.seek(0)
            text = file.read()
            total = [int(text) if text.isdecimal() else sum(size for _, size, _ in self._files())]
            # Counted anew if this process ends before it has written what it knows.
            file.truncate(0)
            yield total
            file.write(str(total[0]))

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use, size, path) of every blob."""
        found = []
        for path in (self.folder / "blobs").glob("*/*"):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
        return found

    def _shrink(self, limit: int) -> int:
        """Let the oldest go until no more than `limit` bytes are kept; returns how many are."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= limit:
                break
            path.unlink()
            total -= size
        return total
