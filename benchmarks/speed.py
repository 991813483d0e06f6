"""Encode and decode speed beside compressai's bmshj2018-hyperprior, entropy coding included.

    pip install --no-deps compressai==1.2.8
    pip install einops requests pandas pytorch-msssim tqdm
    python benchmarks/speed.py [PHOTO] [--threads 2]

compressai runs its quality 4 with random weights (its speed does not depend on them); vaestream
runs at the quality that gives the bpp of that model on Kodak (0.46) on the picture at hand, and at
quality 90. PHOTO is any photo of at least 12 MP; without one, a synthetic picture is used. Each
figure is the best of several runs, in megapixels a second.
"""

import argparse
import importlib.abc
import importlib.machinery
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rate_distortion import cpu_name

from vaestream import Codec

PEER_BPP = 0.46
SIZES = ((1024, 1024), (3000, 4000))


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty stand-ins for packages that compressai imports and this benchmark does not need."""

    names = ("torchvision", "torch_geometric")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        class Module(types.ModuleType):
            __path__: list[str] = []  # noqa: RUF012

            def __getattr__(self, attribute: str) -> Any:
                if attribute.startswith("__"):
                    raise AttributeError(attribute)

                class Anything:
                    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

                    def __call__(self, value: Any) -> Any:
                        return value

                return Anything

        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def best(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """(shortest time in seconds, last result)."""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def peer(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Seconds that compressai takes to encode and decode a picture."""
    sys.meta_path.insert(0, _Absent())
    from compressai.zoo import bmshj2018_hyperprior

    torch.manual_seed(0)
    network = bmshj2018_hyperprior(4, pretrained=False).eval()
    network.update(force=True)
    height, width = pixels.shape[:2]
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    x = torch.nn.functional.pad(x, (0, -width % 64, 0, -height % 64))
    with torch.no_grad():
        repeats = 3 if height * width < 4e6 else 2
        encode, out = best(lambda: network.compress(x), repeats)
        decode, _ = best(lambda: network.decompress(out["strings"], out["shape"]), repeats)
    return encode, decode


def picture(photo: str | None, height: int, width: int) -> NDArray[np.uint8]:
    """The middle of the photo, or smooth noise with some texture."""
    if photo is not None:
        with Image.open(photo) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        if upright.width < upright.height:
            upright = upright.transpose(Image.Transpose.ROTATE_90)
        if upright.width < width or upright.height < height:
            raise SystemExit(f"{photo}: {upright.size} is smaller than {width}x{height}")
        left, top = (upright.width - width) // 2, (upright.height - height) // 2
        return np.array(upright.crop((left, top, left + width, top + height)))
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (height // 50, width // 50, 3), np.uint8))
    base = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return (base + rng.integers(-6, 7, base.shape)).clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo", nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights")
    parser.add_argument("--alone", action="store_true", help="leave compressai out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    codec = Codec.load(args.weights, device="cpu")
    name = Path(args.photo).name if args.photo else "synthetic picture"
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, {codec.dtype}, {name}")
    for height, width in SIZES:
        pixels = picture(args.photo, height, width)
        megapixels = height * width / 1e6
        reference = None
        if not args.alone:
            seconds = peer(pixels)
            reference = [megapixels / s for s in seconds]
            print(
                f"{width}x{height} compressai q4:           "
                f"encode {reference[0]:6.2f} MP/s          decode {reference[1]:6.2f} MP/s"
            )
        same_rate = codec.compress(pixels, target_bpp=PEER_BPP, measure=False).quality
        for quality in (same_rate, 90.0):
            repeats = 8 if megapixels < 4 else 4
            encode, blobs = best(partial(codec.encode, [pixels], quality), repeats)
            decode, _ = best(partial(codec.decode, blobs), repeats)
            rates = [megapixels / encode, megapixels / decode]
            ratio = ["", ""]
            if reference is not None:
                ratio = [f"({r / p:4.1f}x)" for r, p in zip(rates, reference, strict=True)]
            bpp = len(blobs[0]) * 8 / pixels.size * 3
            print(
                f"{width}x{height} vaestream q{quality:5.2f} {bpp:.2f} bpp: "
                f"encode {rates[0]:6.2f} MP/s {ratio[0]:8} decode {rates[1]:6.2f} MP/s {ratio[1]}"
            )


if __name__ == "__main__":
    main()
