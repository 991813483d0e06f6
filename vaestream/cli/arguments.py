"""The arguments of every command."""

import argparse
from collections.abc import Callable, Sequence

from vaestream import __version__

from .commands import compress, evaluate, extract, info, ls, report, train, verify
from .values import at_least_0, at_least_1, json_object, more_than_0, qualities, region, window


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the command to run as `run`; wrong usage ends the process."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is verify and not args.against and (args.include or args.exclude):
        parser.error("--include and --exclude say what --against takes")
    return args


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
        help="file, folder (recursive), glob or fsspec URL; a tar, zip or Parquet file of pictures "
        "that is named or matched stands for what it holds, a list of URLs where only lists are "
        "named",
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
        type=at_least_0,
        default=0,
        metavar="N",
        help="gradient steps on each photo: smaller, and slower; 2 or 8, say (0)",
    )
    _device_argument(parser)
    add("--workers", type=at_least_1, metavar="N", help="default: one a CPU, or four a GPU")
    add("--gpus-per-worker", type=float, metavar="F", help="share of a GPU (default 0.25)")
    add(
        "--shard-images",
        type=at_least_1,
        default=256,
        metavar="N",
        help="objects a part at most (256)",
    )
    add(
        "--verify",
        choices=("none", "sample", "all"),
        default="sample",
        help="bitstreams that are decoded again before they are written (sample: one in 16)",
    )
    add("--include", action="append", default=[], metavar="GLOB", help="take only these")
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave these out")
    add("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, or a local Ray")
    add(
        "--overwrite",
        action="store_true",
        help="make the archive anew, of these sources alone: rows of other objects are lost",
    )
    add(
        "--moved",
        action="store_true",
        help="the sources have moved: what has changed, too, is still the same object",
    )
    add(
        "--weights",
        metavar="W",
        help="model, a path or URL (the archive's own, else the shipped one)",
    )
    add(
        "--max-pixels",
        type=at_least_1,
        default=256_000_000,
        metavar="N",
        help="keep the source of larger pictures (256000000)",
    )
    _largest_object_argument(parser)
    add(
        "--dry-run",
        action="store_true",
        help="write nothing: list the sources, try a sample, tell size, PSNR and time",
    )
    add(
        "--sample",
        type=at_least_1,
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
        "sources, what to include and exclude, and --max-object-bytes as for compress",
    )
    add("--include", action="append", default=[], metavar="GLOB")
    add("--exclude", action="append", default=[], metavar="GLOB")
    _largest_object_argument(parser)
    _device_argument(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("archive", metavar="ARCHIVE")
    add("--out", metavar="FILE", help="path or URL (default: report.html in the archive)")
    _device_argument(parser)
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
    add(
        "--region", type=region, metavar="X,Y,W,H", help="pixels of each compressed photo to decode"
    )
    add(
        "--max-size",
        type=at_least_1,
        metavar="N",
        help="shrink compressed photos to N pixels on the longer side",
    )
    add(
        "--workers",
        type=at_least_0,
        metavar="N",
        help="Ray workers; 0: none, whatever there is to write",
    )
    add("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, or a local Ray")
    _device_argument(parser)
    _storage_argument(parser)
    parser.set_defaults(run=extract)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTOS", help="files and folders")
    add("--out", required=True, metavar="WEIGHTS", help="weights file to write")
    add("--init", metavar="WEIGHTS", help="weights to begin with")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=more_than_0, metavar="M")
    length.add_argument("--steps", type=at_least_1, metavar="N")
    _device_argument(parser)
    parser.set_defaults(run=train)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTOS", help="files and folders")
    add("--weights", metavar="W", help="default: the shipped ones")
    add(
        "--qualities",
        type=qualities,
        default=[float(quality) for quality in range(5, 100, 10)],
        metavar="Q,Q,...",
        help="default 5,15,...,95",
    )
    _device_argument(parser)
    add("--json", action="store_true")
    add(
        "--compare",
        nargs="*",
        metavar="NAME",
        help="Pillow's codecs on the same photos (all, or those named, as webp), and BD-rates",
    )
    add(
        "--window",
        type=window,
        action="append",
        metavar="LOW,HIGH",
        help="dB over which BD-rates are taken; may be repeated (29,36.5 and 36,40)",
    )
    add(
        "--pixels",
        type=at_least_1,
        metavar="N",
        help="shrink photos of more to about N pixels first",
    )
    add("--effort", type=at_least_0, default=0, metavar="N", help="as for compress")
    add("--plot", metavar="PNG", help="write the curves as a picture")
    parser.set_defaults(run=evaluate)


def _device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _largest_object_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-object-bytes",
        type=at_least_1,
        default=1 << 30,
        metavar="N",
        help="larger objects get an error row, without their bytes (1073741824)",
    )


def _storage_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage-options",
        type=json_object,
        metavar="JSON",
        help='for fsspec: {"endpoint_url": ...}, or by protocol: {"s3": {...}, "https": {...}}',
    )
