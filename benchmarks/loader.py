"""Feeding a training loop: the loader beside decoding alone, JPEG files and WebDataset shards.

    python benchmarks/loader.py PHOTOS [--quality 75] [--cores 2] [--device cpu] [--repeat 4]

Compresses PHOTOS into an archive, and saves the same pixels as JPEG files, which go into WebDataset
shards also. Then, on the same cores:

- decode alone: a process for each core, one thread each, decodes its share of the bitstreams from
  memory; on another device than the CPU, one process decodes all of them there.
- `ArchiveLoader`, with the synthesis in the main process or in the workers, and a `DataLoader` of
  `ArchiveDataset`: from files on a local disk to tensors (3, H, W), in shuffled batches.
- JPEG: a `DataLoader` whose workers open files with Pillow, to the same tensors.
- WebDataset: a `WebLoader` whose workers read shards of these files and decode them with Pillow.

Each rate is that of the fastest of several rounds, in which all take their turns, in megapixels a
second; workers have started, and have loaded the model, before. The first batch of a round waits
for its photos: take enough of them (--repeat goes through them that often) that this counts little.
Beside it, the bytes that the workers read for all photos once: those on the wire, were the disk a
store. Pillow reads the beginning of each file twice.
"""

import argparse
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from jpeg_sources import JpegFiles, shard_loader, write_shards
from PIL import Image
from rate_distortion import cpu_name
from torch import Tensor
from torch.utils.data import DataLoader

import vaestream
from vaestream.archive.reader import Archive
from vaestream.codec import Codec
from vaestream.connectors.torch import ArchiveDataset, ArchiveLoader, ArchiveSampler

JPEG_QUALITY = 90

# What the others are measured by.
ALONE, FILES = "decode alone", "DataLoader of JPEG files"


def decode_on_request(weights: bytes, blobs: list[bytes], pipe: Connection) -> None:
    """Decode the blobs each time something comes through the pipe, and tell when it is done."""
    torch.set_num_threads(1)
    codec = Codec.of(weights, device="cpu")
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


def run_through_blobs(codec: Codec, blobs: list[bytes]) -> None:
    for blob in blobs:
        codec.render(codec.decode_latents(blob))
    torch.cuda.synchronize()


def bytes_read() -> int:
    """What the processes that this one has started have read so far, be it from a disk or not.

    Among it the little that they are told through pipes: the positions of each batch.
    """
    total = 0
    for process in multiprocessing.active_children():
        counters = Path(f"/proc/{process.pid}/io").read_text()
        total += int(counters.split("rchar: ")[1].split()[0])
    return total


