"""What a user of the codec relies on."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load, save

from vaestream.codec import Codec, Encoded, check, read_header
from vaestream.codec.bitstream import pack, unpack
from vaestream.codec.codec import shipped_weights
from vaestream.codec.config import quality_to_lambda
from vaestream.codec.convolution import _works
from vaestream.codec.entropy import write_varint
from vaestream.codec.exact import ExactScaleBranch
from vaestream.codec.hardware import multiplies_int8
from vaestream.codec.rate_control import sample_patches, solve_quality
from vaestream.codec.weights_file import export_weights, import_weights
from vaestream.errors import BitstreamError, ModelMismatchError, VaestreamError, WeightsError

GOLDEN = Path(__file__).parent / "golden"


def photo_like(height: int, width: int, seed: int = 0, channels: int = 3) -> NDArray[np.uint8]:
    """Smooth shapes with some texture, (height, width[, 3]) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / rng.uniform(5, 60) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(5, 60))
        for _ in range(channels)
    ]
    picture = 128 + 70 * np.stack(waves, axis=2) + rng.normal(0, 4, (height, width, channels))
    pixels = picture.clip(0, 255).astype(np.uint8)
    return pixels if channels == 3 else pixels[:, :, 0]


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


@pytest.mark.parametrize(
    "shape", [(1, 1, 3), (1, 1), (5, 300, 3), (64, 64), (100, 75, 3), (513, 700, 3), (600, 40)]
)
def test_every_size_comes_back_in_its_shape(codec: Codec, shape: tuple[int, ...]) -> None:
    image = photo_like(shape[0], shape[1], channels=3 if len(shape) == 3 else 1)
    (decoded,) = codec.decode(codec.encode([image], 90))
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert psnr(image, decoded) > 25


def test_the_measured_psnr_is_that_of_the_decoded_picture(codec: Codec) -> None:
    image = photo_like(200, 333)
    encoded = codec.compress(image, quality=60)
    assert encoded.psnr == pytest.approx(psnr(image, codec.decode([encoded.data])[0]), abs=1e-6)


def test_rate_and_psnr_rise_with_quality(codec: Codec) -> None:
    image = photo_like(256, 256)
    made = [codec.compress(image, quality=q) for q in (0, 20, 40, 60, 80, 100)]
    sizes = [len(e.data) for e in made]
    assert sizes == sorted(sizes)
    assert [e.psnr for e in made] == sorted(e.psnr or 0 for e in made)


def test_a_bitstream_does_not_depend_on_its_neighbours(codec: Codec) -> None:
    images = [photo_like(97, 120, 1), photo_like(64, 64, 2), photo_like(300, 150, 3, channels=1)]
    alone = [codec.encode([i], 70)[0] for i in images]
    assert codec.encode(images, 70) == alone
    assert codec.encode(images[::-1], 70) == alone[::-1]
    together = codec.decode(alone)
    for blob, picture in zip(alone, together, strict=True):
        assert np.array_equal(codec.decode([blob])[0], picture)


