"""Bitstreams through Pillow, as any other format."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from photos import fill, pixels
from PIL import Image, UnidentifiedImageError

import vaestream
from vaestream import Codec
from vaestream.connectors import pillow


@pytest.fixture(scope="module", autouse=True)
def small_model(weights: Path) -> None:
    pillow.add_model(weights)


@pytest.fixture(scope="module", params=["RGB", "L"])
def blob(request: pytest.FixtureRequest, codec: Codec) -> bytes:
    photo = pixels(1, 300, 400)
    return codec.encode([photo if request.param == "RGB" else np.ascontiguousarray(photo[..., 0])])[
        0
    ]


def test_a_file_opens_without_a_model_and_decodes_when_asked(
    weights: Path, blob: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.vst"
    path.write_bytes(blob)
    with monkeypatch.context() as patch:
        patch.setattr(pillow, "_codec_for", lambda model: pytest.fail("decoded too early"))
        image = Image.open(path)
        assert (image.format, image.size) == ("VAESTREAM", (400, 300))
        assert image.get_format_mimetype() == "image/x-vaestream"
    (expected,) = Codec.load(weights).decode([blob])  # in the precision that `add_model` takes
    assert image.mode == ("L" if expected.ndim == 2 else "RGB")
    assert np.array_equal(np.asarray(image), expected)
    assert np.array_equal(np.asarray(image.crop((10, 20, 50, 60))), expected[20:60, 10:50])


def test_streams_stay_open_and_files_do_not(blob: bytes, tmp_path: Path) -> None:
    stream = io.BytesIO(blob)
    Image.open(stream).load()
    assert not stream.closed
    path = tmp_path / "photo.vst"
    path.write_bytes(blob)
    with Image.open(path) as image:
        image.load()
        assert image.fp is None
        image.load()  # again costs nothing


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))])
def test_a_copy_of_a_picture_has_its_pixels(
    blob: bytes, again: Callable[[Image.Image], Image.Image], loaded: bool
) -> None:
    image = Image.open(io.BytesIO(blob))
    if loaded:
        image.load()
    copied = again(image)
    assert np.array_equal(np.asarray(copied), np.asarray(image))
    assert copied.resize((5, 5)).size == (5, 5)


def test_a_thumbnail_is_that_of_the_decoded_picture(codec: Codec, blob: bytes) -> None:
    image = Image.open(io.BytesIO(blob))
    image.thumbnail((40, 40))
    whole = Image.fromarray(codec.decode([blob])[0])
    whole.thumbnail((40, 40), reducing_gap=None)
    assert image.size == whole.size == (40, 30)
    error = np.mean((np.asarray(image, float) - np.asarray(whole, float)) ** 2)
    assert error < 255**2 / 10**3.5  # 35 dB


def test_a_draft_is_never_below_what_is_asked_for(blob: bytes) -> None:
    image = Image.open(io.BytesIO(blob))
    assert image.draft(None, (100, 60)) is not None
    assert image.size == (100, 75)
    assert np.asarray(image).shape[:2] == (75, 100)
    image = Image.open(io.BytesIO(blob))
    assert image.draft(None, (390, 60)) is None
    assert image.size == (400, 300)
    image.load()
    assert image.draft(None, (10, 10)) is None


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_is_saved_opens(mode: str, tmp_path: Path) -> None:
    photo = Image.fromarray(pixels(2)).convert(mode)
    photo.save(tmp_path / "photo.vst", quality=90)
    with Image.open(tmp_path / "photo.vst") as image:
        assert (image.mode, image.size, image.info["quality"]) == (mode, photo.size, 90)
        image.save(tmp_path / "again.vst")
        error = np.mean((np.asarray(image, float) - np.asarray(photo, float)) ** 2)
        image.info.clear()
        image.save(tmp_path / "bare.vst")
    assert error < 255**2 / 10**3.2
    assert Image.open(tmp_path / "again.vst").info["quality"] == 90
    assert Image.open(tmp_path / "bare.vst").info["quality"] == 50
    photo.save(tmp_path / "default.vst")
    assert Image.open(tmp_path / "default.vst").info["quality"] == 50
    file = io.BytesIO()
    photo.save(file, "VAESTREAM", target_bpp=2.0)
    assert len(file.getvalue()) * 8 <= 2.0 * photo.width * photo.height
    with pytest.raises(OSError, match="mode RGBA"):
        photo.convert("RGBA").save(tmp_path / "alpha.vst")


def test_damage_and_a_missing_model_are_told(
    blob: bytes, codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cut.vst"
    path.write_bytes(blob[:-9])
    image = Image.open(path)
    with pytest.raises(OSError, match=r"cut\.vst: CRC mismatch"):
        image.load()
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(blob[:7]))
    monkeypatch.setattr(pillow, "_added", dict)
    with pytest.raises(OSError, match=f"written with model {codec.model_id[:16]}"):
        Image.open(io.BytesIO(blob)).load()


def test_hugging_face_datasets_decode_an_archive(
    local_ray: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = fill(tmp_path / "source", ["a.png", "b.png"])
    vaestream.compress(source, tmp_path / "archive", weights=weights, min_psnr=0.0)
    archive = vaestream.open(str(tmp_path / "archive"))
    pillow.add_model(archive)
    parts = str(tmp_path / "archive" / "part-*.parquet")
    for streaming in (False, True):
        data = datasets.load_dataset(
            "parquet",
            data_files=parts,
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
        )
        rows = list(data)
        assert [row["key"] for row in rows] == ["a.png", "b.png"]
        for row, expected in zip(rows, archive.read(["a.png", "b.png"]), strict=True):
            assert np.array_equal(np.asarray(row["image"]), expected)
