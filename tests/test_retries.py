"""Calls to a store: what is tried again, how often, and that nothing waits for ever."""

import errno
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from vaestream.archive import retries
from vaestream.archive.retries import may_pass, retrying, within
from vaestream.archive.storage import put_bytes, read_bytes, read_ranges, staged
from vaestream.errors import ArchiveError


class AnsweredError(Exception):
    """As clients of HTTP stores raise it."""

    def __init__(self, **told: Any) -> None:
        super().__init__("the server has refused")
        self.__dict__.update(told)


class NoCredentialsError(Exception):
    pass


def boto(code: str, status: int) -> Exception:
    """As s3fs raises it: an OSError that tells little, with botocore's behind it."""
    error = OSError(errno.EIO, "the server has refused")
    told = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = AnsweredError(response=told)
    return error


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError("unknown"),
        RuntimeError("a store's own"),
        AnsweredError(status=503),
        AnsweredError(status_code=429),
        AnsweredError(code="500"),
        boto("SlowDown", 503),
        boto("InternalError", 500),
        boto("RequestTimeout", 400),
        boto("IncompleteBody", 400),
        boto("429", 429),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception, pauses: list[float]) -> None:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise error
        return "done"

    assert retrying(LocalFileSystem(), call) == "done"
    assert (len(calls), len(pauses)) == (3, 2)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(),
        IsADirectoryError(),
        NotADirectoryError(),
        OSError(errno.ENOSPC, "no space left on device"),
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.EROFS, "read-only"),
        ValueError("no such bucket name"),
        NoCredentialsError(),
        ArchiveError("damaged"),
        AnsweredError(status=404),
        AnsweredError(status=507),
        boto("NoSuchBucket", 404),
        boto("InvalidAccessKeyId", 403),
        boto("EntityTooLarge", 413),
        boto("XMinioStorageFull", 507),
    ],
)
def test_what_lasts_is_told_at_once(error: Exception, pauses: list[float]) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)):
        retrying(LocalFileSystem(), call)
    assert not may_pass(error) and pauses == []


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, in no time."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def test_pauses_grow_at_random_up_to_a_bound_and_tries_end(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> None:
        raise ConnectionError("down")

    runs: list[list[float]] = []
    for _ in range(200):
        pauses.clear()
        with pytest.raises(ConnectionError):
            retrying(LocalFileSystem(), call)
        runs.append(list(pauses))
    bounds = [0.5, 1.0, 2.0, 4.0, 8.0]
    for made, bound in zip(zip(*runs, strict=True), bounds, strict=True):
        assert 0 <= min(made) < 0.2 * bound and 0.8 * bound < max(made) <= bound
    monkeypatch.setattr(retries, "_LONGEST_PAUSE", 1.5)
    with pytest.raises(ConnectionError):
        retrying(LocalFileSystem(), call)
    assert max(pauses[-5:]) <= 1.5
    # However many tries there are, time is bounded too.
    monkeypatch.setattr(retries, "_PATIENCE", 0.0)
    pauses.clear()
    with pytest.raises(ConnectionError):
        retrying(LocalFileSystem(), call)
    assert pauses == []


def test_a_call_within_its_time_gives_what_it_gives() -> None:
    def call() -> None:
        raise TimeoutError("its own")

    assert within(60, lambda: 7) == 7
    with pytest.raises(TimeoutError, match="its own"):
        within(60, call)


class Hanging(MemoryFileSystem):  # type: ignore[misc]
    """The first call of each kind in `kinds` gives no answer, however long one waits."""

    cachable = False

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.kinds, self.never = set(kinds), threading.Event()

    def hang(self, kind: str, call: Callable[[], Any]) -> Any:
        if kind in self.kinds:
            self.kinds.discard(kind)
            self.never.wait()
        return call()

    def info(self, path: str, **options: Any) -> Any:
        return self.hang("info", lambda: super(Hanging, self).info(path, **options))

    def cat_file(self, path: str, *args: Any, **options: Any) -> Any:
        return self.hang("get", lambda: super(Hanging, self).cat_file(path, *args, **options))

    def put_file(self, *args: Any, **options: Any) -> Any:
        return self.hang("put", lambda: super(Hanging, self).put_file(*args, **options))


@pytest.mark.usefixtures("pauses")
def test_a_store_that_gives_no_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_ANSWER_SECONDS", 0.5)
    fs = Hanging("info", "get", "put")
    put_bytes(fs, "/hanging/file", b"0123456789")
    assert fs.kinds == {"get"}
    assert read_bytes(fs, "/hanging/file", 2, 4) == b"23"
    assert not fs.kinds
    fs.never.set()
    fs.rm("/hanging", recursive=True)


@pytest.mark.usefixtures("pauses")
def test_of_several_ranges_those_that_failed_are_read_again() -> None:
    read: list[int] = []

    class Flaky(MemoryFileSystem):  # type: ignore[misc]
        cachable = False

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            read.append(start)
            if start == 5 and read.count(5) < 3:
                raise ConnectionResetError
            data: bytes = super().cat_file(path, start=start, end=end)
            return data

    fs = Flaky()
    fs.pipe_file("/flaky/file", b"0123456789")
    answers = read_ranges(fs, ["/flaky/file"] * 3, [0, 5, 3], [2, 9, 4])
    assert answers == [b"01", b"5678", b"3"]
    assert sorted(read) == [0, 3, 5, 5, 5]
    fs.rm("/flaky", recursive=True)


@pytest.mark.parametrize("told", [True, False])
def test_a_file_takes_the_place_of_another_in_stores_that_move_onto_none(told: bool) -> None:
    class Stubborn(MemoryFileSystem):  # type: ignore[misc]
        protocol = "stubborn"
        cachable = False

        def mv(self, source: str, target: str, **options: Any) -> None:
            if not self.exists(target):
                super().mv(source, target, **options)
            elif told:
                raise FileExistsError(target)

    fs = Stubborn()
    for data in (b"first", b"the second"):
        put_bytes(fs, "/stubborn/file", data)
        assert fs.cat_file("/stubborn/file") == data
        assert [info["name"] for info in fs.ls("/stubborn")] == ["/stubborn/file"]
    fs.rm("/stubborn", recursive=True)


def test_a_folder_that_cannot_be_flushed_takes_files_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def of_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files)
    put_bytes(LocalFileSystem(), str(tmp_path / "file"), b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_an_error_names_path_and_reason(pauses: list[float]) -> None:
    class Full(MemoryFileSystem):  # type: ignore[misc]
        cachable = False

        def put_file(self, *args: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArchiveError, match=r"memory:///?full/file: cannot be written: .*No space"):
        put_bytes(Full(), "/full/file", b"0123456789")
    assert pauses == []


def test_no_room_for_temporary_files_is_no_fault_of_the_store() -> None:
    with (
        pytest.raises(ArchiveError, match=f"cannot be written in {tempfile.gettempdir()} first: "),
        staged(MemoryFileSystem(), "/store/file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
