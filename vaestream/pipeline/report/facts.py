"""What a report is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from vaestream.archive.manifest import PartStats
from vaestream.pipeline.report.photos import WorstPhoto


@dataclass(slots=True)
class Histogram:
    """Counts of values in bins of width `step` from 0 on; the last bin takes all above it.

    low, high: least and largest of the values themselves, None where there are none.
    """

    step: float
    counts: npt.NDArray[np.int64]
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, step: float, bins: int) -> "Histogram":
        """One without values."""
        return cls(step, np.zeros(bins, np.int64))

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Count finite values, none of them negative."""
        if not len(values):
            return
        bins = np.minimum(values / self.step, len(self.counts) - 1).astype(np.int64)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        low, high = float(values.min()), float(values.max())
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of all lie, to within a step; None without values."""
        if self.low is None or self.high is None:
            return None
        if share >= 1:
            return self.high
        at = int(np.searchsorted(np.cumsum(self.counts), share * self.total))
        return min(max((at + 0.5) * self.step, self.low), self.high)


@dataclass(slots=True)
class ErrorKind:
    """Errors that differ in names and numbers alone. keys: the first that have it."""

    text: str
    count: int = 0
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a run stood after `seconds`: parts and objects done, megapixels compressed so far."""

    seconds: float
    parts: int
    objects: int
    megapixels: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the job: a moment for each part that it made, seconds in all."""

    seconds: float
    moments: Sequence[Moment]


@dataclass(frozen=True, slots=True)
class Report:
    """The numbers of the page.

    name: the archive's folder. totals: as the manifest has them. archive_bytes: of all parts.
    model_bytes: None where there is no model. bpp, psnr: of each compressed photo. equal: photos
    that decode to their source's very pixels (infinite PSNR, in no histogram). errors: most
    frequent first; other_errors: rows with an error of a kind that is not among them. run: None
    where the report was made from the archive alone.
    """

    name: str
    made: datetime
    version: str
    format_version: int
    model_id: str | None
    settings: Mapping[str, Any]
    totals: PartStats
    parts: int
    archive_bytes: int
    model_bytes: int | None
    bpp: Histogram
    psnr: Histogram
    equal: int
    worst: Sequence[WorstPhoto]
    errors: Sequence[ErrorKind]
    other_errors: int
    run: Run | None = None
