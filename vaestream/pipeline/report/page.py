"""A `Report` as a page that stands alone: styles, drawings and pictures are in it, scripts none."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from vaestream.pipeline.report.facts import Histogram, Moment, Report
from vaestream.pipeline.report.photos import Picture
from vaestream.text import duration, shown, size

_TEMPLATE = "report.html.jinja"
_WIDTH, _HEIGHT = 400, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 10, 10, 26
_BARS, _FEWEST_BARS = 40, 12
_POINTS = 300
_MANY = 500
_REASONS = 30


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram, in the drawing's units, and what it says."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: where, in the drawing's units, and its text."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of bars, or of a line (`path` of an SVG, `area` the same closed below)."""

    summary: str
    across: Sequence[Tick]
    up: Sequence[Tick]
    bars: Sequence[Bar] = ()
    path: str = ""
    area: str = ""
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    bottom: int = _HEIGHT - _BOTTOM


def render(report: Report) -> str:
    """The page, HTML. Whatever is text in the report is text there, escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "shown": _short,
        "size": size,
        "duration": duration,
        "data_url": _data_url,
        "count": lambda value: f"{value:,}",
    }
    text = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    totals, archive_bytes = report.totals, report.archive_bytes
    run = report.run
    return environment.from_string(text).render(
        report=report,
        totals=totals,
        ratio=totals.source_bytes / archive_bytes if archive_bytes else None,
        bpp=totals.bpp,
        psnr=totals.psnr,
        reasons=_reasons(totals.reasons),
        shares=_shares(totals.photos_vae, totals.kept, totals.errors),
        archive_share=100 * min(1.0, archive_bytes / totals.source_bytes)
        if totals.source_bytes
        else None,
        bpp_chart=_histogram(report.bpp, "bits per pixel", 3),
        psnr_chart=_histogram(report.psnr, "dB", 2),
        run_chart=_line(run.moments, run.seconds) if run is not None and run.moments else None,
        settings=_settings(report.settings),
    )


def _short(text: object, most: int = 160) -> str:
    """In one line without control characters, the middle left out where it is long."""
    line = shown(str(text))
    return line if len(line) <= most else f"{line[: most // 2]}…{line[-most // 2 :]}"


def _data_url(picture: Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture.data).decode()


def _reasons(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    """Most frequent first; the rarest as one where there are very many."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[_REASONS:])
    return ordered[:_REASONS] + ([("other reasons", rest)] if rest else [])


