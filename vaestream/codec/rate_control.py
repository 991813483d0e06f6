"""Which quality meets a target: bits per pixel, or PSNR."""

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from .encoder import Encoded, Encoder, squared_error
from .reduction import Source, next_ratio

_SEARCH_QUALITY = 50.0
_RATE_TOLERANCE = 0.02
_RATE_SLOPE = 0.04
_PSNR_TOLERANCE = 0.05
_PSNR_SLOPE = 0.12
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
            slope=_RATE_SLOPE,
        )

    def settle(source: Source, guess: float) -> Encoded:
        tried: list[Encoded] = []

        def of_whole(q: float) -> float:
            # Measured at once: the first try mostly stands, and a second encoding costs more.
            tried.append(encoder.encode(source, q, measure=measure, effort=effort))
            return rate(tried[-1])

        guess = guess if source.ratio == 1 else search(source, guess)
        solve_quality(of_whole, low, high, guess=guess, slope=_RATE_SLOPE)
        within = [e for e in tried if rate(e) <= high]
        return max(within, key=rate) if within else min(tried, key=rate)

    quality = search(Source.of(image), _SEARCH_QUALITY)
    found = _at_sizes(encoder, image, quality, settle, lambda e: rate(e) >= low)
    return next((e for e in found[::-1] if low <= rate(e) <= high), found[-1])


def encode_to_psnr(
    encoder: Encoder, image: NDArray[np.uint8], psnr: float, *, effort: int
) -> Encoded:
    """The smallest that reaches a target in dB, where the model's range allows.

    Searches on sample patches, or on a picture that is no larger; then settles on the picture.
    """
    high = psnr + _PSNR_TOLERANCE
    settled: dict[float, Encoded] = {}  # by how many times smaller the picture is

    def measured(encoded: Encoded) -> float:
        assert encoded.psnr is not None
        return encoded.psnr

    def smallest(found: Iterable[Encoded]) -> Encoded:
        """Of those that reach the target; else the one that comes closest."""
        return min(found, key=lambda e: (-min(measured(e), psnr), len(e.data)))

    def settle(source: Source, guess: float) -> Encoded:
        tried: list[Encoded] = []

        def of_whole(q: float) -> float:
            tried.append(encoder.encode(source, q, measure=True, effort=effort))
            return measured(tried[-1])

        if source.ratio not in settled:
            solve_quality(of_whole, psnr, high, guess=guess, slope=_PSNR_SLOPE)
            settled[source.ratio] = smallest(tried)
        return settled[source.ratio]

    patches = [Source.of(p) for p in sample_patches(image, side=512, count=3)]

    def of_patches(q: float) -> float:
        error = sum(squared_error(encoder.encode(p, q, measure=True), p.image) for p in patches)
        error /= sum(p.image.shape[0] * p.image.shape[1] for p in patches)
        return 10 * math.log10(255**2 / error) if error else math.inf

    if len(patches) > 1 or effort:
        guess = solve_quality(of_patches, psnr, high, guess=_SEARCH_QUALITY, slope=_PSNR_SLOPE)
    else:
        guess = settle(patches[0], _SEARCH_QUALITY).quality
    _at_sizes(encoder, image, guess, settle, lambda e: measured(e) >= psnr)
    return smallest(settled.values())


def _at_sizes(
    encoder: Encoder,
    image: NDArray[np.uint8],
    quality: float,
    settle: Callable[[Source, float], Encoded],
    reaches: Callable[[Encoded], bool],
) -> list[Encoded]:
    """What `settle` makes of a picture at the sizes at which it may be best coded.

    quality: at which the picture itself meets the target. A smaller one does so at a higher
    quality, for which it may be too small, or not at all: then a larger one comes next.
    """
    source = encoder.source(image, quality)
    found = [settle(source, quality)]
    while source.ratio > 1:
        if reaches(found[-1]):
            quality = found[-1].quality
            better = encoder.source(image, quality)
            if better.ratio >= source.ratio:
                break
            source = better
        else:
            source = Source.of(image, next_ratio(source.ratio))
        found.append(settle(source, quality))
    return found


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
    and after 8 calls at the quality that would come next.
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
    tops, lefts = (
        np.unique(np.linspace(0, max(0, length - side), count).astype(int))
        for length in (height, width)
    )
    return [image[t : t + side, x : x + side] for t in tops for x in lefts]
