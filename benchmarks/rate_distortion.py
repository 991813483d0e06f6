"""BD-rate of vaestream on the 24 Kodak photos against published curves.

    python benchmarks/rate_distortion.py KODAK_FOLDER [--weights W] [--json OUT]

The curve is mean bpp over mean PSNR at twelve fixed qualities, from real bitstreams and decoded
8-bit pixels. BD-rate integrates the difference of log bpp, interpolated by PCHIP over PSNR, over
29 to 36.5 dB, and over 36 to 40 dB beside it. Published curves and where they come from:
kodak_anchors.json. Needs scipy.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator

from vaestream.training.evaluate import evaluate

QUALITIES = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 100.0)
WINDOWS = ((29.0, 36.5), (36.0, 40.0))


def bd_rate(
    bpp: list[float],
    psnr: list[float],
    ref_bpp: list[float],
    ref_psnr: list[float],
    window: tuple[float, float],
) -> float | None:
    """Mean rate difference in percent at equal PSNR; None where a curve misses the window.

    Bjøntegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001, with
    PCHIP in place of the cubic.
    """
    low, high = window
    if max(psnr[0], ref_psnr[0]) > low or min(psnr[-1], ref_psnr[-1]) < high:
        return None
    ours = PchipInterpolator(psnr, np.log(bpp)).integrate(low, high)
    theirs = PchipInterpolator(ref_psnr, np.log(ref_bpp)).integrate(low, high)
    return float(np.expm1((ours - theirs) / (high - low)) * 100)


def cpu_name() -> str:
    """The processor as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kodak")
    parser.add_argument("--weights")
    parser.add_argument("--json")
    args = parser.parse_args()
    evaluation = evaluate([args.kodak], weights=args.weights, qualities=QUALITIES)
    curve = evaluation.curve()
    bpp, psnr = [p.bpp for p in curve], [p.psnr for p in curve]
    photos = len(evaluation.measurements) // len(curve)
    print(f"{photos} photos, model {evaluation.model_id[:16]}, {cpu_name()}, {evaluation.device}")
    print(evaluation.table())
    print("monotone in quality:", bool(np.all(np.diff(bpp) > 0) and np.all(np.diff(psnr) > 0)))
    anchors = json.loads((Path(__file__).parent / "kodak_anchors.json").read_text("utf-8"))
    print(f"\nBD-rate, %{'':28}" + "".join(f"{a:g}-{b:g} dB".rjust(12) for a, b in WINDOWS))
    results = {}
    for key, anchor in anchors.items():
        order = np.argsort(anchor["psnr"])
        reference = [[anchor[k][i] for i in order] for k in ("bpp", "psnr")]
        results[key] = [bd_rate(bpp, psnr, *reference, window) for window in WINDOWS]
        cells = ["-" if r is None else f"{r:+.1f}" for r in results[key]]
        print(f"against {anchor['name']:30}" + "".join(c.rjust(12) for c in cells))
    if args.json:
        document = {**json.loads(evaluation.to_json()), "bd_rate": results, "cpu": cpu_name()}
        Path(args.json).write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
