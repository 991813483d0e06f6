"""Training learns, survives interruption, and gives weights that code."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from models import lively
from photos import pixels
from PIL import Image

from vaestream.codec import Codec
from vaestream.codec.codec import shipped_weights
from vaestream.codec.coding_costs import CodingCosts
from vaestream.codec.config import ModelConfig
from vaestream.codec.hyperprior import Hyperprior
from vaestream.codec.priors import HyperPrior
from vaestream.codec.rounding import rounding_offsets
from vaestream.codec.weights_file import Weights, export_weights, import_weights
from vaestream.errors import SourceError, WeightsError
from vaestream.training import calibration
from vaestream.training.coded import CodedCrops
from vaestream.training.data import list_photos, load_photos, set_aside, split
from vaestream.training.evaluate import evaluate
from vaestream.training.growth import grown
from vaestream.training.real_coding import RealCoding
from vaestream.training.trainer import ENCODER, TrainingSettings, train

CONFIG = ModelConfig(32, 8, 16, 16, 1, 1, 1, 1, 8, 8, (8, 24), 8, 8, lattice_from=10)
SETTINGS = TrainingSettings(batch=2, crop=64, validation_photos=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(6):
        Image.fromarray(pixels(seed, 96, 128)).save(folder / f"{seed}.png")
    (folder / "notes.txt").write_text("not a photo")
    return folder


@pytest.fixture(autouse=True)
def few_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tables: most of a short run's time goes into coding these."""
    monkeypatch.setattr(calibration, "_CROPS", 8)


def real_coding(weights: Weights) -> RealCoding:
    return RealCoding(weights.y_tables, torch.device("cpu"), weights.model.config.lattice_from)


def test_real_coding_says_what_the_codec_writes() -> None:
    weights = import_weights(shipped_weights())
    coding = real_coding(weights)
    codec = Codec.load(device="cpu", precision="float32")
    with Image.open(min((REPOSITORY / "examples" / "photos").glob("*.jp*g"))) as image:
        pixels = np.asarray(image.convert("RGB"))[:256, :384].copy()
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - 128
    for quality in (20.0, 50.0, 90.0):
        with torch.no_grad():
            output = weights.model(x, torch.tensor([quality]), relax=coding)
        encoded = codec.compress(pixels, quality=quality)
        bits = float(output.y_bits + output.z_bits)
        # Header, checksums and the last words of the streams are some forty bytes.
        assert bits + 320 == pytest.approx(8 * len(encoded.data), rel=0.02)
        error = float((output.x_hat.round().clamp(-128, 127) - x).square().mean())
        assert 10 * math.log10(255**2 / error) == pytest.approx(encoded.psnr, abs=0.05)
        # The very same symbols, on the same lattice.
        decoded = torch.from_numpy(codec.decode([encoded.data])[0])
        difference = output.x_hat[0].permute(1, 2, 0) + 128 - decoded
        assert float(difference.clamp(-1, 1).abs().mean()) < 0.4


def test_real_coding_moves_no_latent_that_stays_zero_anyway() -> None:
    coding = real_coding(import_weights(shipped_weights()))
    y = torch.tensor([[[0.0, 0.1, -0.1, 0.6, -2.3]]], requires_grad=True)
    bits, decoded = coding(y, torch.zeros(1, 1, 5), torch.zeros(1, 1, 5))
    slope, error = (torch.autograd.grad(v.sum(), y)[0].flatten() for v in (bits, decoded))
    assert slope[:3].tolist() == error[:3].tolist() == [0, 0, 0]
    assert slope[3] > 0 > slope[4]
    assert error[3:].tolist() == [1, 1]


def test_what_is_decoded_follows_a_prediction_only_where_the_symbol_stays() -> None:
    coding = real_coding(import_weights(shipped_weights()))
    y = torch.tensor([[[0.0, 0.1, -0.1, 0.6, -2.3]]])
    prediction = torch.zeros(1, 1, 5, requires_grad=True)
    _, symbols = coding(y, prediction, torch.zeros(1, 1, 5))
    (slope,) = torch.autograd.grad((symbols + prediction).sum(), prediction)
    assert slope.flatten().tolist() == [1, 1, 1, 0, 0]


