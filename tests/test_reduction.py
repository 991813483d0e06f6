"""Large smooth photos are coded as smaller pictures where that is better."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vaestream import Codec
from vaestream.codec import read_header
from vaestream.codec.bitstream import Header, Reduction, pack
from vaestream.codec.reduction import Source, best_ratio, reduced_quality
from vaestream.errors import BitstreamError

PHOTOS = Path(__file__).parent.parent / "examples" / "photos"


@pytest.fixture(scope="module")
def shipped() -> Codec:
    return Codec.load(device="cpu")


@pytest.fixture(scope="module")
def sharp() -> NDArray[np.uint8]:
    """A photo as sharp as its pixels, of a little more than a megapixel."""
    with Image.open(PHOTOS / "spices.jpg") as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def smooth() -> NDArray[np.uint8]:
    """A part of one, enlarged."""
    with Image.open(PHOTOS / "forget-me-not.jpg") as image:
        part = image.crop((400, 250, 850, 550))
        return np.asarray(part.resize((1401, 999), Image.Resampling.BICUBIC))


def squared_error(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.mean((a.astype(float) - b) ** 2))


def at_own_size(codec: Codec, image: NDArray[np.uint8], quality: float) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vaestream.codec.encoder.best_ratio", lambda *_: 1.0)
        return codec.encode([image], quality)[0]


def test_a_smooth_photo_takes_fewer_bytes_for_its_error(
    shipped: Codec, smooth: NDArray[np.uint8]
) -> None:
    """By the very measure that the qualities stand for."""
    (blob,) = shipped.encode([smooth], 20)
    header = read_header(blob)
    assert header.reduction is not None and header.quality == 20
    whole = at_own_size(shipped, smooth, 20)
    (decoded,) = shipped.decode([blob])
    (reference,) = shipped.decode([whole])
    assert decoded.shape == smooth.shape
    weight: float = 0.0007 * (0.22 / 0.0007) ** 0.2
    pixels: int = smooth.shape[0] * smooth.shape[1]

    def cost(data: bytes, decoded: NDArray[np.uint8]) -> float:
        return 8 * len(data) / pixels + weight * squared_error(decoded, smooth)

    assert cost(blob, decoded) < 0.95 * cost(whole, reference)
    assert len(blob) < 0.8 * len(whole)


@pytest.mark.parametrize("quality", [50, 95])
def test_a_sharp_photo_keeps_its_size(
    shipped: Codec, sharp: NDArray[np.uint8], quality: float
) -> None:
    (blob,) = shipped.encode([sharp], quality)
    assert read_header(blob).reduction is None
    assert blob == at_own_size(shipped, sharp, quality)


def test_so_does_a_smooth_one_whose_detail_matters(
    shipped: Codec, smooth: NDArray[np.uint8]
) -> None:
    grain = np.random.default_rng(0).normal(0, 12, smooth.shape)
    grainy = (smooth + grain).clip(0, 255).astype(np.uint8)
    (blob,) = shipped.encode([grainy], 90)
    assert read_header(blob).reduction is None


def test_targets_are_met(shipped: Codec, smooth: NDArray[np.uint8]) -> None:
    pixels = smooth.shape[0] * smooth.shape[1]
    by_rate = shipped.compress(smooth, target_bpp=0.05)
    assert read_header(by_rate.data).reduction is not None
    assert 0.048 < len(by_rate.data) * 8 / pixels <= 0.05
    assert by_rate.psnr is not None
    (decoded,) = shipped.decode([by_rate.data])
    measured = 10 * np.log10(255**2 / squared_error(decoded, smooth))
    assert by_rate.psnr == pytest.approx(measured, abs=0.01)
    for target in (measured - 3, 48.0):  # the latter may be beyond what a smaller picture reaches
        by_psnr = shipped.compress(smooth, target_psnr=target)
        (decoded,) = shipped.decode([by_psnr.data])
        reached = 10 * np.log10(255**2 / squared_error(decoded, smooth))
        assert target - 0.01 <= reached < target + 0.2


def test_a_target_takes_no_more_bytes_than_the_quality_that_meets_it(shipped: Codec) -> None:
    """At low rates, where a photo of a megapixel is coded as a smaller one."""
    with Image.open(PHOTOS / "sunset.jpg") as image:
        photo = np.array(image)
    plain = shipped.compress(photo, quality=10)
    assert read_header(plain.data).reduction is not None and plain.psnr is not None
    found = shipped.compress(photo, target_psnr=plain.psnr)
    assert found.psnr is not None and found.psnr >= plain.psnr
    assert len(found.data) < 1.02 * len(plain.data)


def test_what_one_ratio_cannot_reach_the_next_one_may(
    codec: Codec, smooth: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a third of the size, no quality gives as much; at half of it one does."""
    encoder, part = codec.encoder, np.ascontiguousarray(smooth[300:600, 500:900])
    half, third = (encoder.encode(Source.of(part, r), 100, measure=True).psnr for r in (2.0, 3.0))
    assert half is not None and third is not None and half > third + 1
    monkeypatch.setattr(encoder, "source", lambda image, _: Source.of(image, 3.0))
    encoded = codec.compress(part, target_psnr=third + 0.5)
    assert encoded.psnr is not None and encoded.psnr >= third + 0.5
    reduction = read_header(encoded.data).reduction
    assert reduction is not None and reduction.width == 200