def test_symbols_far_outside_the_tables_survive(codec: Codec) -> None:
    """A checkerboard of extremes at the highest quality: an untrained model predicts none of it."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[::2, ::2] = 255
    image[16:32] = 255
    encoded = codec.compress(image, quality=100)
    assert encoded.psnr == pytest.approx(psnr(image, codec.decode([encoded.data])[0]), abs=1e-6)


@pytest.mark.parametrize("quality", [10.0, 50.0, 90.0])
def test_precisions_decode_within_two_levels(quality: float) -> None:
    with Image.open(REPOSITORY / "examples" / "photos" / "otters.jpg") as photo:
        image = np.asarray(photo.convert("RGB"))[:256, :384].copy()
    single, half = (Codec.load(device="cpu", precision=p) for p in ("float32", "bfloat16"))
    blobs = single.encode([image], quality)
    one, other = (codec.decode(blobs)[0].astype(int) for codec in (single, half))
    assert np.abs(one - other).max() <= 2


@pytest.mark.parametrize("quality", [10.0, 50.0, 90.0])
def test_effort_pays_at_every_quality(quality: float) -> None:
    """With the shipped weights, whose contexts feed back."""
    shipped = Codec.load(device="cpu")
    with Image.open(REPOSITORY / "examples" / "photos" / "otters.jpg") as photo:
        image = np.asarray(photo.convert("RGB"))[200:360, 300:492].copy()
    cost = []
    for effort in (0, 8):
        encoded = shipped.compress(image, quality=quality, effort=effort, measure=True)
        assert encoded.psnr is not None
        error = 255**2 * 10 ** (-encoded.psnr / 10)
        bpp = 8 * len(encoded.data) / (160 * 192)
        cost.append(bpp + quality_to_lambda(quality) * error)
    assert cost[1] < cost[0]


def test_effort_saves_bits_and_error_together_and_repeats_itself(codec: Codec) -> None:
    image = photo_like(80, 600)  # two tiles
    plain = codec.compress(image, quality=60)
    refined = codec.compress(image, quality=60, effort=4)
    assert codec.compress(image, quality=60, effort=4) == refined
    weight = float(quality_to_lambda(torch.tensor(60.0)))

    def cost(encoded: Encoded) -> float:
        assert encoded.psnr is not None
        bits = len(encoded.data) * 8 / (image.shape[0] * image.shape[1])
        return float(bits + weight * 255**2 * 10 ** (-encoded.psnr / 10))

    assert cost(refined) < cost(plain)
    assert psnr(codec.decode([refined.data])[0], image) == pytest.approx(refined.psnr, abs=1e-3)
    with pytest.raises(ValueError, match="effort"):
        codec.compress(image, quality=60, effort=-1)
    with pytest.raises(ValueError, match="effort"):
        codec.compress(image, quality=60, effort=1.5)  # type: ignore[arg-type]


def test_target_bpp_is_met_and_not_passed(codec: Codec) -> None:
    image = photo_like(384, 384)
    low, high = (len(codec.encode([image], q)[0]) * 8 / (384 * 384) for q in (10, 90))
    for target in (0.8 * low + 0.2 * high, 0.3 * low + 0.7 * high):
        bpp = len(codec.compress(image, target_bpp=target).data) * 8 / (384 * 384)
        assert 0.97 * target <= bpp <= target


def test_target_psnr_is_reached_at_little_more(codec: Codec) -> None:
    image = photo_like(384, 384)
    middle = codec.compress(image, quality=40).psnr
    assert middle is not None
    encoded = codec.compress(image, target_psnr=middle)
    assert encoded.psnr is not None and middle <= encoded.psnr < middle + 0.2


def test_patches_of_a_panorama_are_different_ones() -> None:
    panorama = np.tile((np.arange(20000) // 100).astype(np.uint8), (512, 1))
    patches = sample_patches(panorama, side=512, count=3)
    assert [int(patch[0, 0]) for patch in patches] == [0, 97, 194]


def test_a_search_goes_on_from_a_picture_that_is_exact() -> None:
    found = solve_quality(lambda q: np.inf if q > 20 else 30 + q, 45, 45.05, guess=50, slope=0.12)
    assert found == pytest.approx(15, abs=0.05)


def test_a_target_out_of_reach_gives_the_end_of_the_range(codec: Codec) -> None:
    image = photo_like(128, 128)
    assert codec.compress(image, target_psnr=99).quality == 100
    assert codec.compress(image, target_bpp=0.001).quality == 0


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros(8, np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(codec: Codec, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError):
        codec.encode([image])


def test_quality_outside_the_range_is_refused(codec: Codec) -> None:
    for quality in (-1, 100.5, float("nan")):
        with pytest.raises(ValueError, match="quality"):
            codec.encode([photo_like(16, 16)], quality)
    with pytest.raises(ValueError, match="target_psnr"):
        codec.compress(photo_like(16, 16), target_psnr=float("nan"))


def test_the_header_reads_without_a_model(codec: Codec) -> None:
    (blob,) = codec.encode([photo_like(30, 50)], 12.34)
    header = read_header(blob[:64])
    assert (header.width, header.height, header.channels) == (50, 30, 3)
    assert header.quality == 12.34
    assert codec.model_id.startswith(header.model_id_prefix)


@pytest.mark.parametrize("size", [(60, 60), (600, 600)])  # one tile, several tiles
def test_every_flipped_bit_and_every_cut_is_noticed(codec: Codec, size: tuple[int, int]) -> None:
    (blob,) = codec.encode([photo_like(*size)], 20)
    check(blob)
    rng = np.random.default_rng(0)
    for at in [*range(40), *rng.integers(0, len(blob), 200).tolist()]:
        damaged = bytearray(blob)
        damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(BitstreamError):
            check(bytes(damaged))
        with pytest.raises(BitstreamError):
            codec.decode([bytes(damaged)])
    for end in [0, 1, 10, 25, len(blob) // 2, len(blob) - 1]:
        with pytest.raises(BitstreamError):
            check(blob[:end])
    with pytest.raises(BitstreamError):
        check(blob + b"\0")


def test_a_header_that_claims_too_much_is_refused_at_once(codec: Codec) -> None:
    (blob,) = codec.encode([photo_like(600, 600)], 20)
    # A width of 600 is the varint d8 04; claim a million pixels a side instead.
    hostile = blob.replace(b"\xd8\x04\xd8\x04", b"\xff\xff\x3f\xff\xff\x3f", 1)
    assert read_header(hostile).width == (1 << 20) - 1
    with pytest.raises(BitstreamError, match="too few"):
        codec.decode([hostile])


def test_pictures_beyond_the_limit_are_refused(codec: Codec) -> None:
    blobs = codec.encode([photo_like(20, 30)], 20)
    assert codec.decode(blobs, max_pixels=600)[0].shape == (20, 30, 3)
    with pytest.raises(BitstreamError, match="30x20"):
        codec.decode(blobs, max_pixels=599)


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\0" + bytes(3),
        b"\0" + bytes(8),
        b"\x01",
        b"\xff" * 20,
        write_varint(1 << 62),
        b"\0" + b"\xff" * 8,
        *(b"\x09" + 9 * write_varint(v) + b"\xff" * 8 for v in (511, 512, 1 << 32)),
    ],
    ids=lambda stream: stream.hex()[:12],
)
def test_wrong_streams_under_right_crcs_are_refused(codec: Codec, stream: bytes) -> None:
    """Cut words, a zero word at the end, escapes that lack, do not end or are out of range."""
    parsed = unpack(codec.encode([photo_like(40, 40)], 20)[0])
    hostile = pack(parsed.header, stream, parsed.tiles)
    check(hostile)
    with pytest.raises(BitstreamError):
        codec.decode([hostile])


def test_another_model_is_named(codec: Codec) -> None:
    stranger = Codec.load(GOLDEN / "context" / "tiny.safetensors", device="cpu")
    (blob,) = codec.encode([photo_like(32, 32)])
    with pytest.raises(ModelMismatchError, match=codec.model_id[:16]):
        stranger.decode([blob])


def test_windows_agree_with_the_whole(codec: Codec) -> None:
    """Cut into many small windows with halos, a bitstream decodes to the same picture."""
    image = photo_like(700, 500)
    (blob,) = codec.encode([image], 80)
    windowed = Codec(codec.weights, codec.device, codec.dtype, window_pixels=160)
    difference = windowed.decode([blob])[0].astype(int) - codec.decode([blob])[0]
    assert np.abs(difference).max() <= 1
    assert windowed.compress(image, quality=80).psnr == pytest.approx(
        codec.compress(image, quality=80).psnr, abs=0.02
    )


@pytest.mark.parametrize("window", [160, 2048])
def test_synthesis_gives_what_training_sees(codec: Codec, window: int) -> None:
    """In windows, in strips and in layouts of its own it gives what the model does."""
    networks = Codec(codec.weights, codec.device, codec.dtype, window_pixels=window).networks
    generator = torch.Generator().manual_seed(6)
    y_hat = torch.randn((26, 21, networks.config.latent), generator=generator) * 20
    quality = networks.quality(60.0)
    with torch.no_grad():
        found = networks.synthesise(y_hat, quality, 410, 330)
        whole = networks.model.synthesise(y_hat.permute(2, 0, 1)[None], quality)[0]
        unfiltered = networks.model.g_s(y_hat.permute(2, 0, 1)[None], quality)[0]
    expected = (whole.permute(1, 2, 0)[:410, :330] + 128.5).clamp(0, 255).to(torch.uint8)
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.001
    assert (whole - unfiltered).abs().mean() > 0.1  # the post-filter has a say


def test_any_settings_decode_what_others_encoded(codec: Codec) -> None:
    """Other precision, thread count and torch flags of the user's: not one symbol is wrong."""
    image = photo_like(300, 200)
    (blob,) = codec.encode([image], 75)
    (reference,) = codec.decode([blob])
    half = Codec(codec.weights, codec.device, torch.bfloat16)
    assert psnr(half.decode([blob])[0], reference) > 45
    (from_half,) = half.encode([image], 75)
    assert psnr(codec.decode([from_half])[0], half.decode([from_half])[0]) > 45
    before = torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16):
            assert psnr(codec.decode([blob])[0], reference) > 45
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_process_with_another_default_dtype_gets_the_same(
    codec: Codec, weights: Path, dtype: torch.dtype
) -> None:
    image = photo_like(150, 200)

    def results(codec: Codec) -> tuple[bytes, bytes, list[NDArray[np.uint8]]]:
        (blob,) = codec.encode([image], 90)
        refined = codec.compress(image, quality=50, effort=1).data
        return blob, refined, codec.decode([blob]) + codec.decode([blob], max_size=40)

    expected = results(codec)
    torch.set_default_dtype(dtype)
    try:
        found = [
            results(c) for c in (codec, Codec.load(weights, device="cpu", precision="float32"))
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    for blob, refined, pictures in found:
        assert (blob, refined) == expected[:2]
        for picture, wanted in zip(pictures, expected[2], strict=True):
            assert np.array_equal(picture, wanted)


def test_a_codec_pickles_after_use(codec: Codec) -> None:
    image = photo_like(90, 130)
    used = Codec(codec.weights, codec.device, codec.dtype, window_pixels=64)
    blobs = used.encode([image], 60)
    other = pickle.loads(pickle.dumps(used))
    assert (other.model_id, other.device, other.dtype) == (used.model_id, used.device, used.dtype)
    assert other.networks._window == used.networks._window
    assert other.encode([image], 60) == blobs
    assert np.array_equal(other.decode(blobs)[0], used.decode(blobs)[0])


def test_loading_draws_no_random_numbers() -> None:
    """Else a seeded training loop would depend on when its codec is loaded."""
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    Codec.load(device="cpu")
    assert torch.equal(torch.rand(4), expected)


def test_a_process_with_another_default_device_gets_the_same(codec: Codec) -> None:
    """On "meta" tensors have no values: one that lands there by default is noticed."""
    image = photo_like(90, 130)

    def results(codec: Codec) -> tuple[list[bytes], NDArray[np.uint8]]:
        blobs = codec.encode([image], 60)
        return blobs, codec.decode(blobs)[0]

    expected = results(codec)
    model = import_weights(codec.weights).model
    _works.cache_clear()
    can_fuse = _works(torch.float32)
    exported = load(export_weights(model))
    _works.cache_clear()
    with torch.device("meta"):
        assert _works(torch.float32) == can_fuse
        other = load(export_weights(model))
        blobs, pixels = results(Codec.of(codec.weights, device="cpu", precision="float32"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in exported.items())
    assert blobs == expected[0] and np.array_equal(pixels, expected[1])


def test_a_codec_loaded_in_inference_mode_refines_too(codec: Codec, weights: Path) -> None:
    image = photo_like(64, 64)
    with torch.inference_mode():
        loaded = Codec.load(weights, device="cpu", precision="float32")
    expected = codec.compress(image, quality=50, effort=1).data
    assert loaded.compress(image, quality=50, effort=1).data == expected


def test_the_callers_torch_settings_are_left_alone(codec: Codec) -> None:
    torch.set_grad_enabled(True)
    state = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    codec.decode(codec.encode([photo_like(40, 40)]))
    assert torch.is_grad_enabled()
    assert state == (torch.get_num_threads(), torch.get_float32_matmul_precision())


def test_either_arithmetic_reads_what_the_other_wrote(codec: Codec) -> None:
    """int8 and float32 pick the same tables: not one symbol is wrong."""
    image = photo_like(300, 200)
    wide = Codec(codec.weights, codec.device, torch.float32)
    layers = wide.networks.model.h_s_scale.integer_layers()
    wide.networks.exact = ExactScaleBranch(layers, wide.device, torch.float32)
    narrow = Codec(codec.weights, codec.device, torch.float32)
    with torch.backends.mkldnn.flags(enabled=multiplies_int8(codec.device)):
        narrow.networks.exact = ExactScaleBranch(layers, narrow.device, torch.int8)
        for writer, reader in ((wide, narrow), (narrow, wide)):
            (blob,) = writer.encode([image], 75)
            latents = [c.decode_latents(blob).symbols for c in (writer, reader)]
            assert torch.equal(*latents)


@pytest.mark.parametrize(
    "model", ["hyperprior", "context", "steps", "steered", "lattice", "filter"]
)
def test_golden_bitstreams_still_decode(model: str) -> None:
    """Written once with tiny models; every later release must read them the same."""
    folder = GOLDEN / model
    codec = Codec.load(folder / "tiny.safetensors", device="cpu", precision="float32")
    for file in folder.glob("*.vst"):
        (decoded,) = codec.decode([file.read_bytes()])
        expected = np.load(file.with_suffix(".npy"))
        assert np.abs(decoded.astype(int) - expected).max() <= 1
    half = Codec.load(folder / "tiny.safetensors", device="cpu", precision="bfloat16")
    for file in folder.glob("*.vst"):
        (decoded,) = half.decode([file.read_bytes()])
        assert psnr(decoded, np.load(file.with_suffix(".npy"))) > 40


def test_unusable_weights_are_named(tmp_path: Path) -> None:
    pickle = tmp_path / "weights.pt"
    pickle.write_bytes(b"\x80\x04\x95 not safetensors")
    for path in (pickle, tmp_path / "missing.safetensors"):
        with pytest.raises(WeightsError, match=path.name):
            Codec.load(path)
    for url in ("nonsense://a", "http://127.0.0.1:9/a"):
        with pytest.raises(WeightsError, match=url):
            Codec.load(url)
    with pytest.raises(WeightsError) as told:
        Codec.load("http://user:hidden@127.0.0.1:9/a?token=hidden&v=1")
    assert "http://127.0.0.1:9/a?v=1: " in str(told.value) and "hidden" not in str(told.value)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((GOLDEN / "context" / "tiny.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="torn"):
        Codec.load(torn)
    inexact = tmp_path / "inexact.safetensors"
    good = shipped_weights()
    tensors = load(good)
    tensors["h_s_scale.up1.weight"].fill_(127)
    metadata = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"]
    inexact.write_bytes(save(tensors, metadata))
    with pytest.raises(WeightsError, match=r"inexact.safetensors: .*2\*\*24"):
        Codec.load(inexact)


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        Codec.load(GOLDEN / "context" / "tiny.safetensors", device="nonsense")
    with pytest.raises(ValueError, match="precision"):
        Codec.load(GOLDEN / "context" / "tiny.safetensors", precision="int3")


def test_the_shipped_model_beats_jpeg_on_a_photo() -> None:
    """At the bytes of a JPEG of quality 75, the picture is closer to the original."""
    import io

    from PIL import Image

    source = Path(__file__).parent.parent / "examples" / "photos"
    path = next(p for p in sorted(source.glob("*.jpg")) if Image.open(p).mode == "RGB")
    with Image.open(path) as image:
        pixels = np.asarray(image.reduce(2))[:480, :640]
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=75, optimize=True)
    bpp = len(jpeg.getvalue()) * 8 / (pixels.shape[0] * pixels.shape[1])
    encoded = Codec.load(device="cpu").compress(pixels, target_bpp=bpp)
    assert len(encoded.data) <= len(jpeg.getvalue())
    assert encoded.psnr is not None
    assert encoded.psnr > psnr(pixels, np.asarray(Image.open(jpeg))) + 1


def test_errors_share_a_base() -> None:
    assert issubclass(BitstreamError, VaestreamError) and issubclass(WeightsError, VaestreamError)


@pytest.mark.parametrize("shape", [(100, 75, 3), (700, 530)])
@pytest.mark.parametrize("view", [{}, {"region": (9, 20, 60, 50)}, {"max_size": 30}])
def test_the_two_halves_of_decoding_are_the_whole(
    codec: Codec, shape: tuple[int, ...], view: dict[str, Any]
) -> None:
    """With a pickle between them, and in different precisions and threads."""
    image = photo_like(shape[0], shape[1], channels=3 if len(shape) == 3 else 1)
    (blob,) = codec.encode([image], 80)
    elsewhere = Codec(codec.weights, torch.device("cpu"), torch.bfloat16)
    latents = pickle.loads(pickle.dumps(elsewhere.decode_latents(blob, **view)))
    assert latents.symbols.dtype == latents.z_hat.dtype == torch.int16
    (expected,) = codec.decode([blob], **view)
    assert np.array_equal(codec.synthesise(latents), expected)
    rendered = codec.render(latents)
    assert torch.equal(rendered, torch.from_numpy(expected)) and not rendered.is_inference()


def test_latents_beyond_16_bits_keep_their_values(codec: Codec) -> None:
    """No photo has them; what a bitstream may hold must still decode to itself."""
    blocks = np.random.default_rng(0).integers(0, 2, (4, 40), np.uint8) * 255
    (blob,) = codec.encode([blocks.repeat(16, axis=0).repeat(16, axis=1)], 100)
    expected = codec.decode_latents(blob).symbols
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vaestream.codec.codec._INT16", np.iinfo(np.int8))
        wide = codec.decode_latents(blob).symbols
    assert expected.dtype == torch.int16 and wide.dtype == torch.int32
    assert expected.abs().max() > 127 and torch.equal(wide, expected.int())


def test_latents_of_another_model_are_refused(codec: Codec) -> None:
    latents = codec.decode_latents(codec.encode([photo_like(30, 30)])[0])
    header = dataclasses.replace(latents.header, model_id_prefix="0" * 16)
    with pytest.raises(ModelMismatchError, match="written with model 0000"):
        codec.synthesise(dataclasses.replace(latents, header=header))
