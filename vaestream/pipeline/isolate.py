"""Compress in a child process, so that a photo that kills its process costs one row."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Protocol, Self

from vaestream.archive.schema import Row
from vaestream.errors import VaestreamError
from vaestream.pipeline.compressor import failed, unread
from vaestream.pipeline.fetch import Fetched
from vaestream.pipeline.plan import SourceObject

_TRIES = 2
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)


class MakesRow(Protocol):
    """What a compressor is to a process of its own."""

    def row(self, item: SourceObject, data: bytes) -> Row: ...


class MakesRows(MakesRow, Protocol):
    """What a compressor is to a worker."""

    def rows(self, fetched: Iterable[Fetched]) -> Iterator[Row]: ...


class Make(Protocol):
    """Makes a compressor in the process that calls it; must be picklable."""

    def __call__(self) -> MakesRow: ...


class IsolatedCompressor:
    """A compressor in a process of its own, which is started again when a photo has killed it.

    A photo in whose hands the process dies twice gets an error row. Errors: VaestreamError when the
    process dies before it has seen any photo. Use it as a context manager: the process ends with
    the block, and also when this process dies.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._child: tuple[SpawnProcess, Connection[object, object]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._child is not None:
            self._stop()

    def rows(self, fetched: Iterable[Fetched]) -> Iterator[Row]:
        """The rows of objects, in their order; the process has one of them at a time."""
        for got in fetched:
            if got.data is None:
                yield unread(got)
            else:
                yield self.row(got.item, got.data)

    def row(self, item: SourceObject, data: bytes) -> Row:
        """The row of an object whose bytes are `data`."""
        how = ""
        for _ in range(_TRIES):
            if self._child is None:
                self._child = self._start()
            pipe = self._child[1]
            try:
                pipe.send((item, data))
                row = pipe.recv()
            except _GONE:
                how = self._stop()
                continue
            assert isinstance(row, Row)
            return row
        return failed(item, data, f"kills the process that compresses it: {how}")

    def _start(self) -> "tuple[SpawnProcess, Connection[object, object]]":
        # Spawned: a fork of a process with torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        process.start()
        theirs.close()
        try:
            ours.recv()
        except _GONE:
            process.join()
            raise VaestreamError(
                f"the process that compresses ended before the first photo: {_how(process)}"
            ) from None
        return process, ours

    def _stop(self) -> str:
        assert self._child is not None
        process, pipe = self._child
        self._child = None
        pipe.close()
        process.join()
        return _how(process)


def _serve(pipe: "Connection[object, object]", make: Make) -> None:
    compressor = make()
    pipe.send(None)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        assert isinstance(message, tuple)
        pipe.send(compressor.row(*message))


def _how(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
