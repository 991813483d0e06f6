"""Results as text for people, and as what JSON has words for."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from vaestream.text import duration, shown, size
from vaestream.urls import public_url

if TYPE_CHECKING:
    from vaestream.archive.schema import RowInfo
    from vaestream.pipeline.estimate import Estimate
    from vaestream.pipeline.job import Summary


def summary_text(summary: "Summary", destination: str) -> str:
    """What a job came to."""
    lines = []
    if summary.up_to_date:
        lines.append(
            f"{public_url(destination)}: nothing to do, all {summary.objects} objects are there"
        )
    lines.append(
        f"{summary.objects} objects: {summary.photos} photos compressed, "
        f"{sum(summary.kept.values())} kept as their source, "
        f"{sum(summary.errors.values())} with errors"
        + (f"; {summary.left_out} left out" if summary.left_out else "")
    )
    if summary.changed:
        lines.append(f"  {summary.changed} had changed since: new rows take the place of theirs")
    if summary.unlisted:
        lines.append(f"  {summary.unlisted} are not in the sources (any more), and stay")
    lines += _kept_lines(summary.kept)
    lines += [f"  error: {reason}: {count}" for reason, count in summary.errors.items()]
    ratio = f", {summary.ratio:.2f} times smaller" if summary.ratio else ""
    lines.append(
        f"{size(summary.source_bytes)} -> {size(summary.archive_bytes)}{ratio} "
        f"(and the model: {size(summary.model_bytes)})"
    )
    lines += _rate_lines(summary.bpp, summary.psnr)
    if summary.megapixels_per_second is not None:
        lines.append(
            f"{summary.megapixels:.1f} MP in {duration(summary.seconds)} "
            f"({summary.megapixels_per_second:.2f} MP/s)"
        )
    return "\n".join(lines)


def estimate_text(told: "Estimate") -> str:
    """What a job would come to."""
    lines = [
        f"nothing written; {told.objects} objects to do, {size(told.source_bytes)}",
        f"{told.sampled} of them tried: {told.photos} photos compressed, "
        f"{sum(told.kept.values())} kept as their source, {told.errors} with errors",
        *_kept_lines(told.kept),
    ]
    if told.ratio is not None and told.archive_bytes is not None:
        lines.append(
            f"about {size(told.archive_bytes)} in the archive, {told.ratio:.2f} times smaller"
        )
    lines += _rate_lines(told.bpp, told.psnr)
    lines.append(f"about {told.worker_hours:.1f} hours of one worker here: divide by your workers")
    return "\n".join(lines)


def _kept_lines(kept: Mapping[str, int]) -> list[str]:
    return [f"  kept: {reason}: {count}" for reason, count in kept.items()]


def _rate_lines(bpp: float | None, psnr: float | None) -> list[str]:
    if bpp is None:
        return []
    decibels = "" if psnr is None else f", {psnr:.2f} dB PSNR"
    return [f"compressed photos: {bpp:.3f} bits per pixel{decibels}"]


def row_text(row: "RowInfo") -> str:
    """A row of an archive, in one line."""
    pixels = f"{row.width}x{row.height}" if row.width else "-"
    told = row.reason or ""
    if row.error is not None:
        told = f"error: {row.error}"
    elif row.codec == "vae":
        psnr = "" if row.psnr is None else f"{row.psnr:.2f} dB, "
        told = f"{psnr}quality {row.quality:.0f}"
    return (
        f"{row.codec:6s} {pixels:>11s} {row.num_bytes:>11d} {row.source_size:>11d}  "
        f"{shown(row.key)}  {shown(told)}"
    )


def json_values(values: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON has no word for: times as ISO 8601, an infinite PSNR as the text "inf"."""

    def word(value: Any) -> Any:
        if isinstance(value, datetime):
            return value.isoformat()
        return "inf" if isinstance(value, float) and math.isinf(value) else value

    return {name: word(value) for name, value in values.items()}


def window_text(window: tuple[float, float]) -> str:
    """Title of a column of `percent_text`."""
    return f"{window[0]:g}-{window[1]:g} dB".rjust(14)


def percent_text(value: float | None) -> str:
    """A BD-rate, in a column."""
    return ("-" if value is None else f"{value:+.1f} %").rjust(14)
