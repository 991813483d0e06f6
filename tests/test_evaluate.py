"""Evaluation measures what is really written and really decoded."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaestream.cli import main
from vaestream.codec import Codec
from vaestream.codec.metrics import psnr
from vaestream.errors import SourceError
from vaestream.training import data
from vaestream.training.bd_rate import bd_rate
from vaestream.training.classical import available
from vaestream.training.evaluate import OURS, evaluate, ms_ssim, plot


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from photos import pixels

    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(pixels(0, 96, 128)).save(folder / "small.png")
    Image.fromarray(pixels(1, 176, 200)).save(folder / "large.png")
    Image.fromarray(pixels(2, 170, 170)).convert("L").save(folder / "gray.png")
    (folder / "notes.txt").write_text("not a photo")
    return folder


def test_every_photo_and_quality_is_measured_on_real_files(
    photos: Path, codec: Codec, weights: Path
) -> None:
    result = evaluate(
        [photos], weights=weights, qualities=[10, 90], device="cpu", precision="float32"
    )
    assert len(result.measurements) == 6 and result.model_id == codec.model_id
    image = np.asarray(Image.open(photos / "large.png"))
    (blob,) = codec.encode([image], 90)
    row = next(m for m in result.measurements if m.photo == "large.png" and m.quality == 90)
    assert row.bpp == len(blob) * 8 / (176 * 200)
    decoded = codec.decode([blob])[0].astype(float)
    # The fixture's codec computes in float32, evaluate in what suits the machine.
    expected = 10 * np.log10(255**2 / np.mean((decoded - image) ** 2))
    assert row.psnr == pytest.approx(expected, abs=0.01)
    low, high = result.curve()
    assert low.bpp < high.bpp and low.psnr < high.psnr
    assert np.isclose(low.bpp, np.mean([m.bpp for m in result.measurements if m.quality == 10]))


def test_ms_ssim_is_that_of_photos_large_enough_for_its_scales(photos: Path, weights: Path) -> None:
    pytest.importorskip("pytorch_msssim")
    result = evaluate([photos], weights=weights, qualities=[10, 90], device="cpu")
    of = {(m.photo, m.quality): m.ms_ssim for m in result.measurements}
    assert of["small.png", 90] is None
    for name in ("large.png", "gray.png"):
        low, high = of[name, 10], of[name, 90]
        assert low is not None and high is not None and 0 < low < high < 1
    assert all(point.ms_ssim is None for point in result.curve())
    image = np.asarray(Image.open(photos / "large.png"))
    assert ms_ssim(image, image) == pytest.approx(1)


def test_classical_codecs_stand_beside(photos: Path, weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    result = evaluate([photos], weights=weights, qualities=[0, 50, 100], beside=available())
    assert result.codecs()[0] == OURS and {"JPEG 4:2:0", "WebP"} <= set(result.codecs())
    for name in result.codecs()[1:]:
        curve = result.curve(name)
        assert curve[0].bpp < curve[-1].bpp and curve[0].psnr < curve[-1].psnr, name
    rates = result.bd_rates([(32.0, 33.0), (10.0, 90.0)])
    assert all(rate[1] is None for rate in rates.values())  # no curve spans 10 to 90 dB
    assert rates["JPEG 4:2:0"][0] is not None
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 500


def test_a_photo_that_another_codec_does_not_take_is_named(tmp_path: Path, weights: Path) -> None:
    Image.new("RGB", (16400, 64)).save(tmp_path / "long.png")
    with pytest.raises(SourceError, match=r"long.png: WebP does not take it"):
        evaluate([tmp_path], weights=weights, qualities=[0], beside=available(["webp"]))


def test_a_photo_beyond_pillows_limit_is_named(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 128 // 2 - 1)
    with pytest.raises(SourceError, match=r"small.png: JPEG 4:2:0 does not take it"):
        evaluate(
            [photos / "small.png"], weights=weights, qualities=[0], beside=available(["jpeg 4"])
        )


def test_large_photos_are_shrunk_on_request(photos: Path, weights: Path) -> None:
    whole = evaluate([photos / "large.png"], weights=weights, qualities=[50])
    shrunk = evaluate([photos / "large.png"], weights=weights, qualities=[50], pixels=9000)
    assert shrunk.measurements[0].bpp != whole.measurements[0].bpp
    small = evaluate([photos / "small.png"], weights=weights, qualities=[50])
    same = evaluate([photos / "small.png"], weights=weights, qualities=[50], pixels=96 * 128)
    assert small.measurements == same.measurements


def test_a_photo_that_comes_back_exactly_leaves_means_finite(tmp_path: Path, weights: Path) -> None:
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "plain.png")
    gray = np.asarray(Image.open(tmp_path / "plain.png"))
    (jpeg,) = available(["jpeg 4"])
    assert np.array_equal(jpeg.decode(jpeg.encode(gray, 97), gray.shape), gray)
    result = evaluate([tmp_path], weights=weights, qualities=[0, 50, 100], beside=[jpeg])
    assert {point.psnr for point in result.curve(jpeg.name)} == {60.0}
    json.loads(result.to_json(), parse_constant=pytest.fail)


def test_what_is_too_large_for_a_photo_is_passed_over(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (photos / "large.png").stat().st_size
    monkeypatch.setattr(data, "_MAX_BYTES", size - 1)
    result = evaluate([photos], weights=weights, qualities=[50])
    assert {one.photo for one in result.measurements} == {"small.png", "gray.png"}


def test_photos_of_one_name_are_told_apart_and_each_counts_once(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes((photos / "small.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    result = evaluate(["b", tmp_path / "a", "b/1.png"], weights=weights, qualities=[50])
    assert sorted(one.photo for one in result.measurements) == ["a/1.png", "b/1.png"]


def test_psnr_of_arrays() -> None:
    a = np.zeros((700, 3, 3), np.uint8)
    assert psnr(a, a) == float("inf")
    assert psnr(a, a + np.uint8(1)) == pytest.approx(20 * np.log10(255))
    with pytest.raises(ValueError, match="shapes"):
        psnr(a, a[:1])


def test_bd_rate() -> None:
    pytest.importorskip("scipy")
    decibels = [28.0, 31.0, 34.0, 37.0]
    bpp = [0.2, 0.4, 0.8, 1.6]
    half = [rate / 2 for rate in bpp]
    assert bd_rate(bpp, decibels, bpp, decibels, (29, 36.5)) == pytest.approx(0)
    assert bd_rate(half, decibels, bpp, decibels, (29, 36.5)) == pytest.approx(-50)
    assert bd_rate(half[::-1], decibels[::-1], bpp, decibels, (29, 36.5)) == pytest.approx(-50)
    assert bd_rate(bpp, decibels, bpp, decibels, (29, 38)) is None
    # A setting that is dearer and worse than another is nobody's choice.
    odd = bd_rate([*half, 0.6], [*decibels, 30.0], bpp, decibels, (29, 36.5))
    assert odd == pytest.approx(-50)


def test_bd_rate_gives_the_figures_known_of_published_curves() -> None:
    pytest.importorskip("scipy")
    path = Path(__file__).parent.parent / "benchmarks" / "kodak_anchors.json"
    curves = json.loads(path.read_text("utf-8"))
    reference = curves["BPG444"]
    for name, known in (("JPEG", 132), ("JPEG2000", 53), ("WebP", 47), ("VTM", -21.7)):
        curve = curves[name]
        rate = bd_rate(curve["bpp"], curve["psnr"], reference["bpp"], reference["psnr"], (29, 36.5))
        assert rate == pytest.approx(known, abs=0.6)


def test_command(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    arguments = ["evaluate", str(photos), "--weights", str(weights), "--qualities", "0,50,100"]
    assert main([*arguments, "--window", "32,33", "--compare", "jpeg 4", "webp"]) == 0
    told = capsys.readouterr().out
    assert "BD-rate of vaestream against" in told and "WebP" in told and "2000" not in told
    assert main([*arguments, "--compare", "nothing"]) == 1
    assert "nothing" in capsys.readouterr().err
    for name in ("curves.foo", "nowhere/curves.png"):
        assert main([*arguments, "--plot", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["measurements"]) == 9 and document["curve"][0]["quality"] == 0
    (tmp_path / "a.txt").write_text("no photo")
    assert main(["evaluate", str(tmp_path), "--weights", str(weights)]) == 1
    assert "no photo" in capsys.readouterr().err
    with pytest.raises(SourceError):
        evaluate([tmp_path], weights=weights)
