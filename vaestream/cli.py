"""The command line: each subcommand a thin layer over a function that Python can call too.

Exit codes: 0 all is well, 1 an error, 2 wrong usage, 3 done, but some rows carry errors, 130 and
143 stopped by Ctrl-C and SIGTERM.
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from vaestream import __version__
from vaestream.errors import VaestreamError
from vaestream.text import duration, shown, size

if TYPE_CHECKING:
    from vaestream.archive.reader import Archive
    from vaestream.archive.schema import RowInfo
    from vaestream.pipeline.job import Progress, Summary

OK, ERROR, USAGE, SOME_FAILED = 0, 1, 2, 3
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

_SECONDS_BETWEEN_LINES = 5.0


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what is open gets closed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; errors are told on stderr in one line."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else USAGE
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        with _terminable():
            return run(args)
    except VaestreamError as error:
        return _complain(str(error))
    except BrokenPipeError:
        # The reader of our output has gone: no error of ours, and nothing left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except OSError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _stopped(args, INTERRUPTED)
    except _Terminated:
        return _stopped(args, TERMINATED)


def compress(args: argparse.Namespace) -> int:
    """`vaestream compress`."""
    from vaestream.pipeline.job import compress

    if args.dry_run:
        return _estimate(args)
    line = _ProgressLine()
    warnings = _Warnings(line)
    logger = logging.getLogger("vaestream")
    logger.addHandler(warnings)
    # Threads of a job that is stopped outlive it, and would start Ray anew. Ray reads the variable
    # when it is imported; programs that the caller starts later are not to inherit it.
    alone = "RAY_ENABLE_AUTO_CONNECT" not in os.environ
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        summary = compress(
            args.sources,
            args.destination,
            quality=args.quality,
            target_bpp=args.target_bpp,
            target_psnr=args.target_psnr,
            min_psnr=args.min_psnr,
            device=args.device,
            workers=args.workers,
            gpus_per_worker=args.gpus_per_worker,
            shard_images=args.shard_images,
            verify=args.verify,
            include=args.include,
            exclude=args.exclude,
            storage_options=args.storage_options,
            address=args.address,
            overwrite=args.overwrite,
            weights=args.weights,
            max_pixels=args.max_pixels,
            max_object_bytes=args.max_object_bytes,
            effort=args.effort,
            progress=line.show,
        )
    finally:
        if alone:
            del os.environ["RAY_ENABLE_AUTO_CONNECT"]
        logger.removeHandler(warnings)
        line.end()
    if args.json:
        print(json.dumps(summary.to_json()))
    else:
        print(_told(summary, args.destination))
    return SOME_FAILED if summary.errors else OK


def _estimate(args: argparse.Namespace) -> int:
    from vaestream.pipeline.compressor import Settings
    from vaestream.pipeline.estimate import estimate
    from vaestream.pipeline.prepare import prepare

    _ready_for_codec(args.device)
    settings = Settings.of(
        quality=args.quality,
        target_bpp=args.target_bpp,
        target_psnr=args.target_psnr,
        min_psnr=args.min_psnr,
        max_pixels=args.max_pixels,
        effort=args.effort,
    )
    prepared = prepare(
        args.sources,
        args.destination,
        settings=settings,
        shard_images=args.shard_images,
        include=args.include,
        exclude=args.exclude,
        storage_options=args.storage_options,
        overwrite=args.overwrite,
        weights=args.weights,
        device=args.device,
    )
    told = estimate(prepared, sample=args.sample, max_object_bytes=args.max_object_bytes)
    if args.json:
        print(json.dumps(told.to_json()))
        return OK
    print(
        f"nothing written; {told.objects} objects to do, {size(told.source_bytes)}\n"
        f"{told.sampled} of them tried: {told.photos} photos compressed, "
        f"{sum(told.kept.values())} kept as their source, {told.errors} with errors"
    )
    for reason, count in told.kept.items():
        print(f"  kept: {reason}: {count}")
    if told.ratio is not None and told.archive_bytes is not None:
        print(f"about {size(told.archive_bytes)} in the archive, {told.ratio:.2f} times smaller")
    if told.bpp is not None:
        psnr = "" if told.psnr is None else f", {told.psnr:.2f} dB PSNR"
        print(f"compressed photos: {told.bpp:.3f} bits per pixel{psnr}")
    print(f"about {told.worker_hours:.1f} hours of one worker here: divide by your workers")
    return OK


def ls(args: argparse.Namespace) -> int:
    """`vaestream ls`: a row a line."""
    for row in _open(args).rows():
        print(json.dumps(_plain(asdict(row))) if args.json else _row_line(row))
    return OK


def info(args: argparse.Namespace) -> int:
    """`vaestream info`: what an archive holds, from its manifest alone."""
    archive = _open(args)
    manifest = archive.manifest
    totals = manifest.totals
    archive_bytes = sum(part.size for part in manifest.parts)
    facts: dict[str, Any] = {
        "url": archive.url,
        "rows": manifest.num_rows,
        "photos": totals.photos_vae,
        "kept": totals.reasons,
        "errors": totals.errors,
        "parts": len(manifest.parts),
        "source_bytes": totals.source_bytes,
        "archive_bytes": archive_bytes,
        "ratio": totals.source_bytes / archive_bytes if archive_bytes else None,
        "bpp": 8 * totals.vae_coded_bytes / totals.vae_pixels if totals.vae_pixels else None,
        "psnr": totals.psnr_sum / totals.psnr_count if totals.psnr_count else None,
        "megapixels": totals.vae_pixels / 1e6,
        "settings": manifest.settings,
        "model_id": manifest.model_id,
        "format_version": manifest.version,
    }
    if args.json:
        print(json.dumps(facts))
        return OK
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)
        elif name.endswith("_bytes"):
            value = size(value)
        elif isinstance(value, float):
            value = f"{value:.2f}"
        print(f"{name.replace('_', ' '):15s} {'-' if value in (None, '') else value}")
    return OK


def extract(args: argparse.Namespace) -> int:
    """`vaestream extract`."""
    from vaestream.pipeline.extract import extract

    _ready_for_codec(args.device)
    result = extract(
        _open(args),
        args.destination,
        args.keys,
        format=args.format,
        region=args.region,
        max_size=args.max_size,
        workers=args.workers,
        address=args.address,
        storage_options=args.storage_options,
    )
    for key, reason in result.failures.items():
        print(f"vaestream: {shown(key)}: {shown(reason)}", file=sys.stderr)
    print(
        f"{result.decoded} photos decoded, {result.verbatim} objects as they were, "
        + (f"{result.earlier} written earlier, " if result.earlier else "")
        + f"{len(result.failures)} not written"
    )
    return SOME_FAILED if result.failures else OK


def verify(args: argparse.Namespace) -> int:
    """`vaestream verify`: exit code 1 where any byte is not the one that was written, or any source
    has no right row."""
    from vaestream.archive.verify import verify
    from vaestream.pipeline.stores import options_for

    if args.against:
        return _prove(args)
    problems = verify(args.archive, storage_options=options_for(args.archive, args.storage_options))
    if args.json:
        print(json.dumps({"problems": [asdict(problem) for problem in problems]}))
    else:
        for problem in problems:
            where = (
                problem.part if problem.row_key is None else f"{problem.part}: {problem.row_key}"
            )
            print(shown(f"{where}: {problem.what}: {problem.detail}"))
        print(f"{len(problems)} problems" if problems else "whole: every byte is as written")
    return ERROR if problems else OK


def _prove(args: argparse.Namespace) -> int:
    from vaestream.pipeline.proof import prove

    _ready_for_codec(args.device)
    live = sys.stderr.isatty()
    proof = prove(
        _open(args),
        args.against,
        include=args.include,
        exclude=args.exclude,
        storage_options=args.storage_options,
        progress=(lambda now: print(f"\r{now.objects} objects", end="", file=sys.stderr))
        if live
        else None,
    )
    if live:
        print(file=sys.stderr)
    if args.json:
        print(json.dumps(asdict(proof)))
        return ERROR if proof.problems else OK
    for key, problem in proof.problems:
        print(shown(f"{key}: {problem}"))
    print(
        f"{proof.objects} objects of the sources: {proof.photos} decode to the PSNR they claim, "
        f"{proof.verbatim} are kept byte for byte, {len(proof.problems)} are not proved"
        + (f"; {proof.unlisted} rows are of other objects" if proof.unlisted else "")
    )
    return ERROR if proof.problems else OK


def report(args: argparse.Namespace) -> int:
    """`vaestream report`: the page that a job leaves beside its archive, made again."""
    from vaestream.pipeline.report import write_report

    _check_device(args.device)
    print(write_report(_open(args), out=args.out, storage_options=args.storage_options))
    return OK


def train(args: argparse.Namespace) -> int:
    """`vaestream train`."""
    from vaestream.training.trainer import train

    _check_device(args.device)
    path = train(
        args.photos,
        out=args.out,
        init=args.init,
        minutes=args.minutes,
        steps=args.steps,
        device=args.device,
    )
    print(path)
    return OK


def evaluate(args: argparse.Namespace) -> int:
    """`vaestream evaluate`."""
    from vaestream.training.classical import available
    from vaestream.training.evaluate import evaluate, plot

    _ready_for_codec(args.device)
    compare = args.compare is not None
    for module in ["scipy"] * compare + ["matplotlib"] * (args.plot is not None):
        if importlib.util.find_spec(module) is None:
            raise VaestreamError(f"{module} is needed for this: pip install 'vaestream[evaluate]'")
    live = sys.stderr.isatty()
    result = evaluate(
        args.photos,
        weights=args.weights,
        qualities=args.qualities,
        beside=available(args.compare) if compare else (),
        pixels=args.pixels,
        device=args.device,
        effort=args.effort,
        progress=(lambda name: print(name, file=sys.stderr)) if live else None,
    )
    windows = args.window or [(29.0, 36.5), (36.0, 40.0)]
    rates = result.bd_rates(windows) if compare else {}
    if args.json:
        document = json.loads(result.to_json())
        print(json.dumps({**document, "windows": windows, "bd_rates": rates}, indent=1))
    else:
        print(result.table())
        if rates:
            print("\nBD-rate of vaestream against" + "".join(_window(w) for w in windows))
        for name, values in rates.items():
            print(f"{name:28}" + "".join(_percent(value) for value in values))
        if importlib.util.find_spec("pytorch_msssim") is None:
            print("MS-SSIM needs pytorch-msssim: pip install 'vaestream[evaluate]'")
    if args.plot is not None:
        plot(result, args.plot)
    return OK


def _window(window: tuple[float, float]) -> str:
    return f"{window[0]:g}-{window[1]:g} dB".rjust(14)


def _percent(value: float | None) -> str:
    return ("-" if value is None else f"{value:+.1f} %").rjust(14)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vaestream",
        description="Photo archives several times smaller, with every photo still at hand.",
        epilog="Exit codes: 0 all is well, 1 error, 2 wrong usage, 3 some rows carry errors.",
    )
    parser.add_argument("--version", action="version", version=f"vaestream {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _compress_arguments(commands.add_parser("compress", help="compress photos into an archive"))
    _archive_arguments(
        commands.add_parser("ls", help="list an archive's rows, as JSON lines with --json"), ls
    )
    _archive_arguments(commands.add_parser("info", help="what an archive holds"), info)
    _verify_arguments(commands.add_parser("verify", help="find damage in an archive"))
    _report_arguments(commands.add_parser("report", help="make an archive's report.html again"))
    _extract_arguments(commands.add_parser("extract", help="write photos back to files"))
    _train_arguments(commands.add_parser("train", help="train a model on photos"))
    _evaluate_arguments(commands.add_parser("evaluate", help="measure rate and distortion"))
    return parser


def _compress_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SRC",
        help="file, folder (recursive), glob or fsspec URL; a tar, zip, Parquet or list file that "
        "is named stands for what it holds",
    )
    add("destination", metavar="DST", help="folder or fsspec URL of the archive")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--quality", type=float, metavar="Q", help="0 to 100 (default 50)")
    rate.add_argument("--target-bpp", type=float, metavar="B", help="bits per pixel of each photo")
    rate.add_argument("--target-psnr", type=float, metavar="D", help="dB of each photo")
    add(
        "--min-psnr",
        type=float,
        metavar="D",
        help="keep the source below (28; less below quality 50)",
    )
    add(
        "--effort",
        type=int,
        default=0,
        metavar="N",
        help="gradient steps on each photo: smaller, and slower; 2 or 8, say (0)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--workers", type=_at_least_1, metavar="N", help="default: one a CPU, or four a GPU")
    add("--gpus-per-worker", type=float, metavar="F", help="share of a GPU (default 0.25)")
    add(
        "--shard-images",
        type=_at_least_1,
        default=256,
        metavar="N",
        help="objects a part at most (256)",
    )
    add("--verify", choices=("none", "sample", "all"), default="sample")
    add("--include", action="append", default=[], metavar="GLOB", help="take only these")
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave these out")
    add("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, or a local Ray")
    add("--overwrite", action="store_true", help="replace an archive with other settings")
    add("--weights", metavar="W", help="model other than the shipped one, a path or URL")
    add("--max-pixels", type=int, default=256_000_000, metavar="N", help="refuse larger pictures")
    add("--max-object-bytes", type=int, default=1 << 30, metavar="N", help="refuse larger objects")
    add(
        "--dry-run",
        action="store_true",
        help="write nothing: list the sources, try a sample, tell size, PSNR and time",
    )
    add(
        "--sample",
        type=_at_least_1,
        default=32,
        metavar="N",
        help="objects that a dry run tries (32)",
    )
    add("--json", action="store_true", help="the summary as JSON")
    _storage_argument(parser)
    parser.set_defaults(run=compress)


def _archive_arguments(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]
) -> None:
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--json", action="store_true")
    _storage_argument(parser)
    parser.set_defaults(run=run, device="cpu")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _archive_arguments(parser, verify)
    add = parser.add_argument
    add(
        "--against",
        action="append",
        default=[],
        metavar="SRC",
        help="prove instead that each object of this source has its row and comes back; name the "
        "sources, and what to include and exclude, as for compress",
    )
    add("--include", action="append", default=[], metavar="GLOB")
    add("--exclude", action="append", default=[], metavar="GLOB")
    add("--device", choices=("auto", "cpu", "cuda"))
    parser.set_defaults(device="auto")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("archive", metavar="ARCHIVE")
    add("--out", metavar="FILE", help="path or URL (default: report.html in the archive)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    _storage_argument(parser)
    parser.set_defaults(run=report)


def _extract_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("archive", metavar="ARCHIVE")
    add("destination", metavar="DST")
    add("keys", nargs="*", metavar="KEY", help="keys or shell patterns; all when none is given")
    add(
        "--format",
        choices=("png", "jpeg", "webp", "source"),
        help="of decoded photos (default png); source: as their sources. Kept sources come out "
        "byte for byte",
    )
    add("--region", type=_region, metavar="X,Y,W,H", help="pixels of each photo to decode")
    add(
        "--max-size",
        type=_at_least_1,
        metavar="N",
        help="shrink photos to N pixels on the longer side",
    )
    add("--workers", type=int, metavar="N", help="Ray workers; 0: none, whatever there is to write")
    add("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, or a local Ray")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    _storage_argument(parser)
    parser.set_defaults(run=extract)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTOS", help="files and folders")
    add("--out", required=True, metavar="WEIGHTS", help="weights file to write")
    add("--init", metavar="WEIGHTS", help="weights to begin with")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, metavar="M")
    length.add_argument("--steps", type=int, metavar="N")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=train)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTOS", help="files and folders")
    add("--weights", metavar="W", help="default: the shipped ones")
    add(
        "--qualities",
        type=_numbers,
        default=[float(quality) for quality in range(5, 100, 10)],
        metavar="Q,Q,...",
        help="default 5,15,...,95",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--json", action="store_true")
    add(
        "--compare",
        nargs="*",
        metavar="NAME",
        help="Pillow's codecs on the same photos (all, or those named, as webp), and BD-rates",
    )
    add(
        "--window",
        type=_span,
        action="append",
        metavar="LOW,HIGH",
        help="dB over which BD-rates are taken; may be repeated (29,36.5 and 36,40)",
    )
    add("--pixels", type=int, metavar="N", help="shrink photos of more to about N pixels first")
    add("--effort", type=int, default=0, metavar="N", help="as for compress")
    add("--plot", metavar="PNG", help="write the curves as a picture")
    parser.set_defaults(run=evaluate)


def _span(text: str) -> tuple[float, float]:
    low, high = _numbers(text)
    if not low < high:
        raise ValueError
    return low, high


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no numbers with commas: {error}") from error
    if not all(0 <= number <= 100 for number in numbers):
        raise argparse.ArgumentTypeError("qualities lie between 0 and 100")
    return numbers


def _storage_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage-options",
        type=_json_object,
        metavar="JSON",
        help='for fsspec: {"endpoint_url": ...}, or by protocol: {"s3": {...}, "https": {...}}',
    )


def _at_least_1(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, not {text!r}")
    return number


def _region(text: str) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            "four numbers with commas are wanted: left, top, width, height"
        ) from error
    return x, y, width, height


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is wanted")
    return value


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise VaestreamError("device cuda: there is no GPU here that torch can use")


def _ready_for_codec(device: str) -> None:
    """For commands that encode or decode photo after photo in this process."""
    from vaestream.pipeline.allocator import keep_freed_memory

    _check_device(device)
    keep_freed_memory()


def _open(args: argparse.Namespace) -> "Archive":
    from vaestream.archive.reader import open_archive
    from vaestream.pipeline.stores import options_for

    options = options_for(args.archive, args.storage_options)
    return open_archive(args.archive, device=args.device, storage_options=options)


class _ProgressLine:
    """One line that changes every second, on a terminal; in a log a line now and then."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._width = 0
        self._last = -math.inf
        self._begin = self._shown_at = time.monotonic()
        self._now: Progress | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        if self._live:
            # A shard may take minutes: the seconds show that the job is alive meanwhile.
            threading.Thread(target=self._tick, daemon=True).start()

    def show(self, now: "Progress") -> None:
        """Tell where the job stands."""
        with self._lock:
            self._now, self._shown_at = now, time.monotonic()
            if self._live:
                self._draw()
            elif (
                time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES
                or now.done_shards == now.shards
            ):
                print(self._text(), file=sys.stderr, flush=True)
                self._last = time.monotonic()

    def end(self) -> None:
        """Leave the terminal's line for good."""
        self._ended.set()
        self.interrupt()

    def interrupt(self) -> None:
        """Leave what is shown and go on below it."""
        with self._lock:
            if self._width:
                print(file=sys.stderr)
                self._width = 0

    def _tick(self) -> None:
        while not self._ended.wait(1.0):
            with self._lock:
                if not self._ended.is_set():
                    self._draw()

    def _draw(self) -> None:
        text = self._text()
        print(f"\r{text:{self._width}s}", end="", file=sys.stderr, flush=True)
        self._width = len(text)

    def _text(self) -> str:
        now, passed = self._now, duration(time.monotonic() - self._begin)
        if now is None:
            return f"{passed}  listing the sources"
        more = "" if now.listed else "+"
        counted = f"{passed}  {now.done_objects}/{now.objects}{more} photos"
        if not now.done_shards:
            return f"{counted}  first of {now.shards}{more} parts under way"
        left = now.remaining_seconds
        if left is None:
            rest = "?"
        elif now.done_shards == now.shards:
            rest = "finishing"
        else:
            rest = f"{duration(max(0.0, left - (time.monotonic() - self._shown_at)))} left"
        stats = now.stats
        ratio = stats.source_bytes / stats.coded_bytes if stats.coded_bytes else 1.0
        return f"{counted}  {now.megapixels_per_second:.1f} MP/s  ratio {ratio:.1f}  {rest}"


