"""Part of a picture, or a smaller one, without decoding the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import fill, pixels
from PIL import Image
from without_ray import without_ray

import vaestream
from vaestream import Codec
from vaestream.cli import OK, SOME_FAILED, main
from vaestream.codec import read_header
from vaestream.codec.view import View
from vaestream.errors import BitstreamError

WIDTH, HEIGHT = 1400, 1100


@pytest.fixture(scope="module", params=["colour", "gray", "reduced", "reduced gray"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def picture(kind: str) -> np.ndarray[Any, Any]:
    colour = pixels(3, HEIGHT, WIDTH)
    if "reduced" in kind:
        small = Image.fromarray(colour[: HEIGHT // 4, : WIDTH // 4])
        colour = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(colour[..., 0]) if "gray" in kind else colour


@pytest.fixture(scope="module")
def blob(codec: Codec, kind: str, picture: np.ndarray[Any, Any]) -> bytes:
    (blob,) = codec.encode([picture], 20 if "reduced" in kind else 60)
    assert (read_header(blob).reduction is not None) == ("reduced" in kind)
    return blob


@pytest.fixture(scope="module")
def whole(codec: Codec, blob: bytes) -> np.ndarray[Any, Any]:
    return codec.decode([blob])[0]


@pytest.mark.parametrize(
    "region",
    [
        (0, 0, WIDTH, HEIGHT),
        (0, 0, 1, 1),
        (WIDTH - 1, HEIGHT - 1, 1, 1),
        (500, 505, 30, 20),  # across the corner of four tiles
        (513, 100, 512, 512),
        (1000, 0, 400, HEIGHT),
        (3, 600, 1200, 90),
    ],
)
def test_a_region_is_that_of_the_whole(
    codec: Codec, blob: bytes, whole: np.ndarray[Any, Any], region: tuple[int, int, int, int]
) -> None:
    x, y, width, height = region
    part = codec.decode([blob], region=region)[0]
    expected = whole[y : y + height, x : x + width]
    assert part.shape == expected.shape and part.dtype == np.uint8
    assert np.abs(part.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("region", [(-1, 0, 9, 9), (0, 0, 0, 9), (WIDTH - 8, 0, 9, 9)])
def test_a_region_must_lie_inside(codec: Codec, blob: bytes, region: Any) -> None:
    with pytest.raises(ValueError, match=r"lie inside (a picture of 1400x1100|any picture)"):
        codec.decode([blob], region=region)


@pytest.mark.parametrize("region", [(200, 100, 255, 255), (0, 127, 128, 1)])
def test_narrow_integers_of_numpy_are_numbers_like_others(
    codec: Codec, blob: bytes, region: tuple[int, int, int, int]
) -> None:
    (expected,) = codec.decode([blob], region=region, max_size=100)
    narrow: Any = np.array(region, np.uint8)
    (found,) = codec.decode([blob], region=narrow, max_size=np.uint8(100))  # type: ignore[arg-type]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("max_size", [2000, 1399, 900, 500, 233, 100, 1])
def test_a_smaller_picture_is_the_whole_shrunk(
    codec: Codec, blob: bytes, whole: np.ndarray[Any, Any], max_size: int
) -> None:
    small = codec.decode([blob], max_size=max_size)[0]
    size = (WIDTH, HEIGHT)
    if max_size < WIDTH:
        size = (max_size, max(1, round(HEIGHT * max_size / WIDTH)))
    assert small.shape == (size[1], size[0], *whole.shape[2:])
    expected = np.asarray(Image.fromarray(whole).resize(size, Image.Resampling.LANCZOS))
    error = np.mean((small.astype(float) - expected) ** 2)
    assert error < 255**2 / 10**3.5  # 35 dB: smooth pictures shrink alike


def test_a_region_may_be_shrunk(codec: Codec, blob: bytes, whole: np.ndarray[Any, Any]) -> None:
    small = codec.decode([blob], region=(301, 207, 800, 600), max_size=100)[0]
    part = Image.fromarray(whole[207:807, 301:1101])
    expected = np.asarray(part.resize((100, 75), Image.Resampling.LANCZOS))
    assert small.shape == expected.shape
    assert np.mean((small.astype(float) - expected) ** 2) < 255**2 / 10**3.5


def test_the_two_halves_make_the_whole(
    codec: Codec, blob: bytes, whole: np.ndarray[Any, Any]
) -> None:
    assert np.array_equal(codec.synthesise(codec.decode_latents(blob)), whole)


def test_limits_hold_for_what_is_decoded(codec: Codec, blob: bytes) -> None:
    with pytest.raises(BitstreamError, match="1540000 pixels of a picture of 1400x1100"):
        codec.decode([blob], max_pixels=1_000_000)
    assert codec.decode([blob], region=(0, 0, 100, 100), max_pixels=1_000_000)
    with pytest.raises(ValueError, match="size of 0"):
        codec.decode([blob], max_size=0)


def test_the_synthesis_leaves_work_for_a_good_filter() -> None:
    shrinks = [View.of(4000, 3000, max_size=size).shrink for size in (3000, 2000, 1300, 600, 300)]
    assert shrinks == [1, 1, 2, 4, 8]
    assert View.of(4000, 3000, max_size=300, synthesis=False).shrink == 1


@pytest.fixture(scope="module")
def archive(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> vaestream.Archive:
    """Two photos, one of them kept as its source, and something else."""
    folder = tmp_path_factory.mktemp("view")
    source = fill(folder / "source", ["coded.png"])
    alpha = np.dstack([pixels(5), np.full((72, 96), 255, np.uint8)])
    Image.fromarray(alpha).save(source / "kept.png")
    (source / "notes.txt").write_bytes(b"notes")
    with without_ray():
        vaestream.compress(source, folder / "archive", weights=weights, min_psnr=0.0)
    return vaestream.open(str(folder / "archive"))


def test_an_archive_shows_parts_of_photos_and_of_kept_sources(archive: vaestream.Archive) -> None:
    keys = ["coded.png", "kept.png"]
    assert [archive.row(key).codec for key in keys] == ["vae", "source"]
    parts = archive.read(keys, region=(10, 20, 40, 30))
    for part, whole in zip(parts, archive.read(keys), strict=True):
        assert np.abs(part.astype(int) - whole[20:50, 10:50]).max() <= 1
    assert [one.shape for one in archive.read(keys, max_size=24)] == [(18, 24, 3)] * 2
    with pytest.raises(ValueError, match="96x72"):
        archive.read(keys, region=(90, 0, 10, 10))


def test_extract_writes_them(archive: vaestream.Archive, tmp_path: Path) -> None:
    command = ["extract", archive.url, str(tmp_path / "small"), "--max-size", "24"]
    assert main(command) == OK
    with Image.open(tmp_path / "small" / "coded.png") as image:
        assert image.size == (24, 18)
    assert (tmp_path / "small" / "kept.png").read_bytes() == archive.blob("kept.png")
    assert (tmp_path / "small" / "notes.txt").read_bytes() == b"notes"


def test_extract_tells_which_photo_lacks_the_region(
    archive: vaestream.Archive, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["extract", archive.url, str(tmp_path / "part"), "--region"]
    assert main([*command, "90,0,10,10"]) == SOME_FAILED
    assert "coded.png: region (90, 0, 10, 10)" in capfd.readouterr().err
    assert main([*command, "10,20,40,30"]) == OK
    with Image.open(tmp_path / "part" / "coded.png") as image:
        assert image.size == (40, 30)
