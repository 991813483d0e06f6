"""The whole job beside the codec alone, on the same photos and cores.

    python benchmarks/job.py PHOTOS [--workers 2] [--quality 50] [--verify sample]

The codec alone: as many processes as workers, one thread each, every one encodes its share of the
decoded photos from memory, measures their PSNR, and decodes again those that the job verifies. The
job: files on disk -> Ray -> archive. What the job takes beside the codec's work is told apart:
start and end (Ray, the model, the index: a job over one small photo), reading files into pixels,
the report with its photos, and the rest: Ray's own share of the cores, hashes, writing, and workers
that wait for a shard.
"""

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import vaestream
from vaestream import images
from vaestream.codec import Codec
from vaestream.pipeline.allocator import keep_freed_memory
from vaestream.pipeline.compressor import Verify, is_verified
from vaestream.training.data import list_photos


def _encode(
    files: list[Path], quality: float, verify: Verify, start: float
) -> tuple[float, float, float]:
    """Megapixels of the photos; seconds to read them, and for the codec's work from `start` on."""
    import torch

    keep_freed_memory()  # as the job's workers do
    torch.set_num_threads(1)
    codec = Codec.load(device="cpu")
    begin = time.monotonic()
    photos = []
    for file in files:
        data = file.read_bytes()
        photo = images.load(data, name=file.name)
        if isinstance(photo, images.Photo):
            photos.append((photo.pixels, is_verified(data, verify)))
    read = time.monotonic() - begin
    codec.compress(photos[0][0][:512, :512], quality=quality)
    time.sleep(max(0.0, start - time.time()))
    begin = time.monotonic()
    for pixels, verified in photos:
        encoded = codec.compress(np.ascontiguousarray(pixels), quality=quality)
        if verified:
            codec.decode([encoded.data])
    seconds = time.monotonic() - begin
    return sum(p.shape[0] * p.shape[1] for p, _ in photos) / 1e6, read, seconds


def _shares(files: list[Path], workers: int) -> list[list[Path]]:
    """Files for each worker: the largest first, each to the one that has least."""
    shares: list[list[Path]] = [[] for _ in range(workers)]
    size = [0] * workers
    for file in sorted(files, key=lambda file: file.stat().st_size, reverse=True):
        least = size.index(min(size))
        shares[least].append(file)
        size[least] += file.stat().st_size
    return shares


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quality", type=float, default=50.0)
    parser.add_argument("--verify", choices=("none", "sample", "all"), default="sample")
    args = parser.parse_args()
    files = list_photos([args.photos])
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers) as pool:
        start = time.time() + 30  # by then all have read their files
        jobs = [
            pool.apply_async(_encode, (share, args.quality, args.verify, start))
            for share in _shares(files, args.workers)
        ]
        told = [job.get() for job in jobs]
    megapixels = sum(one[0] for one in told)
    alone = max(one[2] for one in told)

    with tempfile.TemporaryDirectory(prefix="job-") as folder:
        small = Path(folder) / "small.png"
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(small)
        settings = {"quality": args.quality, "verify": args.verify, "workers": args.workers}
        begin = time.monotonic()
        empty = vaestream.compress(small, Path(folder) / "start", **settings)
        start_and_end = time.monotonic() - begin
        begin = time.monotonic()
        summary = vaestream.compress(
            args.photos,
            Path(folder) / "archive",
            shard_images=max(1, len(files) // (16 * args.workers)),
            **settings,
        )
        seconds = time.monotonic() - begin
    report = seconds - summary.seconds - (start_and_end - empty.seconds)
    print(f"{platform.processor() or platform.machine()}, {args.workers} workers")
    print(f"{summary.photos} photos compressed of {len(files)}, {megapixels:.0f} MP")
    print(f"codec alone      {megapixels / alone:7.2f} MP/s  {alone:7.1f} s")
    read = max(one[1] for one in told)
    print(f"whole job        {megapixels / seconds:7.2f} MP/s  {seconds:7.1f} s")
    print(f"  start and end  {start_and_end:23.1f} s")
    print(f"  files to pixels {read:22.1f} s")
    print(f"  report          {report:22.1f} s")
    print(f"  the rest       {seconds - start_and_end - read - report - alone:23.1f} s")
    print(f"job / codec      {alone / seconds:7.2f}")
    print(f"  without start and end {alone / (seconds - start_and_end):.2f}")


if __name__ == "__main__":
    main()
