"""Decoding part of a picture, or a smaller one, beside decoding all of it.

    python benchmarks/views.py [PHOTOS] [--threads 2] [--quality 50]

First a 50 MP picture: time and memory above the loaded model of a region of 512x512 beside the
whole (memory in a process of its own), the largest difference to the same crop of the whole, and
the time of reduced pictures. Then, where PHOTOS (a folder or files) are given: the PSNR of reduced
pictures against the whole decoded and shrunk with Lanczos, and of that against the shrunk source,
means over the photos.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from memory import peak_while
from numpy.typing import NDArray
from PIL import Image
from rate_distortion import cpu_name
from speed import best, picture

from vaestream import Codec, images
from vaestream.codec.metrics import psnr
from vaestream.training.data import list_photos

Pixels = NDArray[np.uint8]

HEIGHT, WIDTH = 6124, 8164
REGION = (3003, 2001, 512, 512)


def peak(blob: Path, what: str) -> float:
    """MB that a process of its own needs for a decoding above the loaded model."""
    command = [sys.executable, __file__, "--measure", what, str(blob)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(what: str, blob: Path) -> None:
    """Print the memory that one decoding adds to this process at its peak, in MB."""
    codec = Codec.load(device="cpu")
    data = blob.read_bytes()
    codec.decode(codec.encode([np.zeros((64, 64, 3), np.uint8)]))
    region = REGION if what == "region" else None
    print(peak_while(lambda: codec.decode([data], region=region))[0])


def large(codec: Codec, quality: float) -> None:
    """Times and memory on one large picture."""
    blob = codec.encode([picture(None, HEIGHT, WIDTH)], quality)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blob"
        path.write_bytes(blob)
        memory = {what: peak(path, what) for what in ("whole", "region")}
    whole = codec.decode([blob])[0]
    x, y, width, height = REGION
    part = codec.decode([blob], region=REGION)[0]
    difference = np.abs(part.astype(int) - whole[y : y + height, x : x + width]).max()
    all_of_it, _ = best(lambda: codec.decode([blob]), 2)
    region, _ = best(lambda: codec.decode([blob], region=REGION), 3)
    print(f"{WIDTH}x{HEIGHT}, {len(blob) / 1e6:.1f} MB")
    print(f"whole           {1000 * all_of_it:7.0f} ms  {memory['whole']:6.0f} MB")
    print(
        f"512x512 region  {1000 * region:7.0f} ms  {memory['region']:6.0f} MB  "
        f"(1/{all_of_it / region:.0f} of the time, 1/{memory['whole'] / memory['region']:.0f} of "
        f"the memory), largest difference {difference}"
    )
    for size in (2048, 1024, 512, 256):
        seconds, _ = best(lambda size=size: codec.decode([blob], max_size=size), 3)  # type: ignore[misc]
        print(f"max_size {size:5}  {1000 * seconds:7.0f} ms  (1/{all_of_it / seconds:.0f})")


def fidelity(codec: Codec, photos: list[Pixels], quality: float) -> None:
    """What shrinking in the synthesis costs."""
    for divisor in (2, 4, 8, 16):
        rows = []
        for pixels in photos:
            size = max(pixels.shape[:2]) // divisor
            blob = codec.encode([pixels], quality)[0]
            small = codec.decode([blob], max_size=size)[0]
            target = (small.shape[1], small.shape[0])
            shrunk, source = (
                np.asarray(Image.fromarray(p).resize(target, Image.Resampling.LANCZOS))
                for p in (codec.decode([blob])[0], pixels)
            )
            rows.append((psnr(shrunk, small), psnr(source, small), psnr(source, shrunk)))
        against, ours, lanczos = np.mean(rows, axis=0)
        print(
            f"1/{divisor:<3} {against:.2f} dB against the whole shrunk with Lanczos; against the "
            f"source shrunk: {ours:.2f} dB, the whole shrunk {lanczos:.2f} dB"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quality", type=float, default=50.0)
    parser.add_argument("--measure", choices=("whole", "region"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        measure(args.measure, args.photos[0])
        return
    codec = Codec.load(device="cpu")
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, {codec.dtype}")
    large(codec, args.quality)
    if args.photos:
        loaded = [images.load(p.read_bytes(), name=p.name) for p in list_photos(args.photos)]
        fidelity(codec, [p.pixels for p in loaded if isinstance(p, images.Photo)], args.quality)


if __name__ == "__main__":
    main()
