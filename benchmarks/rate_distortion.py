"""vaestream on the 24 Kodak photos beside classical codecs and published curves.

    pip install '.[evaluate]' pillow-jxl-plugin
    python benchmarks/rate_distortion.py KODAK_FOLDER [--weights W] [--json OUT] [--plot PNG]

Curves are mean bpp over mean PSNR at fixed qualities, from real files and decoded 8-bit pixels.
BD-rate integrates the difference of log bpp, interpolated by PCHIP over PSNR, over 29 to 36.5 dB,
and over 36 to 40 dB beside it. Classical codecs are encoded here (`--published-only` leaves them
out); published curves and where they come from: kodak_anchors.json.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np

from vaestream.training.bd_rate import bd_rate
from vaestream.training.classical import available
from vaestream.training.evaluate import evaluate, plot_curves

QUALITIES = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 100.0)
WINDOWS = ((29.0, 36.5), (36.0, 40.0))
DRAWN = ("BPG444", "VTM", "bmshj2018-hyperprior-8bit", "mbt2018-mean-8bit", "ELIC")


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
    parser.add_argument("--effort", type=int, default=0)
    parser.add_argument("--published-only", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    evaluation = evaluate(
        [args.kodak],
        weights=args.weights,
        qualities=QUALITIES,
        beside=() if args.published_only else available(),
        effort=args.effort,
    )
    points = evaluation.curve()
    bpp, psnr = [p.bpp for p in points], [p.psnr for p in points]
    photos = len({m.photo for m in evaluation.measurements})
    print(f"{photos} photos, model {evaluation.model_id[:16]}, {cpu_name()}, {evaluation.device}")
    print(evaluation.table())
    print("monotone in quality:", bool(np.all(np.diff(bpp) > 0) and np.all(np.diff(psnr) > 0)))
    results: dict[str, list[float | None]] = {
        f"{name} (encoded here)": rates for name, rates in evaluation.bd_rates(WINDOWS).items()
    }
    anchors = json.loads((Path(__file__).parent / "kodak_anchors.json").read_text("utf-8"))
    for anchor in anchors.values():
        results[anchor["name"]] = [
            bd_rate(bpp, psnr, anchor["bpp"], anchor["psnr"], window) for window in WINDOWS
        ]
    print(f"\nBD-rate, %{'':32}" + "".join(f"{a:g}-{b:g} dB".rjust(12) for a, b in WINDOWS))
    for name, rates in results.items():
        cells = ["-" if r is None else f"{r:+.1f}" for r in rates]
        print(f"against {name:34}" + "".join(c.rjust(12) for c in cells))
    if args.json:
        document = {**json.loads(evaluation.to_json()), "bd_rate": results, "cpu": cpu_name()}
        Path(args.json).write_text(json.dumps(document, indent=1), encoding="utf-8")
    if args.plot:
        drawn: dict[str, tuple[list[float], list[float]]] = evaluation.curves()
        for key in DRAWN:
            if key in anchors:
                drawn[anchors[key]["name"]] = (anchors[key]["bpp"], anchors[key]["psnr"])
        plot_curves(drawn, args.plot)


if __name__ == "__main__":
    main()
