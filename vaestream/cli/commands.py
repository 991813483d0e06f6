"""The commands: from parsed arguments to an exit code.

What a command needs is imported when it runs, so that the others start fast and without it.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vaestream.errors import VaestreamError
from vaestream.text import shown, size
from vaestream.urls import public_url

from .exit_codes import ERROR, OK, SOME_FAILED
from .wording import estimate_text, json_values, percent_text, row_text, summary_text, window_text

if TYPE_CHECKING:
    from vaestream.archive.reader import Archive


def compress(args: argparse.Namespace) -> int:
    """`vaestream compress`."""
    if args.dry_run:
        return _estimate(args)

    from vaestream.pipeline.job import compress

    from .progress import ProgressLine, Warnings

    line = ProgressLine()
    warnings = Warnings(line)
    logger = logging.getLogger("vaestream")
    logger.addHandler(warnings)
    try:
        with _no_ray_but_ours():
            summary = compress(
                args.sources,
                args.destination,
                **_settings(args),
                **_job(args),
                workers=args.workers,
                gpus_per_worker=args.gpus_per_worker,
                verify=args.verify,
                address=args.address,
                progress=line.show,
            )
    finally:
        logger.removeHandler(warnings)
        line.end()
    if args.json:
        print(json.dumps(summary.to_json()))
    else:
        print(summary_text(summary, args.destination))
    return SOME_FAILED if summary.errors else OK


@contextmanager
def _no_ray_but_ours() -> Iterator[None]:
    """Threads of a job that is stopped outlive it, and would start Ray anew. Ray reads the variable
    when it is imported; programs that the caller starts later are not to inherit it."""
    alone = "RAY_ENABLE_AUTO_CONNECT" not in os.environ
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        yield
    finally:
        if alone:
            del os.environ["RAY_ENABLE_AUTO_CONNECT"]


def _estimate(args: argparse.Namespace) -> int:
    from vaestream.pipeline.compressor import Settings
    from vaestream.pipeline.estimate import estimate
    from vaestream.pipeline.prepare import prepare

    _ready_for_codec(args.device)
    settings = Settings.of(**_settings(args))
    prepared = prepare(args.sources, args.destination, settings=settings, **_job(args))
    told = estimate(prepared, sample=args.sample, max_object_bytes=args.max_object_bytes)
    print(json.dumps(told.to_json()) if args.json else estimate_text(told))
    return OK


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `Settings.of` and a job take."""
    names = ("quality", "target_bpp", "target_psnr", "min_psnr", "max_pixels", "effort")
    return {name: getattr(args, name) for name in names}


def _job(args: argparse.Namespace) -> dict[str, Any]:
    """What a job takes, whether it is run or estimated."""
    names = ("include", "exclude", "storage_options", "overwrite", "weights", "device")
    more = ("moved", "shard_images", "max_object_bytes")
    return {name: getattr(args, name) for name in (*names, *more)}


def ls(args: argparse.Namespace) -> int:
    """`vaestream ls`: a row a line."""
    for row in _open(args).rows():
        print(json.dumps(json_values(asdict(row))) if args.json else row_text(row))
    return OK


def info(args: argparse.Namespace) -> int:
    """`vaestream info`: what an archive holds, from its manifest alone."""
    archive = _open(args)
    manifest = archive.manifest
    totals = manifest.totals
    archive_bytes = sum(part.size for part in manifest.parts)
    facts: dict[str, Any] = {
        "url": archive.name,
        "rows": manifest.num_rows,
        "photos": totals.photos_vae,
        "kept": totals.reasons,
        "errors": totals.errors,
        "parts": len(manifest.parts),
        "source_bytes": totals.source_bytes,
        "archive_bytes": archive_bytes,
        "ratio": totals.source_bytes / archive_bytes if archive_bytes else None,
        "bpp": totals.bpp,
        "psnr": totals.psnr,
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
    with _no_ray_but_ours():
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
        max_object_bytes=args.max_object_bytes,
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
    where = write_report(_open(args), out=args.out, storage_options=args.storage_options)
    print(public_url(where))
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
    if args.plot is not None:
        _check_plot(args.plot)
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
            print("\nBD-rate of vaestream against" + "".join(window_text(w) for w in windows))
        for name, values in rates.items():
            print(f"{name:28}" + "".join(percent_text(value) for value in values))
        if importlib.util.find_spec("pytorch_msssim") is None:
            print("MS-SSIM needs pytorch-msssim: pip install 'vaestream[evaluate]'")
    if args.plot is not None:
        plot(result, args.plot)
    return OK


def _check_plot(path: str) -> None:
    """Before hours of measuring."""
    folder = os.path.dirname(path) or "."
    if not path.lower().endswith(".png"):
        raise VaestreamError(f"{path}: --plot writes a .png")
    if not os.path.isdir(folder):
        raise VaestreamError(f"{path}: there is no folder {folder}")


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
