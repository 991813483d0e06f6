"""Whoever follows docs/format.md alone decodes every bitstream: a decoder that does, does so."""

from pathlib import Path

import numpy as np
import pytest
import reference_decoder
import torch
from numpy.typing import NDArray
from PIL import Image
from reference_decoder import Bitstream, SymbolStream, Weights
from test_codec import GOLDEN, photo_like

from vaestream.codec import Codec, read_header
from vaestream.codec.weights_file import export_weights, import_weights

PHOTO = Path(__file__).parent / "data" / "forget-me-not.jpg"
MODELS = ["hyperprior", "context", "steps", "steered", "lattice", "filter"]


@pytest.fixture(scope="module")
def small(codec: Codec) -> Weights:
    return Weights(codec.weights)


@pytest.fixture(scope="module")
def shipped() -> Codec:
    return Codec.load(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def shipped_weights(shipped: Codec) -> Weights:
    return Weights(shipped.weights)


def assert_alike(codec: Codec, weights: Weights, blob: bytes, levels: int = 1) -> None:
    """The same integers in the codec and the reference, and pixels within so many levels."""
    expected = reference_decoder.decode(weights, blob)
    found = codec.decode_latents(blob)
    assert np.array_equal(found.z_hat, expected.z_hat)
    assert np.array_equal(found.symbols.permute(2, 0, 1), expected.symbols)
    (pixels,) = codec.decode([blob])
    assert pixels.shape == expected.pixels.shape
    assert np.abs(pixels - expected.pixels).max() <= levels


def encode_reduced(codec: Codec, image: NDArray[np.uint8], quality: float) -> bytes:
    """A bitstream of a picture with sides 1.5 times smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vaestream.codec.encoder.best_ratio", lambda *_: 1.5)
        (blob,) = codec.encode([image], quality)
    assert read_header(blob).reduction is not None
    return blob


@pytest.mark.parametrize("model", MODELS)
def test_golden_bitstreams_decode_as_the_format_says(model: str) -> None:
    file = GOLDEN / model / "tiny.safetensors"
    codec = Codec.load(file, device="cpu", precision="float32")
    weights = Weights(file.read_bytes())
    assert reference_decoder.known_answer(weights) == weights.known_answer
    for path in sorted(file.parent.glob("*.vst")):
        blob = path.read_bytes()
        reduced = read_header(blob).reduction is not None  # enlarging may add to a difference
        assert_alike(codec, weights, blob, levels=2 if reduced else 1)


@pytest.mark.parametrize(
    ("shape", "quality"),
    [
        ((1, 1, 3), 5),
        ((17, 1, 3), 15),
        ((1, 37), 45),
        ((53, 37), 25),
        ((70, 90, 3), 33.37),
        ((64, 64, 3), 0),
        ((65, 129), 99.99),
        ((24, 530, 3), 65),
        ((520, 516), 12.5),
    ],
)
def test_pictures_of_any_size_and_quality_decode_as_it_says(
    codec: Codec, small: Weights, shape: tuple[int, ...], quality: float
) -> None:
    """Hyper-latents at a node of their tables and between; one tile, a row of them and a square."""
    image = photo_like(shape[0], shape[1], channels=3 if len(shape) == 3 else 1)
    (blob,) = codec.encode([image], quality)
    assert_alike(codec, small, blob)


def test_symbols_far_outside_the_tables_decode_as_it_says(codec: Codec, small: Weights) -> None:
    """Noise, and blocks whose symbols are the largest there are."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 2, (4, 40), np.uint8) * 255
    for image in (
        rng.integers(0, 256, (40, 31, 3), np.uint8),
        blocks.repeat(16, axis=0).repeat(16, axis=1),
    ):
        (blob,) = codec.encode([image], 100)
        assert_alike(codec, small, blob)
        for tile in Bitstream(blob, small.digest[:8]).tile_streams:
            assert len(SymbolStream(tile[1:]).escapes) > 20


@pytest.mark.parametrize("shape", [(61, 95, 3), (95, 61)])
def test_reduced_pictures_decode_as_it_says(
    codec: Codec, small: Weights, shape: tuple[int, ...]
) -> None:
    image = photo_like(shape[0], shape[1], channels=3 if len(shape) == 3 else 1)
    assert_alike(codec, small, encode_reduced(codec, image, 40), levels=2)


def test_the_shipped_model_decodes_as_it_says(shipped: Codec, shipped_weights: Weights) -> None:
    with Image.open(PHOTO) as photo:
        pixels = np.asarray(photo.convert("RGB"))
    for image, quality in (
        (pixels[100:170, 100:190], 33.37),
        (pixels[:24, :530], 65),
        (pixels[:53, :37, 1], 90),
        (np.random.default_rng(1).integers(0, 256, (40, 31, 3), np.uint8), 100),
    ):
        (blob,) = shipped.encode([np.ascontiguousarray(image)], quality)
        assert_alike(shipped, shipped_weights, blob)
    blob = encode_reduced(shipped, np.ascontiguousarray(pixels[:61, :95]), 40)
    assert_alike(shipped, shipped_weights, blob, levels=2)


def test_the_known_answer_follows_from_the_format(shipped_weights: Weights, small: Weights) -> None:
    for weights in (shipped_weights, small):
        assert reference_decoder.known_answer(weights) == weights.known_answer


@pytest.mark.parametrize("shape", [(20, 30), (20, 530)])
def test_damage_and_what_is_left_over_are_refused(
    codec: Codec, small: Weights, shape: tuple[int, int]
) -> None:
    """Of one tile and of two."""
    (blob,) = codec.encode([photo_like(*shape)], 50)
    flipped = blob[:-1] + bytes([blob[-1] ^ 1])
    for damaged in (flipped, blob + b"\0", blob[:-1]):
        with pytest.raises(ValueError, match=r"CRC|left over|cut off"):
            reference_decoder.decode(small, damaged)


def test_weights_survive_the_file() -> None:
    data = (GOLDEN / "filter" / "tiny.safetensors").read_bytes()
    once = import_weights(data).model
    again = import_weights(export_weights(once)).model
    for (name, one), other in zip(
        once.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), name
