"""Peak memory of encoding and of decoding one large photo, above the loaded model.

    python benchmarks/memory.py [--megapixels 50] [--weights W]

Each runs in a process of its own; the figure is the peak resident size less the size before the
call, with the model loaded and warmed up and the input (pixels or bitstream) in memory. Also
compares the pixels of a windowed decode of a 12 MP picture with those of a decode in one piece.
"""

import argparse
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rate_distortion import cpu_name
from speed import picture

from vaestream import Codec

T = TypeVar("T")


def resident() -> float:
    """Megabytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak_while(run: Callable[[], T]) -> tuple[float, T]:
    """Megabytes that this process has at its peak above what it has now, and what `run` gives."""
    start, peak, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = run()
    done.set()
    watcher.join()
    return peak - start, output


def peak_of(task: str, weights: str | None, data: Any) -> tuple[float, float, Any]:
    """Peak above the start in MB, seconds, the output."""
    codec = Codec.load(weights, device="cpu")
    codec.decode(codec.encode([np.zeros((512, 512, 3), np.uint8)]))
    tasks: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode([data], 50)[0],
        "encode and measure PSNR": lambda: codec.compress(data, quality=50).psnr,
        "decode": lambda: codec.decode([data])[0].shape,
    }
    begin = time.perf_counter()
    megabytes, output = peak_while(tasks[task])
    return megabytes, time.perf_counter() - begin, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megapixels", type=float, default=50)
    parser.add_argument("--weights")
    args = parser.parse_args()
    width = int((args.megapixels * 1e6 * 4 / 3) ** 0.5)
    height = int(args.megapixels * 1e6 / width)
    print(f"{width}x{height}, {cpu_name()}, torch {torch.__version__}")
    spawn = multiprocessing.get_context("spawn")
    data: Any = picture(None, height, width)
    blob = b""
    for task in ("encode", "encode and measure PSNR", "decode"):
        with ProcessPoolExecutor(1, spawn) as process:  # one of its own, whose end is noticed
            given = blob if task == "decode" else data
            megabytes, seconds, output = process.submit(peak_of, task, args.weights, given).result()
        blob = output if task == "encode" else blob
        print(f"{task:26} {megabytes:7.0f} MB above the loaded model, {seconds:.1f} s", flush=True)
    pixels = picture(None, 3000, 4000)
    windowed = Codec.load(args.weights, device="cpu")
    whole = Codec(windowed.weights, windowed.device, windowed.dtype, window_pixels=1 << 20)
    (stream,) = windowed.encode([pixels], 75)
    pair = [c.decode([stream])[0].astype(np.int16) for c in (windowed, whole)]
    print(f"12 MP, windows against the whole: largest difference {np.abs(pair[0] - pair[1]).max()}")


if __name__ == "__main__":
    main()