def _shares(photos: int, kept: int, errors: int) -> list[tuple[str, str, float]]:
    """Class, name and percentage of each kind of rows that there is."""
    total = photos + kept + errors
    kinds = [("photos", "compressed", photos), ("kept", "kept", kept), ("bad", "errors", errors)]
    return [(style, name, 100 * count / total) for style, name, count in kinds if count]


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"min_psnr": "PSNR floor, dB", "target_psnr": "target PSNR, dB"}
    names |= {"target_bpp": "target bits per pixel"}

    def told(value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return f"{value:g}" if isinstance(value, float) else str(value)

    return [
        (names.get(name, name.replace("_", " ")), "–" if value is None else told(value))
        for name, value in sorted(settings.items())
    ][:100]


def _histogram(counts: Histogram, unit: str, digits: int) -> Chart | None:
    """Bars of round widths over the values that there are."""
    if counts.low is None or counts.high is None:
        return None
    top = counts.step * len(counts.counts)
    low, high = min(counts.low, top), min(counts.high, top)
    if counts.total > _MANY:
        # A few of a million may lie far out: the last bar takes them.
        high = min(high, counts.quantile(0.998) or high)
    width = max(counts.step, _round_up((high - low) / (_BARS - 1)))
    per_bar = max(1, round(width / counts.step))
    first, last = int(low / width + 1e-9), int(high / width + 1e-9)
    while last - first + 1 < _FEWEST_BARS:
        first, last = max(0, first - 1), last + 1
    numbers = [
        int(counts.counts[i * per_bar : (i + 1) * per_bar].sum()) for i in range(first, last + 1)
    ]
    above = int(counts.counts[(last + 1) * per_bar :].sum())
    numbers[-1] += above
    most = max(numbers)
    across = (_WIDTH - _LEFT - _RIGHT) / len(numbers)
    bars = []
    for i, number in enumerate(numbers):
        if number:
            begin, height = (first + i) * width, max(1.0, number / most * _plot_height())
            bars.append(
                Bar(
                    round(_LEFT + i * across + 0.5, 2),
                    round(_TOP + _plot_height() - height, 2),
                    round(across - 1, 2),
                    round(height, 2),
                    f"{begin:.{digits}f} to {begin + width:.{digits}f} {unit}"
                    f"{' and more' if above and i == len(numbers) - 1 else ''}: {number:,}",
                )
            )
    lowest, span = first * width, len(numbers) * width
    least, few, half, many, greatest = (
        f"{counts.quantile(share):.{digits}f}" for share in (0, 0.05, 0.5, 0.95, 1)
    )
    told = f"{least} to {greatest} {unit}, median {half}; nine in ten between {few} and {many}"
    return Chart(told, _across(lowest, lowest + span), _up(most), bars=bars)


def _line(moments: Sequence[Moment], seconds: float) -> Chart:
    """Parts done against seconds, in steps; of very many moments some."""
    every = math.ceil(len(moments) / _POINTS)
    picked = [*moments[::every], moments[-1]]
    most, end = moments[-1].parts, max(seconds, moments[-1].seconds, 1e-3)

    def place(at: float, parts: int) -> tuple[str, str]:
        x = _LEFT + at / end * (_WIDTH - _LEFT - _RIGHT)
        return f"{x:.1f}", f"{_TOP + (1 - parts / most) * _plot_height():.1f}"

    path = "M{} {}".format(*place(0, 0))
    for moment in picked:
        x, y = place(moment.seconds, moment.parts)
        path += f"H{x}V{y}"
    path += f"H{place(end, most)[0]}"
    bottom = _HEIGHT - _BOTTOM
    objects, megapixels = moments[-1].objects, moments[-1].megapixels
    told = (
        f"{most:,} {'part' if most == 1 else 'parts'} with {objects:,} "
        f"{'object' if objects == 1 else 'objects'} in {duration(seconds)}: "
        f"{megapixels:,.1f} megapixels, {megapixels / end:.2f} a second"
    )
    return Chart(
        told, _across(0, end, clock=True), _up(most), path=path, area=f"{path}V{bottom}H{_LEFT}Z"
    )


def _plot_height() -> int:
    return _HEIGHT - _TOP - _BOTTOM


def _across(low: float, high: float, *, clock: bool = False) -> list[Tick]:
    """Some five round numbers between low and high."""
    step = _round_up((high - low) / 6)
    if clock and step > 20:
        step = next(
            (value for value in (30, 60, 120, 300, 600, 1800, 3600) if (high - low) / value <= 6),
            3600 * _round_up((high - low) / 3600 / 6),
        )
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = []
    for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        x = _LEFT + (i * step - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)
        label = duration(i * step) if clock and high >= 60 else f"{i * step:.{digits}f}"
        ticks.append(Tick(round(x, 1), label))
    return ticks


def _up(most: int) -> list[Tick]:
    """0, and some round counts up to `most`."""
    step = max(1, int(_round_up(most / 4)))
    return [
        Tick(round(_TOP + (1 - number / most) * _plot_height(), 1), _thousands(number))
        for number in range(0, most + 1, step)
    ]


def _thousands(number: int) -> str:
    for power, unit in ((1_000_000, "M"), (1000, "k")):
        if number >= power:
            return f"{number / power:g}{unit}"
    return str(number)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ...) that is not less."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value * (1 - 1e-9))