class _Warnings(logging.Handler):
    """A line on stderr for each warning."""

    def __init__(self, line: _ProgressLine) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it, below the line of progress."""
        self._line.interrupt()
        print(f"vaestream: warning: {shown(record.getMessage())}", file=sys.stderr, flush=True)


def _told(summary: "Summary", destination: str) -> str:
    lines = []
    if summary.up_to_date:
        lines.append(f"{destination}: nothing to do, all {summary.objects} objects are there")
    lines.append(
        f"{summary.objects} objects: {summary.photos} photos compressed, "
        f"{sum(summary.kept.values())} kept as their source, "
        f"{sum(summary.errors.values())} with errors"
        + (f"; {summary.left_out} left out" if summary.left_out else "")
    )
    if summary.changed:
        lines.append(f"  {summary.changed} had changed since: new rows take the place of theirs")
    if summary.unlisted:
        lines.append(f"  {summary.unlisted} are not in the sources (any more), and stay")
    lines += [f"  kept: {reason}: {count}" for reason, count in summary.kept.items()]
    lines += [f"  error: {reason}: {count}" for reason, count in summary.errors.items()]
    ratio = f", {summary.ratio:.2f} times smaller" if summary.ratio else ""
    lines.append(
        f"{size(summary.source_bytes)} -> {size(summary.archive_bytes)}{ratio} "
        f"(and the model: {size(summary.model_bytes)})"
    )
    if summary.bpp is not None:
        psnr = "" if summary.psnr is None else f", {summary.psnr:.2f} dB PSNR"
        lines.append(f"compressed photos: {summary.bpp:.3f} bits per pixel{psnr}")
    if summary.megapixels_per_second is not None:
        lines.append(
            f"{summary.megapixels:.1f} MP in {duration(summary.seconds)} "
            f"({summary.megapixels_per_second:.2f} MP/s)"
        )
    return "\n".join(lines)


def _row_line(row: "RowInfo") -> str:
    pixels = f"{row.width}x{row.height}" if row.width else "-"
    told = row.reason or ""
    if row.error is not None:
        told = f"error: {row.error}"
    elif row.codec == "vae":
        psnr = "" if row.psnr is None else f"{row.psnr:.2f} dB, "
        told = f"{psnr}quality {row.quality:.0f}"
    return (
        f"{row.codec:6s} {pixels:>11s} {row.num_bytes:>11d} {row.source_size:>11d}  "
        f"{shown(row.key)}  {shown(told)}"
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON has no word for: times as ISO 8601, an infinite PSNR as the text "inf"."""

    def plain(value: Any) -> Any:
        if isinstance(value, datetime):
            return value.isoformat()
        return "inf" if isinstance(value, float) and math.isinf(value) else value

    return {name: plain(value) for name, value in values.items()}


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM raises `_Terminated`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(message: str) -> int:
    print(f"vaestream: error: {shown(message)}", file=sys.stderr)
    return ERROR


def _stopped(args: argparse.Namespace, code: int) -> int:
    more = "; run the same command again to go on" if args.run in (compress, train) else ""
    print(f"vaestream: stopped{more}", file=sys.stderr)
    return code