def test_refinement_helps_here_too(shipped: Codec, smooth: NDArray[np.uint8]) -> None:
    plain = shipped.compress(smooth, quality=20)
    refined = shipped.compress(smooth, quality=20, effort=2)
    assert read_header(refined.data).reduction == read_header(plain.data).reduction
    assert len(refined.data) < len(plain.data)
    assert plain.psnr is not None and refined.psnr is not None
    assert refined.psnr > plain.psnr - 0.1


def test_the_best_ratio_is_the_last_that_is_better() -> None:
    image = np.zeros((1200, 1600), np.uint8)
    costs = {1.0: 5.0, 1.5: 4.0, 2.0: 3.0, 3.0: 3.5, 4.0: 1.0}
    tried: list[float] = []

    def measure(source: Source) -> tuple[float, float]:
        tried.append(source.ratio)
        return costs[source.ratio], 0.0

    assert best_ratio(image, 0.0, measure) == 2.0
    assert 4.0 not in tried
    # Beyond a quality of 100 there is none to code a smaller picture at.
    assert best_ratio(image, 90.0, measure) == 1.0
    assert reduced_quality(70.0, 2.0) == 94.11
    # Too few pixels, or too narrow, for blocks.
    assert best_ratio(image[:500, :500], 0.0, measure) == 1.0
    assert best_ratio(image.reshape(60, -1), 0.0, measure) == 1.0


def test_a_reduction_is_part_of_the_header(shipped: Codec) -> None:
    for coded in (Reduction(40, 25, 12.34), Reduction(300, 200, 100.0)):
        header = Header(300, 200, 1, 5.0, shipped.model_id[:16], coded)
        assert read_header(pack(header, b"z", [b"t"])) == header


@pytest.mark.parametrize("size", [(301, 200), (300, 201), (37, 200), (300, 24), (0, 0)])
def test_impossible_reductions_are_refused(shipped: Codec, size: tuple[int, int]) -> None:
    """Neither larger than the picture nor so small that a few bytes could claim a huge one."""
    header = Header(300, 200, 3, 5.0, shipped.model_id[:16], Reduction(*size, 50.0))
    with pytest.raises(BitstreamError, match=f"300x200 coded as {size[0]}x{size[1]}"):
        shipped.decode([pack(header, b"z", [b"t"])])


def test_damage_to_a_reduction_is_named(shipped: Codec, smooth: NDArray[np.uint8]) -> None:
    (blob,) = shipped.encode([smooth], 20)
    at = blob.index(struct.pack("<H", round(read_header(blob).coded_quality * 100)), 16)
    for damaged in (blob[: at + 1], blob[:at] + b"\xff\xff" + blob[at + 2 :]):
        with pytest.raises(BitstreamError, match=r"cut off|above 100"):
            shipped.decode([damaged])
