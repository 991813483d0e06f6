"""Feeding a training loop: the loader beside decoding alone, and beside JPEG files.

    python benchmarks/loader.py PHOTOS [--quality 75] [--cores 2] [--device cpu] [--repeat 4]

Compresses PHOTOS into an archive, and saves the same pixels as JPEG files. Then, on the same cores:

- decode alone: a process for each core, one thread each, decodes its share of the bitstreams from
  memory; on another device than the CPU, one process decodes all of them there.
- `ArchiveLoader`, with the synthesis in the main process or in the workers, and a `DataLoader` of
  `ArchiveDataset`: from files on a local disk to tensors (3, H, W), in shuffled batches.
- JPEG: a `DataLoader` whose workers open files with Pillow, to the same tensors.

Each rate is that of the fastest of several rounds, in which all take their turns, in megapixels a
second; workers have started, and have loaded the model, before. The first batch of a round waits
for its photos: take enough of them (--repeat goes through them that often) that this counts little.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rate_distortion import cpu_name
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import vaestream
from vaestream.codec import Codec
from vaestream.connectors.torch import ArchiveDataset, ArchiveLoader, ArchiveSampler

JPEG_QUALITY = 90


class JpegFiles(Dataset[Tensor]):
    """Pictures by position, (3, H, W) uint8."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Tensor:
        with Image.open(self.files[position]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return pixels.permute(2, 0, 1).contiguous()


def decode_on_request(weights: bytes, blobs: list[bytes], pipe: Connection) -> None:
    """Decode the blobs each time something comes through the pipe, and tell when it is done."""
    torch.set_num_threads(1)
    path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    path.write_bytes(weights)
    codec = Codec.load(path, device="cpu")
    codec.decode(blobs[:1])
    pipe.send("ready")
    while pipe.recv():
        for blob in blobs:
            codec.decode([blob])
        pipe.send("done")


class DecodeAlone:
    """Processes that decode from memory, all at once."""

    def __init__(self, codec: Codec, blobs: list[bytes], cores: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._processes = []
        # Largest first, each to whoever has least: all end at about the same time.
        shares: list[list[bytes]] = [[] for _ in range(cores)]
        for blob in sorted(blobs, key=len, reverse=True):
            min(shares, key=lambda share: sum(map(len, share))).append(blob)
        for share in shares:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=decode_on_request, args=(codec.weights, share, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def __call__(self) -> None:
        for pipe in self._pipes:
            pipe.send(True)
        for pipe in self._pipes:
            pipe.recv()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes:
            process.join()


def run_through(batches: Iterable[list[Tensor]], device: torch.device) -> None:
    for batch in batches:
        assert all(image.shape[0] == 3 for image in batch)
    if device.type == "cuda":
        torch.cuda.synchronize()


def best(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The shortest time that each way has taken, in seconds; the first round does not count."""
    seconds = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--quality", type=float, default=75.0)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    # All processes that are started from here on have it too.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    device = torch.device(args.device)

    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        compress = [sys.executable, "-m", "vaestream", "compress", str(args.photos)]
        options = ["--quality", str(args.quality), "--min-psnr", "0"]
        subprocess.run(
            [*compress, str(folder / "archive"), *options], check=True, stdout=subprocess.DEVNULL
        )
        archive = vaestream.open(str(folder / "archive"), device=args.device)
        rows = [row for row in archive.rows() if row.codec == "vae"]
        keys = [row.key for row in rows]
        blobs = archive.blobs(keys)
        jpegs = []
        for number, key in enumerate(keys):
            jpegs.append(folder / f"{number}.jpg")
            Image.fromarray(archive.read([key])[0]).save(jpegs[-1], quality=JPEG_QUALITY)
        megapixels = sum((row.width or 0) * (row.height or 0) for row in rows) / 1e6 * args.repeat
        coded, kept = sum(map(len, blobs)), sum(path.stat().st_size for path in jpegs)
        print(
            f"{cpu_name()}, {args.cores} cores, {device}, torch {torch.__version__}\n"
            f"{len(keys)} photos x {args.repeat}, {megapixels:.0f} MP; archive {coded / 1e6:.1f} MB"
            f" (quality {args.quality:g}), JPEG {kept / 1e6:.1f} MB (quality {JPEG_QUALITY})"
        )

        dataset = ArchiveDataset(archive, keys=keys * args.repeat)
        on_cpu = ArchiveDataset(archive.to("cpu"), keys=keys * args.repeat)
        sampler = ArchiveSampler(dataset, args.batch_size, shuffle=True, rank=0, world_size=1)
        plain: dict[str, Any] = {
            "num_workers": args.cores,
            "multiprocessing_context": "spawn",
            "persistent_workers": True,
            "batch_sampler": sampler,
            "collate_fn": list,
        }
        alone = None
        if device.type == "cpu":
            alone = DecodeAlone(archive.codec, blobs * args.repeat, args.cores)
            ways: dict[str, Callable[[], None]] = {"decode alone": alone}
        else:
            ways = {"decode alone": lambda: run_through_blobs(archive.codec, blobs, args.repeat)}
        loaders: dict[str, Iterable[list[Tensor]]] = {
            f"ArchiveLoader, {workers} workers": ArchiveLoader(
                dataset, args.batch_size, shuffle=True, num_workers=workers
            )
            for workers in sorted({max(1, args.cores // 2), args.cores})
        }
        if device.type == "cpu":
            loaders["ArchiveLoader, all in workers"] = ArchiveLoader(
                dataset,
                args.batch_size,
                shuffle=True,
                num_workers=args.cores,
                synthesis="workers",
            )
        loaders["DataLoader of ArchiveDataset"] = DataLoader(on_cpu, **plain)
        loaders["DataLoader of JPEG files"] = DataLoader(JpegFiles(jpegs * args.repeat), **plain)
        for label, loader in loaders.items():
            ways[label] = lambda loader=loader: run_through(loader, device)  # type: ignore[misc]
        seconds = best(ways, args.rounds)
        if alone is not None:
            alone.close()
        reference, jpeg = seconds["decode alone"], seconds["DataLoader of JPEG files"]
        for label, taken in seconds.items():
            print(
                f"{label:30} {megapixels / taken:8.2f} MP/s   x{reference / taken:5.2f} of decode "
                f"alone   x{jpeg / taken:5.2f} of JPEG"
            )


def run_through_blobs(codec: Codec, blobs: list[bytes], repeat: int) -> None:
    for _ in range(repeat):
        for blob in blobs:
            codec.render(codec.decode_latents(blob))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
