"""Rate and distortion of a model on a folder of photos: real bytes, real decoded pixels."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vaestream.codec import Codec
from vaestream.errors import SourceError
from vaestream.images import Photo, load

from .data import list_photos

DEFAULT_QUALITIES = (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 95.0)


@dataclass(frozen=True)
class Measurement:
    """One photo at one quality. bpp: bits of the bitstream per pixel; psnr: dB on uint8."""

    photo: str
    quality: float
    bpp: float
    psnr: float


@dataclass(frozen=True)
class Point:
    """Means over the photos at one quality."""

    quality: float
    bpp: float
    psnr: float


@dataclass(frozen=True)
class Evaluation:
    """All measurements, and the model they were made with (SHA-256 of its weights)."""

    model_id: str
    device: str
    measurements: list[Measurement]

    def curve(self) -> list[Point]:
        """Mean bpp and mean PSNR over the photos, a point a quality."""
        points = []
        for quality in sorted({m.quality for m in self.measurements}):
            of = [m for m in self.measurements if m.quality == quality]
            points.append(
                Point(
                    quality,
                    math.fsum(m.bpp for m in of) / len(of),
                    math.fsum(m.psnr for m in of) / len(of),
                )
            )
        return points

    def to_json(self) -> str:
        """Everything, with the curve, as a JSON object."""
        return json.dumps({**asdict(self), "curve": [asdict(p) for p in self.curve()]}, indent=1)

    def table(self) -> str:
        """The curve as text."""
        lines = ["quality     bpp   PSNR dB"]
        lines += [f"{p.quality:7.2f} {p.bpp:7.4f} {p.psnr:9.3f}" for p in self.curve()]
        return "\n".join(lines)


def evaluate(
    photos: Iterable[str | os.PathLike[str]],
    *,
    weights: str | os.PathLike[str] | None = None,
    qualities: Sequence[float] = DEFAULT_QUALITIES,
    device: str = "auto",
    precision: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Encode and decode every photo at every quality.

    The PSNR is that of the decoded bitstream, not the encoder's word. Files that are no photo the
    codec takes are passed over. Raises SourceError if none is left.
    """
    codec = Codec.load(weights, device=device, precision=precision)
    measurements = []
    for file in list_photos(photos):
        photo = load(file.read_bytes(), name=str(file))
        if not isinstance(photo, Photo):
            continue
        for quality in qualities:
            (blob,) = codec.encode([photo.pixels], quality)
            (decoded,) = codec.decode([blob])
            error = float(np.mean((decoded.astype(np.float32) - photo.pixels) ** 2, dtype=float))
            measurements.append(
                Measurement(
                    file.name,
                    quality,
                    len(blob) * 8 / (photo.pixels.shape[0] * photo.pixels.shape[1]),
                    10 * math.log10(255**2 / error) if error else math.inf,
                )
            )
        if progress is not None:
            progress(file.name)
    if not measurements:
        raise SourceError("no photo to evaluate")
    return Evaluation(codec.model_id, str(codec.device), measurements)


def plot(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Write the rate-distortion curve as a PNG. Needs matplotlib (the extra `evaluate`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    points = evaluation.curve()
    axes.plot([p.bpp for p in points], [p.psnr for p in points], marker="o", label="vaestream")
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(path), dpi=120)