@dataclass
class Cost:
    """The least that a way has taken in a round."""

    seconds: float = math.inf
    read: float = math.inf


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, Cost]:
    """What each way takes; the first round does not count."""
    costs = {name: Cost() for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            read, start = bytes_read(), time.perf_counter()
            way()
            if number:
                cost = costs[name]
                cost.seconds = min(cost.seconds, time.perf_counter() - start)
                cost.read = min(cost.read, bytes_read() - read)
    return costs


@dataclass(frozen=True)
class Photos:
    """The same photos in all forms, once each; megapixels: of all together."""

    archive: Archive
    keys: list[str]
    jpegs: list[Path]
    shards: list[Path]
    megapixels: float


def prepare(args: argparse.Namespace, folder: Path) -> Photos:
    url = str(folder / "archive")
    options = ["--quality", str(args.quality), "--min-psnr", "0"]
    compress = [sys.executable, "-m", "vaestream", "compress", str(args.photos), url, *options]
    subprocess.run(compress, check=True, stdout=subprocess.DEVNULL)
    archive = vaestream.open(url, device=args.device)
    rows = [row for row in archive.rows() if row.codec == "vae"]
    keys = [row.key for row in rows]
    jpegs = []
    for number, key in enumerate(keys):
        jpegs.append(folder / f"{number}.jpg")
        Image.fromarray(archive.read([key])[0]).save(jpegs[-1], quality=JPEG_QUALITY)
    # A shard is read by one worker: with two for each they end at about the same time.
    shards = write_shards(jpegs, folder, 2 * args.cores)
    megapixels = sum((row.width or 0) * (row.height or 0) for row in rows) / 1e6
    return Photos(archive, keys, jpegs, shards, megapixels)


def describe(args: argparse.Namespace, photos: Photos) -> None:
    def megabytes(paths: Iterable[Path]) -> float:
        return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6

    coded = sum(map(len, photos.archive.blobs(photos.keys))) / 1e6
    print(
        f"{cpu_name()}, {args.cores} cores, {args.device}, torch {torch.__version__}\n"
        f"{len(photos.keys)} photos x {args.repeat}, {photos.megapixels * args.repeat:.0f} MP\n"
        f"archive {megabytes(Path(photos.archive.url).rglob('*')):.1f} MB, its photos {coded:.1f} "
        f"MB (quality {args.quality:g}); JPEG {megabytes(photos.jpegs):.1f} MB (quality "
        f"{JPEG_QUALITY}); {len(photos.shards)} shards {megabytes(photos.shards):.1f} MB"
    )


def archive_loaders(
    args: argparse.Namespace, dataset: ArchiveDataset
) -> dict[str, Iterable[list[Tensor]]]:
    def loader(workers: int, **options: Any) -> ArchiveLoader:
        return ArchiveLoader(dataset, args.batch_size, shuffle=True, num_workers=workers, **options)

    loaders: dict[str, Iterable[list[Tensor]]] = {
        f"ArchiveLoader, {workers} workers": loader(workers)
        for workers in sorted({max(1, args.cores // 2), args.cores})
    }
    if torch.device(args.device).type == "cpu":
        loaders["ArchiveLoader, all in workers"] = loader(args.cores, synthesis="workers")
    return loaders


def all_loaders(args: argparse.Namespace, photos: Photos) -> dict[str, Iterable[list[Tensor]]]:
    """Each in the same number of workers, but for `ArchiveLoader` with half of them."""
    keys = photos.keys * args.repeat
    on_cpu = ArchiveDataset(photos.archive.to("cpu"), keys=keys)
    plain: dict[str, Any] = {
        "num_workers": args.cores,
        "multiprocessing_context": "spawn",
        "persistent_workers": True,
        "batch_sampler": ArchiveSampler(
            on_cpu, args.batch_size, shuffle=True, rank=0, world_size=1
        ),
        "collate_fn": list,
    }
    return {
        **archive_loaders(args, ArchiveDataset(photos.archive, keys=keys)),
        "DataLoader of ArchiveDataset": DataLoader(on_cpu, **plain),
        FILES: DataLoader(JpegFiles(photos.jpegs * args.repeat), **plain),
        "WebDataset of JPEG files": shard_loader(
            photos.shards * args.repeat, args.batch_size, args.cores
        ),
    }


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
        photos = prepare(args, Path(name))
        describe(args, photos)
        codec, blobs = photos.archive.codec, photos.archive.blobs(photos.keys) * args.repeat
        alone = DecodeAlone(codec, blobs, args.cores) if device.type == "cpu" else None
        ways: dict[str, Callable[[], None]] = {
            ALONE: alone or (lambda: run_through_blobs(codec, blobs))
        }
        for label, loader in all_loaders(args, photos).items():
            ways[label] = lambda loader=loader: run_through(loader, device)  # type: ignore[misc]
        costs = measure(ways, args.rounds)
        if alone is not None:
            alone.close()
        for label, cost in costs.items():
            print(
                f"{label:30} {photos.megapixels * args.repeat / cost.seconds:8.2f} MP/s   "
                f"x{costs[ALONE].seconds / cost.seconds:5.2f} of decode alone   "
                f"x{costs[FILES].seconds / cost.seconds:5.2f} of JPEG   "
                f"{cost.read / args.repeat / 1e6:8.2f} MB read"
            )


if __name__ == "__main__":
    main()
