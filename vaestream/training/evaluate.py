"""Rate and distortion on a folder of photos: real bytes, real decoded pixels."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vaestream.codec import Codec
from vaestream.codec.metrics import psnr
from vaestream.errors import SourceError

from .classical import ClassicalCodec
from .data import list_photos, read_photo

DEFAULT_QUALITIES = (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 95.0)
OURS = "vaestream"
_MOST_PSNR = 60.0  # what libvmaf counts 8-bit pictures that are equal as: means stay finite
_MS_SSIM_SIDE = 161  # its five scales, of a window of 11 each, need more than 160 pixels


@dataclass(frozen=True)
class Measurement:
    """One photo coded once.

    codec: `OURS` or the name of a classical one. photo: path of the file below the folder that all
    have in common. quality: as that codec counts it. bpp: bits of the file per pixel. psnr: dB on
    uint8, at most 60, which equal pictures have. ms_ssim: 0 to 1, None where it was not measured.
    """

    codec: str
    photo: str
    quality: float
    bpp: float
    psnr: float
    ms_ssim: float | None


@dataclass(frozen=True)
class Point:
    """Means over the photos at one quality; ms_ssim None unless every photo has it."""

    quality: float
    bpp: float
    psnr: float
    ms_ssim: float | None


@dataclass(frozen=True)
class Evaluation:
    """All measurements, and the model they were made with (SHA-256 of its weights)."""

    model_id: str
    device: str
    measurements: list[Measurement]

    def codecs(self) -> list[str]:
        """Names of the codecs measured, ours first."""
        return list(dict.fromkeys(m.codec for m in self.measurements))

    def curve(self, codec: str = OURS) -> list[Point]:
        """Mean bpp, PSNR and MS-SSIM over the photos, a point a quality."""
        rows = [m for m in self.measurements if m.codec == codec]
        points = []
        for quality in sorted({m.quality for m in rows}):
            of = [m for m in rows if m.quality == quality]
            similarity = [m.ms_ssim for m in of if m.ms_ssim is not None]
            points.append(
                Point(
                    quality,
                    math.fsum(m.bpp for m in of) / len(of),
                    math.fsum(m.psnr for m in of) / len(of),
                    math.fsum(similarity) / len(of) if len(similarity) == len(of) else None,
                )
            )
        return points

    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """Mean bpp and mean PSNR at each quality, by codec."""
        return {
            name: ([p.bpp for p in self.curve(name)], [p.psnr for p in self.curve(name)])
            for name in self.codecs()
        }

    def bd_rates(self, windows: Sequence[tuple[float, float]]) -> dict[str, list[float | None]]:
        """BD-rate of ours against every other codec measured, in percent, a number a window."""
        from .bd_rate import bd_rate

        curves = self.curves()
        ours = curves.pop(OURS)
        return {
            name: [bd_rate(*ours, *other, window) for window in windows]
            for name, other in curves.items()
        }

    def to_json(self) -> str:
        """Everything, with the curve of ours, as a JSON object."""
        return json.dumps({**asdict(self), "curve": [asdict(p) for p in self.curve()]}, indent=1)

    def table(self) -> str:
        """The curve of ours as text."""
        lines = ["quality     bpp   PSNR dB  MS-SSIM"]
        for p in self.curve():
            similarity = "-" if p.ms_ssim is None else f"{p.ms_ssim:.4f}"
            lines.append(f"{p.quality:7.2f} {p.bpp:7.4f} {p.psnr:9.3f} {similarity:>8}")
        return "\n".join(lines)


def evaluate(
    photos: Iterable[str | os.PathLike[str]],
    *,
    weights: str | os.PathLike[str] | None = None,
    qualities: Sequence[float] = DEFAULT_QUALITIES,
    beside: Sequence[ClassicalCodec] = (),
    pixels: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    effort: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Encode and decode every photo at every quality, and with the codecs of `beside`.

    PSNR and MS-SSIM are those of the decoded file, not the encoder's word. pixels: photos of more
    are shrunk to about so many, with Lanczos. Files that are no photo the codec takes are passed
    over. MS-SSIM needs the package pytorch-msssim (the extra `evaluate`) and a photo of at least
    161 pixels a side. Raises SourceError if no photo is left, ValueError if pixels or effort is too
    small.
    """
    if pixels is not None and pixels < 1:
        raise ValueError(f"photos cannot be shrunk to {pixels} pixels")
    codec = Codec.load(weights, device=device, precision=precision)
    measurements = []
    for name, image in _photos(photos, pixels):
        for quality in qualities:
            blob = codec.compress(image, quality=quality, measure=False, effort=effort).data
            (decoded,) = codec.decode([blob])
            measurements.append(_measure(OURS, name, quality, image, decoded, len(blob)))
        for other in beside:
            for value in other.sweep:
                try:
                    data = other.encode(image, value)
                    decoded = other.decode(data, image.shape)
                except (OSError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
                    told = f"{other.name} does not take it, leave one of them out: {error}"
                    raise SourceError(f"{name}: {told}") from error
                measurements.append(
                    _measure(other.name, name, value, image, decoded, len(data), similarity=False)
                )
        if progress is not None:
            progress(name)
    if not measurements:
        raise SourceError("no photo to evaluate")
    return Evaluation(codec.model_id, str(codec.device), measurements)


def _photos(
    paths: Iterable[str | os.PathLike[str]], pixels: int | None
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    files = list_photos(paths)
    folder = os.path.commonpath([file.absolute().parent for file in files]) if files else ""
    for file in files:
        image = read_photo(file)
        if image is None:
            continue
        height, width = image.shape[:2]
        if pixels is not None and height * width > pixels:
            scale = math.sqrt(pixels / (height * width))
            size = max(1, round(width * scale)), max(1, round(height * scale))
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        yield file.absolute().relative_to(folder).as_posix(), image


def _measure(
    codec: str,
    photo: str,
    quality: float,
    image: NDArray[np.uint8],
    decoded: NDArray[np.uint8],
    size: int,
    *,
    similarity: bool = True,
) -> Measurement:
    height, width = image.shape[:2]
    return Measurement(
        codec,
        photo,
        quality,
        size * 8 / (height * width),
        min(psnr(image, decoded), _MOST_PSNR),
        ms_ssim(image, decoded) if similarity else None,
    )


def ms_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float | None:
    """Multi-scale structural similarity, mean over the channels, 0 to 1.

    None where pytorch-msssim is not installed or a side has fewer than 161 pixels. Source: Wang,
    Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment", 2003.
    """
    if min(a.shape[:2]) < _MS_SSIM_SIDE:
        return None
    try:
        from pytorch_msssim import ms_ssim as measure
    except ImportError:
        return None
    planes = [
        torch.from_numpy(np.atleast_3d(x).astype(np.float32)).permute(2, 0, 1)[None] for x in (a, b)
    ]
    return float(measure(*planes, data_range=255))


def plot(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Write the rate-distortion curves as a PNG. Needs matplotlib (the extra `evaluate`)."""
    plot_curves(evaluation.curves(), path)


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | os.PathLike[str]
) -> None:
    """Write (bits per pixel, PSNR) of codecs by name as a PNG, ours drawn bold."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    styles = [(mark, line) for line in ("-", "--", ":") for mark in "osv^Dx"]
    # Okabe and Ito's palette, which colour-blind readers tell apart.
    colours = ["#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"]
    for number, (name, (bpp, decibels)) in enumerate(curves.items()):
        mark, line = styles[number % len(styles)]
        ours = name == OURS
        axes.plot(
            bpp,
            decibels,
            marker=mark,
            linestyle=line,
            markersize=4,
            label=name,
            color="black" if ours else colours[number % len(colours)],
            linewidth=2.5 if ours else 1.2,
            zorder=3 if ours else 2,
        )
    if OURS in curves and len(curves[OURS][0]) > 1:
        bpp, decibels = curves[OURS]
        axes.set_xlim(min(bpp) * 0.8, max(bpp) * 1.4)
        axes.set_ylim(min(decibels) - 1, max(decibels) + 2)
    axes.set_xscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(which="both", alpha=0.25)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(Path(path), dpi=120)
