"""One photo out of an archive on an S3 server, beside Parquet's own reader and JPEG objects.

    python tests/s3_server.py    # once: installs OpenStack Swift, the server
    python benchmarks/random_access.py PHOTOS [--rows 10000] [--photos 300] [--quality 50]
        [--threads 2] [--index-rows 100000]

Each of PHOTOS (files or folders) is encoded once; an archive of --rows rows goes through them again
and again, in parts as a job cuts them by default. Then --photos of its rows, chosen at random, are
read from the server one at a time, by each way in turns, in one process with its connections open:

- `Archive.blob` and `Archive.read`: the bytes, and decoded, by as many threads as --threads says;
- pyarrow: the column of blobs of the row group that has the row, from a ParquetFile that is open,
  its footer read; the archive's index tells which row that is;
- JPEG: the same pixels, an object for each of these photos: the bytes, and decoded by Pillow.

Requests and bytes are counted by a proxy in a pass of their own, so that it takes no part in the
times; "fetched" is in bytes for each byte of the photo. Then several photos in one call, neighbours
and random ones.

At last, on a local disk, what it takes to open an archive of --index-rows rows, and of a tenth of
them: seconds, the index in memory, by how much the process has grown, and the index's file. Rows
are made up; each archive is opened by a process that has opened a small one before.
"""

import argparse
import hashlib
import io
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
import torch
from memory import resident
from PIL import Image
from rate_distortion import cpu_name

import vaestream
from vaestream import Archive, Codec, images
from vaestream.archive.index import INDEX, build_index
from vaestream.archive.manifest import write_manifest
from vaestream.archive.models import write_model
from vaestream.archive.schema import Row
from vaestream.archive.writer import write_part
from vaestream.pipeline.compressor import Compressor, Settings
from vaestream.pipeline.plan import Cutter, SourceObject, Version
from vaestream.training.data import list_photos

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from s3_faults import FaultyProxy
from s3_server import REQUIREMENT, S3Server, options_for

JPEG_QUALITY = 90
TOGETHER = 32
ROUNDS = 20
COUNTED = 50
ARCHIVE, JPEGS = "photos/archive", "photos/jpeg"

Read = Callable[[str], object]
ReadMany = Callable[[Sequence[str]], object]


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo: its row in the archive, and its pixels as a JPEG file."""

    row: Row
    jpeg: bytes


def encoded(files: Sequence[Path], codec: Codec, settings: Settings) -> list[Sample]:
    """Those of the files that are photos which the codec serves."""
    compressor = Compressor(codec, settings, "none")
    samples = []
    for file in files:
        data = file.read_bytes()
        photo = images.load(data, name=file.name)
        if isinstance(photo, images.Photo):
            item = SourceObject(file.name, 0, file.name, file.name, Version(size=len(data)))
            jpeg = io.BytesIO()
            Image.fromarray(photo.pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY)
            samples.append(Sample(compressor.row(item, data), jpeg.getvalue()))
    return [sample for sample in samples if sample.row.codec == "vae"]


def write_archive(
    fs: fsspec.AbstractFileSystem,
    root: str,
    rows: Sequence[Row],
    settings: Settings,
    model: bytes | None = None,
) -> None:
    """An archive of these rows, ascending by key, in parts as a job makes them."""
    model_id = None if model is None else write_model(fs, root, model)
    by_key = {row.key: row for row in rows}
    objects = (
        SourceObject(row.key, 0, row.key, row.source_url, Version(size=row.source_size))
        for row in rows
    )
    shards = Cutter(settings.to_json(), model_id or "").shards(objects)
    parts = [
        write_part(fs, root, shard.part_id, (by_key[item.key] for item in shard.objects))
        for shard in shards
    ]
    write_manifest(
        fs,
        root,
        settings=settings.to_json(),
        model_id=model_id,
        parts=parts,
        index_sha256=build_index(fs, root, [part.name for part in parts]),
    )


def key_of(number: int) -> str:
    return f"2{number // 1000:03}/{number // 100 % 10:02}/IMG_{number:08}.jpg"


class RowGroups:
    """Photos by pyarrow's own means: the row group of a row, its column of blobs."""

    def __init__(self, fs: fsspec.AbstractFileSystem, archive: Archive) -> None:
        index = archive.index.select(["key", "part", "row_group", "row"])
        self._places = {entry["key"]: entry for entry in index.to_pylist()}
        # Without a cache of fsspec's, which would read ahead more than pyarrow asks for.
        self._files = {
            part.name: pq.ParquetFile(fs.open(f"{ARCHIVE}/{part.name}", cache_type="none"))
            for part in archive.manifest.parts
        }

    def blob(self, key: str) -> bytes:
        place = self._places[key]
        table = self._files[place["part"]].read_row_group(
            place["row_group"], ["image.bytes"], use_threads=False
        )
        data: bytes = table["image"][place["row"]]["bytes"].as_py()
        return data