class _Killed(Exception):
    """Stands for a kill in the middle of a run."""


def test_a_run_learns_and_its_weights_code_better(photos: Path, tmp_path: Path) -> None:
    start, end = tmp_path / "start.safetensors", tmp_path / "end.safetensors"
    for out, steps in ((start, 1), (end, 150)):
        train([photos], out=out, steps=steps, config=CONFIG, settings=SETTINGS, log=lambda _: None)
    cost = []
    for weights in (start, end):
        point = evaluate([photos], weights=weights, qualities=[50], device="cpu").curve()[0]
        cost.append(point.bpp + 0.0162 * 255**2 * 10 ** (-point.psnr / 10))
    assert cost[1] < 0.9 * cost[0]
    journal = [json.loads(line) for line in (tmp_path / "end.safetensors.log.jsonl").open()]
    assert journal[0]["step"] == 100 and "validation" in journal[-1]
    assert not (tmp_path / "end.safetensors.checkpoint").exists()


def test_an_interrupted_run_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "w.safetensors"
    monkeypatch.setattr("vaestream.training.trainer._CHECKPOINT_SECONDS", 0.0)

    def kill(step: int) -> None:
        if step == 30:
            raise _Killed

    with pytest.raises(_Killed):
        train(
            [photos],
            out=out,
            steps=60,
            config=CONFIG,
            settings=SETTINGS,
            on_step=kill,
            log=lambda _: None,
        )
    assert not out.exists()
    steps: list[int] = []
    train(
        [photos],
        out=out,
        steps=60,
        config=CONFIG,
        settings=SETTINGS,
        on_step=steps.append,
        log=lambda _: None,
    )
    assert steps[0] == 30 and steps[-1] == 60
    Codec.load(out, device="cpu")


