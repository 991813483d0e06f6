"""Does every setting decode what every other encoded? One factor changed at a time.

    python benchmarks/exactness.py KODAK_FOLDER [--weights W]

Against a reference run (float32, one thread, photos alone), at five qualities: symbols decoded
wrongly (must be 0), bitstreams that differ where only batch or order differ (must be 0), largest
difference of decoded pixels, and for bfloat16 the difference in mean PSNR. Where there is a CUDA
device it is one more factor.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rate_distortion import cpu_name

from vaestream import Codec
from vaestream.codec import Latents
from vaestream.codec.exact import ExactScaleBranch
from vaestream.codec.metrics import psnr

QUALITIES = (10.0, 30.0, 50.0, 70.0, 90.0)
Pictures = list[NDArray[np.uint8]]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Report:
    """Compares runs with the reference and prints a line each."""

    def __init__(self, reference: Codec, photos: Pictures) -> None:
        self.photos = photos
        self.reference = reference
        self.blobs = {q: [reference.encode([p], q)[0] for p in photos] for q in QUALITIES}
        self.pixels = {q: [reference.decode([b])[0] for b in self.blobs[q]] for q in QUALITIES}
        self.symbols = {q: [reference.decode_latents(b) for b in self.blobs[q]] for q in QUALITIES}
        self.wrong = 0

    def line(self, name: str, codec: Codec, *, batch: int = 1) -> None:
        wrong = differing = level = 0
        loss = []
        for q in QUALITIES:
            made: list[bytes] = []
            decoded: Pictures = []
            for at in range(0, len(self.photos), batch):
                made += codec.encode(self.photos[at : at + batch], q)
                decoded += codec.decode(self.blobs[q][at : at + batch])
            for i, (ours, theirs) in enumerate(zip(made, self.blobs[q], strict=True)):
                wrong += _wrong(codec.decode_latents(theirs), self.symbols[q][i])
                expected = self.pixels[q][i]
                level = max(level, int(np.abs(decoded[i].astype(np.int16) - expected).max()))
                pixels = decoded[i]
                if ours != theirs:
                    differing += 1
                    wrong += _wrong(codec.decode_latents(ours), self.reference.decode_latents(ours))
                    pixels = codec.decode([ours])[0]
                loss.append(psnr(self.photos[i], pixels) - psnr(self.photos[i], expected))
        self.wrong += wrong
        print(
            f"{name:34} wrong symbols {wrong}  other bitstreams {differing:3}  "
            f"largest pixel difference {level}  PSNR {np.mean(loss):+.4f} dB",
            flush=True,
        )


def _wrong(one: Latents, other: Latents) -> int:
    pairs = ((one.z_hat, other.z_hat), (one.symbols, other.symbols))
    return sum(int((a.cpu() != b.cpu()).sum()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kodak")
    parser.add_argument("--weights")
    args = parser.parse_args()
    files = sorted(Path(args.kodak).glob("*.png"))
    photos = [np.array(Image.open(f).convert("RGB")) for f in files]
    # Mixed sizes: every third photo is cut.
    photos = [p[: 300 + 7 * i, : 500 + 3 * i] if i % 3 == 0 else p for i, p in enumerate(photos)]
    torch.set_num_threads(1)
    single = Codec.load(args.weights, device="cpu", precision="float32")
    print(f"{len(photos)} photos, qualities {QUALITIES}, {cpu_name()}, torch {torch.__version__}")
    report = Report(single, photos)
    for batch in (3, 8):
        report.line(f"batches of {batch}", single, batch=batch)
    with threads(2):
        report.line("2 threads", single)
    for name in ("high", "medium"):
        with precision(name):
            report.line(f"float32 products {name!r}", single)
    with torch.autocast("cpu", torch.bfloat16):
        report.line("inside the user's autocast", single)
    half = Codec.load(args.weights, device="cpu", precision="bfloat16")
    report.line("bfloat16", half)
    with threads(2):
        report.line("bfloat16, 2 threads", half)
    rows = Codec.load(args.weights, device="cpu", precision="float32")
    rows.networks.model.to(memory_format=torch.contiguous_format)
    report.line("channels-last off", rows)
    wide = Codec.load(args.weights, device="cpu", precision="float32")
    layers = wide.networks.model.h_s_scale.integer_layers()
    wide.networks.exact = ExactScaleBranch(layers, wide.device, torch.float32)
    report.line("table indices in float32, not int8", wide)
    small = Report(single, [photos[0][:96, :128]])
    with torch.backends.mkldnn.flags(enabled=False):
        small.line("mkldnn off (one small photo)", single)
    report.wrong += small.wrong
    if torch.cuda.is_available():
        for name in ("float32", "bfloat16"):
            report.line(f"CUDA, {name}", Codec.load(args.weights, device="cuda", precision=name))
    raise SystemExit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