class Store:
    """The ways to get photos from the server at an address, their connections and files open."""

    def __init__(self, options: dict[str, Any]) -> None:
        fs = s3fs.S3FileSystem(**options)
        archive = vaestream.open(f"s3://{ARCHIVE}", device="cpu", storage_options=options)
        row_groups = RowGroups(fs, archive)

        def jpeg(key: str) -> bytes:
            # One request: with more concurrency s3fs asks for the size first.
            data: bytes = fs.cat_file(f"{JPEGS}/{key}", max_concurrency=1)
            return data

        self.keys = archive.keys()
        self.ways: dict[str, Read] = {
            "Archive.blob": archive.blob,
            "Archive.read": lambda key: archive.read([key]),
            "pyarrow, row group": row_groups.blob,
            "JPEG object": jpeg,
            "JPEG object, decoded": lambda key: np.asarray(Image.open(io.BytesIO(jpeg(key)))),
        }
        self.together: ReadMany = archive.blobs


def timed(run: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def in_turns(ways: dict[str, Read], keys: Sequence[str]) -> dict[str, list[float]]:
    """Milliseconds of each way for each key; each way goes first as often as the others."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number, key in enumerate(keys):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(timed(lambda name=name, key=key: ways[name](key)))  # type: ignore[misc]
    return taken


def counted(proxy: FaultyProxy, run: Callable[[], object]) -> tuple[int, int]:
    """How many requests that makes, and the bytes that it is sent."""
    before = len(proxy.sent)
    run()
    told = proxy.sent[before:]
    return len(told), sum(told)


def singles(
    store: Store, watched: Store, proxy: FaultyProxy, sizes: dict[str, tuple[int, int]]
) -> None:
    """Print the table of single photos; sizes: of each one's blob and JPEG."""
    keys = list(sizes)
    in_turns(store.ways, keys[:3])  # connections, the model
    in_turns(watched.ways, keys[:1])
    taken = in_turns(store.ways, keys)
    print(f"\n{'one photo':22}{'p50 ms':>9}{'p99 ms':>9}{'requests':>10}{'KB':>9}{'fetched':>9}")
    some = keys[:COUNTED]
    for name, milliseconds in taken.items():
        requests, got = counted(proxy, lambda name=name: [watched.ways[name](key) for key in some])  # type: ignore[misc]
        asked = sum(sizes[key][name.startswith("JPEG")] for key in some)
        p50, p99 = np.percentile(milliseconds, [50, 99])
        print(
            f"{name:22}{p50:9.1f}{p99:9.1f}{requests / len(some):10.2f}"
            f"{got / len(some) / 1e3:9.1f}{got / asked:9.3f}"
        )


def together(store: Store, watched: Store, proxy: FaultyProxy, rng: random.Random) -> None:
    """Print the table of several photos in one call."""
    keys, many = store.keys, min(TOGETHER, len(store.keys))
    starts = [rng.randrange(len(keys) - many + 1) for _ in range(ROUNDS)]
    asked = {
        "neighbours": [keys[start : start + many] for start in starts],
        "random ones": [rng.sample(keys, many) for _ in range(ROUNDS)],
    }
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(ROUNDS):
        for name, groups in asked.items():
            taken[name].append(timed(lambda group=groups[number]: store.together(group)))  # type: ignore[misc]
    print(f"\n{f'{many} photos in a call':22}{'ms/photo':>9}{'requests':>10}")
    for name, groups in asked.items():
        requests, _ = counted(proxy, lambda groups=groups: list(map(watched.together, groups)))  # type: ignore[misc]
        print(f"{name:22}{np.median(taken[name]) / many:9.2f}{requests / ROUNDS:10.1f}")


def on_server(folder: Path, args: argparse.Namespace) -> None:
    """Both tables about photos on an S3 server, whose files go into `folder`."""
    codec = Codec.load(device="cpu")
    settings = Settings.of(quality=args.quality, min_psnr=0.0)
    samples = encoded(list_photos(args.photos), codec, settings)
    named = {key_of(i): sample for i, sample in enumerate(islice(cycle(samples), args.rows))}
    rng = random.Random(0)
    chosen = rng.sample(sorted(named), min(args.count, args.rows))
    with S3Server(folder / "server") as server, FaultyProxy(server.url) as proxy:
        fs = s3fs.S3FileSystem(**server.options)
        fs.mkdir("photos")
        rows = [replace(sample.row, key=key) for key, sample in named.items()]
        write_archive(fs, ARCHIVE, rows, settings, codec.weights)
        for key in chosen:
            fs.pipe_file(f"{JPEGS}/{key}", named[key].jpeg)
        store, watched = Store(server.options), Store(options_for(proxy.url))
        parts = fs.glob(f"{ARCHIVE}/part-*")
        size = sum(len(row.data) for row in rows)
        print(
            f"{len(rows)} rows of {len(samples)} photos, quality {args.quality:g}, "
            f"{size / len(rows) / 1e3:.1f} KB each; {len(parts)} parts; "
            f"{len(chosen)} photos read; JPEG quality {JPEG_QUALITY}"
        )
        sizes = {key: (len(named[key].row.data), len(named[key].jpeg)) for key in chosen}
        singles(store, watched, proxy, sizes)
        together(store, watched, proxy, rng)


def made_up(count: int) -> Iterator[Row]:
    """Rows with next to no bytes, whose entries in the index are like those of photos."""
    rng = random.Random(0)
    for number in range(count):
        data = rng.randbytes(rng.randrange(16, 48))
        yield Row(
            key=key_of(number),
            data=data,
            codec="vae",
            width=rng.choice((1600, 1200)),
            height=rng.choice((1200, 1600)),
            channels=3,
            quality=50.0,
            psnr=rng.uniform(32, 44),
            source_size=rng.randrange(300_000, 1_300_000),
            source_url=f"s3://photos/{key_of(number)}",
            source_sha256=hashlib.sha256(data).hexdigest(),
            exif=rng.randbytes(rng.randrange(8, 24)),
            icc=b"profile" if rng.random() < 0.5 else None,
        )


def index(folder: Path, count: int) -> None:
    """Print what it takes to open archives, the largest of `count` rows."""
    fs, settings = fsspec.filesystem("file"), Settings.of(quality=50.0)
    print(f"\n{'rows':>8}{'seconds':>9}{'index MB':>10}{'grown MB':>10}{'file MB':>9}")
    write_archive(fs, str(folder / "small"), list(made_up(100)), settings)
    for rows in (count // 10, count):
        root = folder / f"{rows}"
        write_archive(fs, str(root), list(made_up(rows)), settings)
        command = [sys.executable, __file__, "--open", str(folder / "small"), str(root)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"{rows:8}{told.rstrip()}{(root / INDEX).stat().st_size / 1e6:9.1f}", flush=True)


def measure(small: str, url: str) -> None:
    """Print what this process needs to open the archive, after a small one."""
    vaestream.open(small)
    before, start = resident(), time.perf_counter()
    archive = vaestream.open(url)
    seconds, grown = time.perf_counter() - start, resident() - before
    print(f"{seconds:9.3f}{archive.index.nbytes / 1e6:10.1f}{grown:10.1f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="*")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--photos", dest="count", type=int, default=300, metavar="N")
    parser.add_argument("--quality", type=float, default=50.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--index-rows", type=int, default=100_000)
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        measure(*args.open)
        return
    if not args.photos:
        parser.error("name the PHOTOS")
    torch.set_num_threads(args.threads)
    print(
        f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, pyarrow "
        f"{pa.__version__}, s3fs {s3fs.__version__}, Pillow {PIL.__version__}, {REQUIREMENT}"
    )
    with tempfile.TemporaryDirectory(prefix="access-") as folder:
        on_server(Path(folder), args)
        index(Path(folder), args.index_rows)


if __name__ == "__main__":
    main()
