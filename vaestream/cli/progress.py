"""What is told on stderr while a job runs."""

import logging
import math
import sys
import threading
import time

from vaestream.pipeline.job import Progress
from vaestream.text import duration, shown

_SECONDS_BETWEEN_LINES = 5.0


class ProgressLine:
    """One line that changes every second, on a terminal; in a log a line now and then."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._width = 0
        self._last = -math.inf
        self._begin = self._shown_at = time.monotonic()
        self._now: Progress | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        if self._live:
            # A shard may take minutes: the seconds show that the job is alive meanwhile.
            threading.Thread(target=self._tick, daemon=True).start()

    def show(self, now: Progress) -> None:
        """Tell where the job stands."""
        with self._lock:
            self._now, self._shown_at = now, time.monotonic()
            if self._live:
                self._draw()
            elif (
                time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES
                or now.done_shards == now.shards
            ):
                print(self._text(), file=sys.stderr, flush=True)
                self._last = time.monotonic()

    def end(self) -> None:
        """Leave the terminal's line for good."""
        self._ended.set()
        self.interrupt()

    def interrupt(self) -> None:
        """Leave what is shown and go on below it."""
        with self._lock:
            if self._width:
                print(file=sys.stderr)
                self._width = 0

    def _tick(self) -> None:
        while not self._ended.wait(1.0):
            with self._lock:
                if not self._ended.is_set():
                    self._draw()

    def _draw(self) -> None:
        text = self._text()
        print(f"\r{text:{self._width}s}", end="", file=sys.stderr, flush=True)
        self._width = len(text)

    def _text(self) -> str:
        now, passed = self._now, duration(time.monotonic() - self._begin)
        if now is None:
            return f"{passed}  listing the sources"
        more = "" if now.listed else "+"
        counted = f"{passed}  {now.done_objects}/{now.objects}{more} photos"
        if not now.done_shards:
            return f"{counted}  first of {now.shards}{more} parts under way"
        left = now.remaining_seconds
        if left is None:
            rest = "?"
        elif now.done_shards == now.shards:
            rest = "finishing"
        else:
            rest = f"{duration(max(0.0, left - (time.monotonic() - self._shown_at)))} left"
        stats = now.stats
        ratio = stats.source_bytes / stats.coded_bytes if stats.coded_bytes else 1.0
        return f"{counted}  {now.megapixels_per_second:.1f} MP/s  ratio {ratio:.1f}  {rest}"


class Warnings(logging.Handler):
    """A line on stderr for each warning."""

    def __init__(self, line: ProgressLine) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it, below the line of progress."""
        self._line.interrupt()
        print(f"vaestream: warning: {shown(record.getMessage())}", file=sys.stderr, flush=True)
