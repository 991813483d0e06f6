"""What it gains to code large smooth photos as smaller ones.

    python benchmarks/reduction.py PHOTOS [--weights W]

For each photo, and for the mean curves of all: BD-rate of the codec as it is against the codec
without reductions, over all PSNRs that both reach at qualities 0 to 75, and the ratios that it
chose. Real bytes; PSNR of the decoded pixels. Needs scipy.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from rate_distortion import cpu_name

from vaestream.codec import Codec, read_header
from vaestream.training.bd_rate import bd_rate
from vaestream.training.data import list_photos, load_photos

QUALITIES = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0)
Points = list[tuple[float, float]]


@contextmanager
def no_reductions() -> Iterator[None]:
    with patch("vaestream.codec.encoder.best_ratio", return_value=1.0):
        yield


def measure(codec: Codec, image: NDArray[np.uint8]) -> tuple[Points, list[str]]:
    """Bits per pixel and PSNR at each quality, and how many times smaller the picture was coded."""
    points, ratios = [], []
    height, width = image.shape[:2]
    for quality in QUALITIES:
        encoded = codec.compress(image, quality=quality)
        points.append((len(encoded.data) * 8 / (height * width), encoded.psnr or 0.0))
        ratios.append(f"{width / read_header(encoded.data).coded_size[0]:.2g}")
    return points, ratios


def gain(found: Points, reference: Points) -> str:
    """BD-rate over the PSNRs that both curves reach."""
    window = max(found[0][1], reference[0][1]), min(found[-1][1], reference[-1][1])
    (bpp, psnr), (reference_bpp, reference_psnr) = (
        tuple(list(column) for column in zip(*points, strict=True)) for points in (found, reference)
    )
    rate = bd_rate(bpp, psnr, reference_bpp, reference_psnr, window=window)
    return f"{rate:+.1f} % over {window[0]:.1f} to {window[1]:.1f} dB"


def mean(curves: list[Points]) -> Points:
    return [(float(bpp), float(psnr)) for bpp, psnr in np.mean(np.array(curves), axis=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--weights")
    args = parser.parse_args()
    codec = Codec.load(args.weights, device="cpu")
    print(f"model {codec.model_id[:16]}, {cpu_name()}; ratios at qualities {QUALITIES}")
    photos = load_photos(list_photos(args.photos), min_side=256, max_bytes=1 << 33)
    found, references = [], []
    for name, image in zip(photos.names, photos.photos, strict=True):
        points, ratios = measure(codec, image)
        with no_reductions():
            reference, _ = measure(codec, image)
        found.append(points)
        references.append(reference)
        print(f"{name[:40]:40} {gain(points, reference)}; {' '.join(ratios)}", flush=True)
    print(f"{'mean curves':40} {gain(mean(found), mean(references))}")


if __name__ == "__main__":
    main()
