"""The command line: what it says, what it leaves behind, and how it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_samples import commit, photo_rows, pixels, row, stand_in
from archive_samples import png as plain_png
from photos import fill, png
from photos import pixels as noise
from PIL import Image
from without_ray import without_ray

from vaestream import cli
from vaestream.archive.manifest import PartStats
from vaestream.cli.progress import ProgressLine
from vaestream.errors import ArchiveError
from vaestream.pipeline.job import Progress
from vaestream.training import calibration

__all__ = ["stand_in"]


@pytest.fixture
def small(weights: Path) -> Callable[..., int]:
    """`vaestream compress` with the small model."""

    def run(*arguments: object) -> int:
        options = ["--weights", str(weights), "--min-psnr", "0", "--shard-images", "2"]
        return cli.main(["compress", *map(str, arguments), *options])

    return run


@pytest.fixture
def compress(local_ray: Path, small: Callable[..., int]) -> Callable[..., int]:
    """`small` on the tests' Ray."""
    return small


@pytest.fixture
def compress_here(small: Callable[..., int]) -> Callable[..., int]:
    """`small` in this process."""
    return without_ray()(small)


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        "compress --workers 0",
        "compress --shard-images x",
        "compress --effort -1",
        "compress --max-pixels 0",
        "extract --workers -1",
        "extract --region 1,2,3",
        "extract --region 0,0,0,9",
        "extract --region 1,-2,3,4",
        "evaluate --effort -1",
        "evaluate --pixels 0",
        "evaluate --qualities 50,101",
        "evaluate --window 30",
        "evaluate --window 40,30",
        "evaluate --window 29,inf",
        "train --steps 0",
        "train --minutes -5",
        "train --minutes nan",
    ],
)
def test_a_value_that_cannot_be_is_wrong_usage(
    tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, option, value = wrong.split()
    out = str(tmp_path / "out")
    names = {"train": [str(tmp_path), "--out", out], "evaluate": [str(tmp_path)]}
    arguments = [command, *names.get(command, [str(tmp_path), out]), option, value]
    assert cli.main(arguments) == cli.USAGE
    told = capsys.readouterr().err
    assert option in told and ("wanted" in told or "between" in told)
    assert not any(tmp_path.iterdir())


def test_from_photos_to_an_archive_and_back(
    compress: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = fill(tmp_path / "photos", ["a.png", "sub/b.png", "sub/c.png"])
    (source / "notes.txt").write_bytes(b"kept")
    os.utime(source / "a.png", (1_500_000_000, 1_500_000_000))
    archive, out = str(tmp_path / "archive"), tmp_path / "out"

    assert compress(source, archive, "--verify", "all", "--json") == cli.OK
    told = capfd.readouterr()
    summary = json.loads(told.out)
    assert (summary["objects"], summary["photos"], summary["errors"]) == (4, 3, {})
    assert "4/4 photos" in told.err

    assert compress(source, archive) == cli.OK
    assert "nothing to do" in capfd.readouterr().out

    assert cli.main(["ls", archive, "--json"]) == cli.OK
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [one["key"] for one in rows] == ["a.png", "notes.txt", "sub/b.png", "sub/c.png"]
    assert [one["codec"] for one in rows] == ["vae", "source", "vae", "vae"]

    assert cli.main(["info", archive, "--json"]) == cli.OK
    facts = json.loads(capfd.readouterr().out)
    assert (facts["rows"], facts["photos"], facts["errors"]) == (4, 3, 0)
    assert facts["settings"]["quality"] == 50.0
    for command in ("ls", "info"):
        assert cli.main([command, archive]) == cli.OK
        assert "notes.txt" in (text := capfd.readouterr().out) or "not a format" in text

    assert cli.main(["verify", archive, "--json"]) == cli.OK
    assert json.loads(capfd.readouterr().out) == {"problems": []}

    assert cli.main(["extract", archive, str(out)]) == cli.OK
    assert (out / "notes.txt").read_bytes() == b"kept"
    with Image.open(out / "a.png") as image:
        assert image.size == (96, 72)
    assert (out / "a.png").stat().st_mtime == 1_500_000_000
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_a_terminal_shows_life_before_the_first_part_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = ProgressLine()
    try:
        line._draw()
        stats = PartStats(source_bytes=300, coded_bytes=100, vae_pixels=9_000_000)
        line.show(Progress(4, 1, False, 0, 0, 0.0, PartStats(), 1.0))
        line.show(Progress(8, 2, True, 4, 1, 0.5, stats, 90.0))
        line.show(Progress(8, 2, True, 8, 2, 1.0, stats, 180.0))
    finally:
        line.end()
    told = capsys.readouterr().err
    assert told.endswith("\n")
    shown = [one.strip() for one in told.split("\r")]
    assert any("listing the sources" in one for one in shown)
    assert any("0/4+ photos  first of 1+ parts under way" in one for one in shown)
    assert any("4/8 photos  0.1 MP/s  ratio 3.0  1:30 left" in one for one in shown)
    assert any("8/8 photos" in one and one.endswith("finishing") for one in shown)


def test_rows_with_errors_have_an_exit_code_of_their_own(
    compress_here: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = fill(tmp_path / "photos", ["a.png"])
    broken = png(3)[:1500]
    (source / "broken.png").write_bytes(broken)
    archive = tmp_path / "archive"
    for _ in range(2):  # the second time there is nothing to do, and the errors are still there
        assert compress_here(source, archive) == cli.SOME_FAILED
        assert "1 with errors" in capfd.readouterr().out
    assert cli.main(["extract", str(archive), str(tmp_path / "out")]) == cli.OK
    assert (tmp_path / "out" / "broken.png").read_bytes() == broken


def test_train_and_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # For the tables: coding 64 takes most of the test's time.
    monkeypatch.setattr(calibration, "_CROPS", 4)
    photos, out = tmp_path / "photos", tmp_path / "new.safetensors"
    photos.mkdir()
    for seed in range(2):
        Image.fromarray(noise(seed, 256, 256)).save(photos / f"{seed}.png")
    assert cli.main(["train", str(photos), "--out", str(out), "--steps", "1"]) == cli.OK
    assert capfd.readouterr().out.splitlines()[-1] == str(out)
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.png"
    arguments = ["--weights", str(out), "--qualities", "20,80", "--json", "--plot", str(plot)]
    assert cli.main(["evaluate", str(photos), *arguments]) == cli.OK
    curve = json.loads(capfd.readouterr().out)["curve"]
    assert [point["quality"] for point in curve] == [20, 80]
    with Image.open(plot) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "/no/such/photos", "/tmp/vaestream-nowhere"], "/no/such/photos"),
        (["compress", ".", "memory://archive"], "belongs to one process"),
        (["ls", "/no/such/archive"], "/no/such/archive"),
        (["verify", "/no/such/archive"], "/no/such/archive"),
        (["evaluate", "/no/such/photos"], "/no/such/photos"),
        (["train", "/no/such/photos", "--out", "/tmp/x", "--steps", "1"], "/no/such/photos"),
    ],
)
def test_an_error_is_one_line_that_names_what_is_wrong(
    arguments: list[str], message: str, weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] in ("compress", "evaluate"):
        arguments = [*arguments, "--weights", str(weights)]
    assert cli.main(arguments) == cli.ERROR
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vaestream: error: ") and message in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["compress", "only-one"],
        ["compress", "a", "b", "--quality", "5", "--target-bpp", "1"],
        ["compress", "a", "b", "--storage-options", "[1]"],
        ["extract", "a", "b", "--format", "gif"],
        ["train", "a", "--out", "w"],
        ["evaluate", "a", "--qualities", "5,x"],
        ["evaluate", "a", "--qualities", "5,101"],
    ],
)
def test_wrong_usage_is_told(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == cli.USAGE
    assert "usage: vaestream" in capfd.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from vaestream.cli import main
assert main(["--help"]) == 0 and main(["compress", "--help"]) == 0 and main(["--version"]) == 0
print([name for name in ("torch", "ray", "pyarrow", "PIL", "numpy") if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"


def test_reading_and_coding_need_no_ray() -> None:
    code = """
import sys
sys.modules["ray"] = None  # as if it were not installed
import vaestream
vaestream.Codec, vaestream.open, vaestream.Archive
from vaestream.pipeline.extract import extract
print("fine")
"""
    assert python(code) == "fine\n"


@pytest.mark.usefixtures("stand_in")
def test_extracted_names_and_formats(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    archive = str(tmp_path / "archive")
    array = pixels(1)
    coded: dict[str, Any] = {"codec": "vae", "width": 13, "height": 9, "channels": 3}
    exif = Image.Exif()
    exif[0x010E] = "a title"
    rows = [
        row("a.jpg", plain_png(array), **coded, source_format="JPEG", exif=exif.tobytes()),
        row("a.tif", plain_png(array), **coded, source_format="TIFF", icc=b"profile"),
        row("b.v2", plain_png(array), **coded, source_format="WEBP"),
        row("c.JPG", plain_png(array), **coded, source_format="JPEG"),
        row("d.gif", b"GIF bytes", reason="animation"),
        row("e.jpg", b"cut", error="truncated", source_size=3),
    ]
    commit(archive, {"one": rows})

    def extracted(*options: str) -> dict[str, str]:
        out = tmp_path / f"out{options}"
        assert cli.main(["extract", archive, str(out), *options]) == cli.OK
        names = sorted(path.name for path in out.iterdir())
        assert (out / "d.gif").read_bytes() == b"GIF bytes"
        assert (out / "e.jpg").read_bytes() == b"cut"
        return {
            name: Image.open(out / name).format or ""
            for name in names
            if name not in ("d.gif", "e.jpg")
        }

    png_names = dict.fromkeys(("a.jpg.png", "a.tif.png", "b.png", "c.png"), "PNG")
    assert extracted() == png_names
    assert extracted("--format", "png") == png_names
    assert extracted("--format", "jpeg") == dict.fromkeys(
        ("a.jpg", "a.tif.jpg", "b.jpg", "c.JPG"), "JPEG"
    )
    assert extracted("--format", "source") == {
        "a.jpg": "JPEG",
        "a.tif.png": "PNG",
        "b.webp": "WEBP",
        "c.JPG": "JPEG",
    }
    out = tmp_path / "out()"
    with Image.open(out / "a.jpg.png") as image:
        assert image.getexif()[0x010E] == "a title"
        assert np.array_equal(np.asarray(image), array)
    with Image.open(out / "a.tif.png") as image:
        assert image.info["icc_profile"] == b"profile"


@pytest.mark.usefixtures("stand_in")
def test_extract_takes_keys_and_patterns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    archive, out = str(tmp_path / "archive"), tmp_path / "out"
    commit(archive, {"one": list(photo_rows(12))})
    keys = ["2019/IMG_00003.jpg", "*1?.jpg"]
    assert cli.main(["extract", archive, str(out), *keys]) == cli.OK
    assert sorted(path.stem for path in out.rglob("*.png")) == [
        "IMG_00003",
        "IMG_00010",
        "IMG_00011",
    ]
    assert cli.main(["extract", archive, str(out), "2019/IMG_9.jpg"]) == cli.ERROR
    assert "2019/IMG_9.jpg" in capfd.readouterr().err


@pytest.mark.usefixtures("stand_in")
def test_nothing_is_extracted_outside_the_destination(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, out = str(tmp_path / "archive"), tmp_path / "deep" / "out"
    outside = tmp_path / "outside"
    outside.mkdir()
    out.mkdir(parents=True)
    (out / "link").symlink_to(outside)
    keys = ["../../up", "/etc/vaestream", "fine", "fine/below", "link/through", "x/../../y"]
    commit(archive, {"one": [row(key, key.encode()) for key in sorted(keys)]})
    assert cli.main(["extract", archive, str(out)]) == cli.SOME_FAILED
    told = capfd.readouterr().err
    assert "link/through: " in told and "leads out" in told
    assert "fine/below: " in told
    assert not list(outside.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "deep", "outside"}
    assert (out / "%2E%2E" / "%2E%2E" / "up").read_bytes() == b"../../up"
    assert (out / "%2F" / "etc" / "vaestream").read_bytes() == b"/etc/vaestream"
    assert (out / "fine").read_bytes() == b"fine"


@pytest.mark.usefixtures("stand_in")
def test_damage_is_an_error_for_verify_and_costs_extract_one_photo(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    commit(str(archive), {"one": [row(key, key.encode() * 99) for key in ("a", "b", "c")]})
    part = next(archive.glob("part-*"))
    data = bytearray(part.read_bytes())
    data[data.index(b"bbbbbbbb")] ^= 1
    part.write_bytes(data)
    assert cli.main(["verify", str(archive), "--json"]) == cli.ERROR
    (problem,) = json.loads(capfd.readouterr().out)["problems"]
    assert (problem["row_key"], problem["what"]) == ("b", "photo")
    assert cli.main(["extract", str(archive), str(out)]) == cli.SOME_FAILED
    assert sorted(path.name for path in out.iterdir()) == ["a", "c"]
    assert "vaestream: b: " in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_job_says_how_to_go_on(
    number: signal.Signals, code: int, local_ray: Path, weights: Path, tmp_path: Path
) -> None:
    import ray

    source = fill(tmp_path / "photos", ["a.png"])
    (source / "b.png").write_bytes(png(6, "WAIT HERE"))
    address = ray.get_runtime_context().gcs_address
    command = ["compress", str(source), str(tmp_path / "archive"), "--address", address]
    options = ["--weights", str(weights), "--shard-images", "1", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vaestream", *command, *options], stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 180  # a busy machine takes long to start a job, and to end it
        while not list(local_ray.glob("waiting-*")):
            assert time.monotonic() < end, "the job has not begun"
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=180)
    finally:
        process.kill()
        (local_ray / "go").touch()
    for mark in local_ray.glob("waiting-*"):
        end = time.monotonic() + 60
        while Path(f"/proc/{mark.name.removeprefix('waiting-')}").exists():
            assert time.monotonic() < end, "the worker is still there"
            time.sleep(0.05)
        mark.unlink()
    (local_ray / "go").unlink()
    assert process.returncode == code
    assert told.splitlines()[-1] == "vaestream: stopped; run the same command again to go on"
    assert not (tmp_path / "archive" / "manifest.json").exists()


@pytest.mark.usefixtures("stand_in")
def test_names_of_any_length_and_with_any_character(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, out = str(tmp_path / "archive"), tmp_path / "out"
    keys = ["two\nlines", "red\x1b[31m", "é" * 120 + ".jpg"]
    commit(archive, {"one": [row(key, key.encode()) for key in sorted(keys)]})
    assert cli.main(["ls", archive]) == cli.OK
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and not any("\x1b" in line for line in lines)
    assert "  red\\x1b[31m  " in lines[0] and "  two\\nlines  " in lines[1]
    assert cli.main(["extract", archive, str(out)]) == cli.OK
    assert sorted(path.name for path in out.iterdir()) == sorted(keys)


@pytest.mark.usefixtures("stand_in")
def test_extract_ends_where_no_file_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, out = str(tmp_path / "archive"), tmp_path / "out"
    commit(archive, {"one": [row(key, b"data") for key in ("a", "b", "c")]})
    written: list[str] = []

    def put_bytes(fs: Any, path: str, data: bytes) -> None:
        written.append(path)
        raise ArchiveError(f"{path}: cannot be written") from OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("vaestream.pipeline.extract.put_bytes", put_bytes)
        assert cli.main(["extract", archive, str(out)]) == cli.ERROR
    assert len(written) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "out/a: cannot be written" in line

    (tmp_path / "file").write_bytes(b"")
    assert cli.main(["extract", archive, str(tmp_path / "file")]) == cli.ERROR
    (line,) = capfd.readouterr().err.splitlines()
    assert "/file: cannot be written" in line
