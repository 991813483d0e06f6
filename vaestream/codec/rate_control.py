"""Which quality meets a target: bits per pixel, or PSNR."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .encoder import Encoded, Encoder, squared_error
from .reduction import Source

_SEARCH_QUALITY = 50.0
_RATE_TOLERANCE = 0.02
_PSNR_TOLERANCE = 0.05
_EVALUATIONS = 8


def encode_to_rate(
    encoder: Encoder, image: NDArray[np.uint8], bpp: float, *, measure: bool, effort: int
) -> Encoded:
    """At the largest size within 2 % of a target in bits per pixel of the whole bitstream, where
    the model's range allows, and a picture is not so small that four bytes, the least by which
    bitstreams differ, are more.

    Searches with the latents of one analysis, rescaled; then settles on true encodings. Raises
    ValueError unless the target is above 0.
    """
    if not bpp > 0:
        raise ValueError(f"a target of {bpp} bits per pixel cannot be met")
    pixels = image.shape[0] * image.shape[1]
    low, high = math.log2(bpp * (1 - _RATE_TOLERANCE)), math.log2(bpp)

    def rate(encoded: Encoded) -> float:
        return math.log2(len(encoded.data) * 8 / pixels)

    def search(source: Source, guess: float) -> float:
        latents = encoder.analyse(source.coded, source.coded_quality(_SEARCH_QUALITY))
        return solve_quality(
            lambda q: rate(encoder.encode(source, q, measure=False, latents=latents)),
            low,
            high,
            guess=guess,
            slope=0.04,
        )

    def settle(source: Source, guess: float) -> Encoded:
        tried: dict[float, Encoded] = {}

        def of_whole(q: float) -> float:
            # Measured at once: the first try mostly stands, and a second encoding costs more.
            tried[q] = encoder.encode(source, q, measure=measure, effort=effort)
            return rate(tried[q])

        solve_quality(of_whole, low, high, guess=guess, slope=0.04)
        within = [e for e in tried.values() if rate(e) <= high]
        return max(within, key=rate) if within else min(tried.values(), key=rate)

    whole = Source.of(image)
    quality = search(whole, _SEARCH_QUALITY)
    reduced = encoder.source(image, quality)
    if reduced.ratio > 1:
        found = settle(reduced, search(reduced, quality))
        if rate(found) >= low:
            return found  # else the model's range ends below: the whole reaches farther
    return settle(whole, quality)


def encode_to_psnr(
    encoder: Encoder, image: NDArray[np.uint8], psnr: float, *, effort: int
) -> Encoded:
    """The smallest that reaches a target in dB, where the model's range allows.

    Searches on sample patches; then settles on the whole picture.
    """
    patches = [Source.of(p) for p in sample_patches(image, side=512, count=3)]

    def of_patches(q: float) -> float:
        error = sum(squared_error(encoder.encode(p, q, measure=True), p.image) for p in patches)
        error /= sum(p.image.shape[0] * p.image.shape[1] for p in patches)
        return 10 * math.log10(255**2 / error) if error else math.inf

    def settle(source: Source) -> list[Encoded]:
        tried: dict[float, Encoded] = {}

        def of_whole(q: float) -> float:
            tried[q] = encoder.encode(source, q, measure=True, effort=effort)
            value = tried[q].psnr
            assert value is not None
            return value

        solve_quality(of_whole, psnr, high, guess=guess, slope=0.12)
        return list(tried.values())

    high = psnr + _PSNR_TOLERANCE
    guess = _SEARCH_QUALITY
    if len(patches) > 1:
        guess = solve_quality(of_patches, psnr, high, guess=guess, slope=0.12)
    tried: list[Encoded] = []
    reduced = encoder.source(image, guess)
    if reduced.ratio > 1:
        tried = settle(reduced)

    def reached() -> list[Encoded]:
        return [e for e in tried if e.psnr is not None and e.psnr >= psnr]

    if not reached():
        tried = settle(Source.of(image))
    if found := reached():
        return min(found, key=lambda e: len(e.data))
    return max(tried, key=lambda e: e.psnr or 0.0)


def solve_quality(
    measure: Callable[[float], float],
    low: float,
    high: float,
    *,
    guess: float,
    slope: float,
) -> float:
    """A quality in [0, 100] at which `measure`, a rising function of it, is in [low, high].

    slope: first guess of what a quality unit adds. Newton steps whose slope is learned on the
    way, kept inside the bracket seen so far. Ends at 0 or 100 where the range is not reached,
    and after 8 calls at the last quality tried.
    """
    goal = 0.5 * (low + high)
    below, above = 0.0, 100.0
    quality, previous = guess, None
    tried: set[float] = set()
    for _ in range(_EVALUATIONS):
        value = measure(quality)
        tried.add(quality)
        if low <= value <= high:
            return quality
        if value < low:
            below = quality
        else:
            above = quality
        if above - below < 0.02:
            return quality
        if previous is not None and quality != previous[0]:
            learned = (value - previous[1]) / (quality - previous[0])
            if 0 < learned < math.inf:
                slope = learned
        previous = (quality, value)
        step = quality + (goal - value) / slope
        if not below < step < above:
            # Outside the bracket: an end of the range that was not tried yet, or the middle.
            end = 100.0 if step >= above else 0.0
            step = end if end in (below, above) and end not in tried else 0.5 * (below + above)
        quality = round(step, 2)
    return quality


def sample_patches(image: NDArray[np.uint8], *, side: int, count: int) -> list[NDArray[np.uint8]]:
    """Up to count x count squares spread evenly over a picture; the picture if it is small."""
    height, width = image.shape[:2]
    if height * width <= (side * count) ** 2:
        return [image]
    tops = np.linspace(0, max(0, height - side), count).astype(int)
    lefts = np.linspace(0, max(0, width - side), count).astype(int)
    return [image[t : t + side, x : x + side] for t in tops for x in lefts]