def test_a_run_goes_on_from_no_other_runs_checkpoint(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaestream.training.trainer._CHECKPOINT_SECONDS", 0.0)
    start, out = tmp_path / "start.safetensors", tmp_path / "w.safetensors"

    def kill(step: int) -> None:
        if step == 2:
            raise _Killed

    quiet: dict[str, Any] = {"steps": 3, "log": lambda _: None}
    train([photos], out=start, config=CONFIG, settings=SETTINGS, **quiet)
    with pytest.raises(_Killed):
        train([photos], out=out, config=CONFIG, settings=SETTINGS, on_step=kill, **quiet)
    for init, settings in ((start, SETTINGS), (None, replace(SETTINGS, learning_rate=1e-4))):
        with pytest.raises(WeightsError, match="other weights or with other settings"):
            train([photos], out=out, init=init, config=CONFIG, settings=settings, **quiet)
    train([photos], out=out, config=CONFIG, settings=SETTINGS, **quiet)


def test_parts_may_learn_at_one_rate(photos: Path, tmp_path: Path) -> None:
    # Where shapes coincide: a context of the mean, and a block of the analysis.
    config = replace(CONFIG, mean_context_width=16, mean_context_hidden=16)
    settings = replace(SETTINGS, entropy_rate=1.0, linear=0.5)
    out = tmp_path / "a.safetensors"
    train([photos], out=out, steps=4, config=config, settings=settings, log=lambda _: None)
    assert out.exists()


def test_a_rate_may_stay_constant_to_the_end(photos: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, constant=1.0)
    out = tmp_path / "w.safetensors"
    train([photos], out=out, steps=100, config=CONFIG, settings=settings, log=lambda _: None)
    assert out.exists()


def test_photos_are_set_aside_among_what_is_none(tmp_path: Path) -> None:
    for seed in range(8):
        Image.fromarray(pixels(seed, 96, 128)).save(tmp_path / f"{seed}.jpg")
        (tmp_path / f"{seed}.CR2").write_bytes(b"raw")
    files = list_photos([tmp_path])
    held = set_aside(files, 4, min_side=64)
    assert [file.name for file in held] == ["0.jpg", "2.jpg", "4.jpg", "6.jpg"]
    assert set_aside(files, 4, min_side=100) == []
    # Where all photos come late.
    late = sorted(files, key=lambda file: file.suffix == ".jpg")
    assert [file.name for file in set_aside(late, 6, min_side=64)][:2] == ["0.jpg", "2.jpg"]


def test_few_photos_among_many_files_are_all_learned_from(tmp_path: Path) -> None:
    for seed in range(4):
        Image.fromarray(pixels(seed, 96, 128)).save(tmp_path / f"{seed}.jpg")
        for ending in ("aae", "mov", "xmp", "nef"):
            (tmp_path / f"{seed}.{ending}").write_bytes(b"beside it")
    (tmp_path / ".thumbnails").mkdir()
    Image.fromarray(pixels(9, 96, 128)).save(tmp_path / ".thumbnails" / "a.jpg")
    told: list[str] = []
    settings = replace(SETTINGS, validation_photos=3)
    out = tmp_path / "out" / "w.safetensors"
    train([tmp_path], out=out, steps=1, config=CONFIG, settings=settings, log=told.append)
    assert told[0] == "4 photos to train on, 4 to validate with"


def test_few_large_photos_are_validated_with_alone(tmp_path: Path) -> None:
    """Where many small ones beside them would do for it."""
    for seed in range(8):
        side = 128 if seed % 4 == 0 else 64
        Image.fromarray(pixels(seed, side, side)).save(tmp_path / f"{seed}.png")
    training, middles = split(list_photos([tmp_path]), 2, min_side=128, size=64, max_bytes=1 << 20)
    assert (training.names, len(middles)) == (("0.png", "4.png"), 2)


def test_photos_that_are_too_large_are_told(tmp_path: Path) -> None:
    Image.fromarray(pixels(0, 128, 128)).save(tmp_path / "a.png")
    with pytest.raises(SourceError, match="64 pixels a side, nor one that fits into 1e-06 GB"):
        split(list_photos([tmp_path]), 1, min_side=64, size=64, max_bytes=1000)


def test_photos_are_set_aside_however_few_fit_into_memory() -> None:
    """And each of them is validated, by its middle alone."""
    photos = REPOSITORY / "examples" / "photos"
    files = list_photos([photos])
    training, middles = split(files, 2, min_side=64, size=64, max_bytes=7_000_000)
    assert training.names == ("colosseum.jpg", "ducks-on-its-side.jpg")
    assert [file.name for file in set_aside(files, 2, min_side=64)] == [
        "city-at-night.jpg",
        "otters.jpg",
    ]
    with Image.open(photos / "city-at-night.jpg") as image:
        middle = np.asarray(image.crop((651, 352, 715, 416)))
    assert middles.shape == (2, 3, 64, 64)
    assert np.array_equal(middles[0].permute(1, 2, 0).numpy() + 128, middle)


def test_weights_train_on(photos: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    train([photos], out=first, steps=5, config=CONFIG, settings=SETTINGS, log=lambda _: None)
    train([photos], out=second, init=first, steps=5, settings=SETTINGS, log=lambda _: None)
    assert Codec.load(second, device="cpu").networks.config == CONFIG


def test_training_rounds_as_the_encoder_does() -> None:
    tables = import_weights(shipped_weights()).y_tables
    costs = CodingCosts(tables, torch.device("cpu"))
    offsets = rounding_offsets(tables)
    value = np.arange(-3, 3, 0.0173)
    for index in range(len(tables)):
        magnitude = np.abs(value)
        offset = np.where(magnitude < 1, *offsets[:, index])
        expected = np.copysign(np.floor(magnitude + offset), value)
        found = costs.round(torch.full(value.shape, index), torch.from_numpy(value).float())
        assert np.array_equal(found.numpy(), expected)
        assert not found[magnitude < 0.5].any()


def test_hyper_latents_learn_from_what_they_cost() -> None:
    """The gradient is the slope of the bits of what is rounded, averaged over uniform noise."""
    prior, quality = HyperPrior(1), torch.tensor([50.0])
    with torch.no_grad():
        prior.center.nodes.fill_(0.3)
        prior.log_scale.nodes.fill_(-0.5)
    z = torch.tensor([-2.6, -0.9, 0.1, 0.45, 3.2])[None, None, None].requires_grad_(True)
    bits = prior.rounded_bits(z, quality)
    assert torch.allclose(bits, prior.bits(torch.round(z), quality))
    bits.sum().backward()  # type: ignore[no-untyped-call]
    noise = torch.linspace(-0.5, 0.5, 4001)[:, None, None, None]

    def average(shift: float) -> torch.Tensor:
        return prior.bits(torch.round(z + shift + noise), quality).mean(0)

    with torch.no_grad():
        slope = (average(0.01) - average(-0.01)) / 0.02
    assert z.grad is not None
    assert torch.allclose(z.grad[0], slope, atol=0.05)


LARGER = replace(
    CONFIG, groups=(8, 8, 16), steps=(3, 2, 1), synthesis_blocks8=2, mean_context_hidden=8
)


FILTERED = replace(CONFIG, filter_width=8, filter_blocks=1)


@pytest.mark.parametrize(
    ("old", "config"),
    [
        (CONFIG, LARGER),
        (CONFIG, replace(CONFIG, mean_context_hidden=8)),
        (CONFIG, replace(CONFIG, analysis_blocks8=3)),
        (CONFIG, FILTERED),
        (FILTERED, replace(FILTERED, filter_blocks=2)),
    ],
)
def test_grown_networks_code_the_same_symbols(old: ModelConfig, config: ModelConfig) -> None:
    model = lively(Hyperprior(old)).requires_grad_(False)
    x = torch.from_numpy(pixels(1, 96, 128)).permute(2, 0, 1)[None].float() - 128
    x = torch.nn.functional.pad(x, (0, 0, 0, 32))
    quality = torch.tensor([60.0])
    coding = RealCoding(import_weights(export_weights(model)).y_tables, torch.device("cpu"))
    with torch.no_grad():
        before, after = (m(x, quality, relax=coding) for m in (model, grown(model, config)))
    assert torch.allclose(before.x_hat, after.x_hat, atol=0.01)
    assert float(after.y_bits) == pytest.approx(float(before.y_bits), rel=1e-4)


def test_networks_do_not_shrink() -> None:
    model = Hyperprior(LARGER)
    with pytest.raises(ValueError, match="no place"):
        grown(model, replace(LARGER, mean_context_hidden=0))
    with pytest.raises(ValueError, match="does not fit"):
        grown(model, replace(LARGER, synthesis_blocks8=1))
    with pytest.raises(ValueError, match="does not fit"):
        grown(model, replace(LARGER, width8=32))


def test_a_run_grows_what_it_starts_from(photos: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    train([photos], out=first, steps=5, config=CONFIG, settings=SETTINGS, log=lambda _: None)
    settings = replace(SETTINGS, fixed=("g_a", "g_s", "log_gain"))
    train(
        [photos],
        out=second,
        init=first,
        steps=5,
        config=LARGER,
        settings=settings,
        log=lambda _: None,
    )
    before, after = (import_weights(path.read_bytes()).model for path in (first, second))
    assert after.config == LARGER
    assert torch.equal(before.g_a.stem.weight, after.g_a.stem.weight)
    assert not torch.equal(before.h_a.reduce.weight, after.h_a.reduce.weight)


def test_real_coding_leaves_the_encoder_alone_if_asked(photos: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    train([photos], out=first, steps=5, config=CONFIG, settings=SETTINGS, log=lambda _: None)
    finish = replace(SETTINGS, real=True, fixed=ENCODER)
    with pytest.raises(ValueError, match="weights to start from"):
        train([photos], out=second, steps=5, config=CONFIG, settings=finish)
    with pytest.raises(ValueError, match="no parts of the model: g_x"):
        train([photos], out=second, steps=5, settings=replace(SETTINGS, fixed=("g_a", "g_x")))
    train([photos], out=second, init=first, steps=5, settings=finish, log=lambda _: None)
    before, after = (import_weights(path.read_bytes()).model for path in (first, second))
    changed = {
        name.split(".")[0]
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"g_s", "h_s_mean", "h_s_scale", "z_prior"}


def test_a_decoder_learns_from_coded_crops(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(4):
        Image.fromarray(pixels(seed, 160, 192)).save(photos / f"{seed}.png")
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    train([photos], out=first, steps=100, config=CONFIG, settings=SETTINGS, log=lambda _: None)
    coded = replace(SETTINGS, coded=12, learning_rate=2e-3)
    with pytest.raises(ValueError, match="weights to start from"):
        train([photos], out=second, steps=5, config=CONFIG, settings=coded)
    with pytest.raises(ValueError, match="the decoder alone"):
        train([photos], out=second, init=first, steps=5, config=LARGER, settings=coded)
    config = replace(FILTERED, synthesis_blocks8=2)
    train(
        [photos],
        out=second,
        init=first,
        config=config,
        steps=100,
        settings=coded,
        log=lambda _: None,
    )
    before, after = (
        Codec.load(path, device="cpu", precision="float32") for path in (first, second)
    )
    assert after.networks.config == config
    error = [0.0, 0.0]
    for seed in range(4):
        image = pixels(seed, 160, 192)
        for quality in (20.0, 80.0):
            for i, codec in enumerate((before, after)):
                found = codec.compress(image, quality=quality)
                assert found.psnr is not None
                error[i] += 10 ** (-found.psnr / 10)
            # The same symbols: what comes after the model's name and the sum over it.
            one, other = (c.encode([image], quality=quality)[0] for c in (before, after))
            assert len(one) == len(other) and one[-200:] == other[-200:]
    assert error[1] < 0.98 * error[0]


def test_coded_crops_are_what_the_codec_decodes(photos: Path) -> None:
    codec = Codec(shipped_weights(), torch.device("cpu"), torch.float32)
    training = load_photos(sorted(photos.glob("*.png")), min_side=64, max_bytes=1 << 30)
    crops = CodedCrops.of(codec.encoder, training, 3, 64, np.random.default_rng(0))
    model = import_weights(shipped_weights()).model
    for i, quality in enumerate(crops.quality.tolist()):
        y_hat = torch.from_numpy(crops.latents[i]).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            x_hat = model.synthesise(y_hat, torch.tensor([quality]))[0].permute(1, 2, 0) + 128
        (decoded,) = codec.decode(codec.encode([crops.pixels[i]], quality=round(quality, 2)))
        off = (x_hat.clamp(0, 255) - torch.from_numpy(decoded)).abs()
        assert float(off.max()) < 0.7  # half a level of rounding, and that of latents to float16


def test_unusable_input_is_named(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    with pytest.raises(SourceError, match="nowhere"):
        train([tmp_path / "nowhere"], out=out, steps=1, log=lambda _: None)
    with pytest.raises(SourceError, match="no photo"):
        train([photos / "notes.txt"], out=out, steps=1, log=lambda _: None)
    with pytest.raises(ValueError, match="minutes or steps"):
        train([photos], out=out, log=lambda _: None)
    with pytest.raises(WeightsError, match="is a folder"):
        train([photos], out=tmp_path, steps=1, log=lambda _: None)
    for name, wrong in (("crop", 96), ("crop", 0), ("batch", 0), ("validation_photos", 0)):
        changed: dict[str, Any] = {name: wrong}
        with pytest.raises(ValueError, match=name):
            replace(SETTINGS, **changed)
    (tmp_path / "w.safetensors.checkpoint").write_bytes(b"torn")
    with pytest.raises(WeightsError, match="checkpoint"):
        train([photos], out=out, steps=1, config=CONFIG, settings=SETTINGS, log=lambda _: None)
