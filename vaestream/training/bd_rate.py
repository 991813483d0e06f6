"""Bjøntegaard delta rate: how many bits one codec needs more than another at equal quality.

Own code because the packages at hand integrate over whatever range two curves share, and figures
over different ranges do not compare. Needs scipy (the extra `evaluate`).
"""

from collections.abc import Sequence

import numpy as np


def bd_rate(
    bpp: Sequence[float],
    psnr: Sequence[float],
    reference_bpp: Sequence[float],
    reference_psnr: Sequence[float],
    window: tuple[float, float],
) -> float | None:
    """Mean rate difference at equal PSNR, in percent: negative where fewer bits are needed.

    Log rate is interpolated over PSNR by PCHIP, which does not overshoot, and integrated over
    `window` (dB). Points in any order; those on which a curve turns back are left out. None where a
    curve does not span the window.

    Source: Bjøntegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33,
    2001, with PCHIP in place of the cubic.
    """
    from scipy.interpolate import PchipInterpolator

    low, high = window
    integrals = []
    for rates, qualities in ((bpp, psnr), (reference_bpp, reference_psnr)):
        points = _rising(rates, qualities)
        if len(points) < 2 or points[0][0] > low or points[-1][0] < high:
            return None
        x, y = np.array(points).T
        integrals.append(float(PchipInterpolator(x, np.log(y)).integrate(low, high)))
    return float(np.expm1((integrals[0] - integrals[1]) / (high - low)) * 100)


def _rising(rates: Sequence[float], qualities: Sequence[float]) -> list[tuple[float, float]]:
    """(PSNR, rate) by rate, without points that a cheaper one matches or beats."""
    points: list[tuple[float, float]] = []
    for rate, quality in sorted(zip(rates, qualities, strict=True)):
        if not points or quality > points[-1][0]:
            points.append((quality, rate))
    return points
