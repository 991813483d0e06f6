"""What rounding with a dead zone and counted tables gain, at the same decoder.

    python benchmarks/encoder_choices.py PHOTOS [--weights W]

BD-rate over 29 to 36.5 dB against plain rounding with Gaussian tables, on the middle 512x512 of
every photo given: use photos that the weights were not trained on. Needs scipy.
"""

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from rate_distortion import bd_rate, cpu_name

from vaestream.codec import Codec
from vaestream.codec.entropy import Table
from vaestream.codec.rate_control import rounding_offsets
from vaestream.codec.weights_file import gaussian_tables
from vaestream.training.data import list_photos, load_photos

SIDE = 512
QUALITIES = (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 95.0)
WINDOW = (29.0, 36.5)


def curve(codec: Codec, crops: list[NDArray[np.uint8]]) -> tuple[list[float], list[float]]:
    """Mean bits per pixel and mean PSNR at each quality."""
    points = []
    for quality in QUALITIES:
        made = [codec.compress(crop, quality=quality) for crop in crops]
        bpp = np.mean([len(e.data) * 8 / SIDE**2 for e in made])
        points.append((float(bpp), float(np.mean([e.psnr or 0.0 for e in made]))))
    return [p[0] for p in points], [p[1] for p in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--weights")
    args = parser.parse_args()
    photos = load_photos(list_photos(args.photos), min_side=SIDE, max_bytes=1 << 31)
    crops = []
    for pixels in photos.photos:
        top, left = ((side - SIDE) // 2 for side in pixels.shape[:2])
        crops.append(pixels[top : top + SIDE, left : left + SIDE])
    codec = Codec.load(args.weights, device="cpu")
    counted: list[Table] = codec._y_tables
    print(f"{len(crops)} photos, model {codec.model_id[:16]}, {cpu_name()}")
    reference = None
    for name, tables, strength in (
        ("plain rounding, Gaussian tables", gaussian_tables(), 0.0),
        ("dead zone, Gaussian tables", gaussian_tables(), 0.5),
        ("plain rounding, counted tables", counted, 0.0),
        ("dead zone 0.25, counted tables", counted, 0.25),
        ("dead zone 0.5, counted tables (shipped)", counted, 0.5),
        ("dead zone 1.0, counted tables", counted, 1.0),
    ):
        codec._y_tables = tables
        codec._rounding = torch.from_numpy(rounding_offsets(tables, strength))
        points = curve(codec, crops)
        reference = reference or points
        rate = bd_rate(*points, *reference, WINDOW)
        print(f"{name:42} {rate:+.1f} %" if rate is not None else name, flush=True)


if __name__ == "__main__":
    main()
