"""What the encoder's choices gain, at the same decoder.

    python benchmarks/encoder_choices.py PHOTOS [--weights W] [--effort N ...]

BD-rate over 29 to 36.5 dB against plain rounding with Gaussian tables, on the middle 512x512 of
every photo given, with the time a photo takes: use photos that the weights were not trained on.
Needs scipy.
"""

import argparse
import time

import numpy as np
from numpy.typing import NDArray
from rate_distortion import cpu_name

from vaestream.codec import Codec
from vaestream.codec.encoder import Encoder
from vaestream.codec.entropy import Table
from vaestream.codec.rounding import DEAD_ZONE
from vaestream.codec.weights_file import gaussian_tables, import_weights
from vaestream.training.bd_rate import bd_rate
from vaestream.training.data import list_photos, load_photos

SIDE = 512
QUALITIES = (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 95.0)
WINDOW = (29.0, 36.5)


def curve(
    codec: Codec, crops: list[NDArray[np.uint8]], effort: int = 0
) -> tuple[list[float], list[float]]:
    """Mean bits per pixel and mean PSNR at each quality."""
    points = []
    for quality in QUALITIES:
        made = [codec.compress(crop, quality=quality, effort=effort) for crop in crops]
        bpp = np.mean([len(e.data) * 8 / SIDE**2 for e in made])
        points.append((float(bpp), float(np.mean([e.psnr or 0.0 for e in made]))))
    return [p[0] for p in points], [p[1] for p in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--weights")
    parser.add_argument("--effort", type=int, nargs="*", default=[], metavar="N")
    args = parser.parse_args()
    photos = load_photos(list_photos(args.photos), min_side=SIDE, max_bytes=1 << 31)
    crops = []
    for pixels in photos.photos:
        top, left = ((side - SIDE) // 2 for side in pixels.shape[:2])
        crops.append(pixels[top : top + SIDE, left : left + SIDE])
    codec = Codec.load(args.weights, device="cpu")
    loaded = import_weights(codec.weights)
    counted = loaded.y_tables
    print(f"{len(crops)} photos, model {codec.model_id[:16]}, {cpu_name()}")
    choices: list[tuple[str, list[Table], float, int]] = [
        ("plain rounding, Gaussian tables", gaussian_tables(), 0.0, 0),
        ("dead zone, Gaussian tables", gaussian_tables(), DEAD_ZONE, 0),
        ("plain rounding, counted tables", counted, 0.0, 0),
        ("dead zone 0.5, counted tables", counted, 0.5, 0),
        (f"dead zone {DEAD_ZONE}, counted tables (shipped)", counted, DEAD_ZONE, 0),
        ("dead zone 1.0, counted tables", counted, 1.0, 0),
    ]
    choices += [(f"shipped, effort {n}", counted, DEAD_ZONE, n) for n in args.effort]
    reference = None
    for name, tables, strength, effort in choices:
        codec.encoder = Encoder(
            codec.networks, tables, loaded.z_tables, loaded.id, dead_zone=strength
        )
        start = time.perf_counter()
        points = curve(codec, crops, effort)
        seconds = (time.perf_counter() - start) / len(QUALITIES) / len(crops) / (SIDE**2 / 1e6)
        reference = reference or points
        rate = bd_rate(*points, *reference, window=WINDOW)
        gain = "" if rate is None else f"{rate:+.1f} %"
        print(f"{name:42} {gain:>8} {seconds:8.2f} s/MP", flush=True)


if __name__ == "__main__":
    main()
