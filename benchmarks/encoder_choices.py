"""What the encoder's choices gain, at the same networks.

    python benchmarks/encoder_choices.py PHOTOS [--weights W] [--effort N ...]

BD-rate over 29 to 36.5 dB against plain rounding with Gaussian tables, on the middle 512x512 of
every photo given, with the time a megapixel takes: use photos that the weights were not trained on.
Counted tables are those of the weights file, whatever is coded with them. Needs scipy.
"""

import argparse
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rate_distortion import cpu_name

from vaestream.codec import Codec
from vaestream.codec.config import NUM_SCALES
from vaestream.codec.encoder import Encoder
from vaestream.codec.entropy import Table
from vaestream.codec.lattice import SEARCH_STRENGTH
from vaestream.codec.rounding import DEAD_ZONE
from vaestream.codec.weights_file import gaussian_tables, import_weights
from vaestream.training.bd_rate import bd_rate
from vaestream.training.data import list_photos, load_photos

SIDE = 512
QUALITIES = (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 95.0)
WINDOW = (29.0, 36.5)


@dataclass(frozen=True)
class Choice:
    """Tables, how strong the dead zone is and the search on the lattice (None: no lattice), and
    steps of refinement."""

    name: str
    tables: list[Table]
    dead_zone: float = DEAD_ZONE
    lattice: float | None = SEARCH_STRENGTH
    effort: int = 0


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
    gaussian = gaussian_tables()
    choices = [
        Choice("plain rounding, Gaussian tables", gaussian, 0.0, None),
        Choice("dead zone, Gaussian tables", gaussian, lattice=None),
        Choice("plain rounding, counted tables", counted, 0.0, None),
        Choice("dead zone, counted tables", counted, lattice=None),
        Choice("dead zone and lattice (shipped)", counted),
        Choice("dead zone and lattice, searched with 0.6", counted, lattice=0.6),
        Choice("dead zone and lattice, searched with 1.2", counted, lattice=1.2),
    ]
    choices += [Choice(f"shipped, effort {n}", counted, effort=n) for n in args.effort]
    config = codec.networks.config
    reference = None
    for choice in choices:
        off = choice.lattice is None
        # Without its lattice this codec would not decode what it makes: sizes and PSNR hold all the
        # same.
        codec.networks.config = replace(config, lattice_from=NUM_SCALES) if off else config
        codec.encoder = Encoder(
            codec.networks,
            choice.tables,
            loaded.z_tables,
            loaded.id,
            dead_zone=choice.dead_zone,
            search_strength=choice.lattice or SEARCH_STRENGTH,
        )
        start = time.perf_counter()
        points = curve(codec, crops, choice.effort)
        seconds = (time.perf_counter() - start) / len(QUALITIES) / len(crops) / (SIDE**2 / 1e6)
        reference = reference or points
        rate = bd_rate(*points, *reference, window=WINDOW)
        gain = "" if rate is None else f"{rate:+.1f} %"
        print(f"{choice.name:42} {gain:>8} {seconds:8.2f} s/MP", flush=True)


if __name__ == "__main__":
    main()
