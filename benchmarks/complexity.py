"""Parameters, and multiply-accumulates per pixel of encoding and decoding, part by part.

python benchmarks/complexity.py [--weights W]
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from vaestream import Codec

SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights")
    args = parser.parse_args()
    networks = Codec.load(args.weights, device="cpu", precision="float32").networks
    model = networks.model
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {model.config}")
    quality = networks.quality(50)
    pixels = torch.zeros((SIDE, SIDE, 3), dtype=torch.uint8)
    grid = SIDE // 16
    with torch.inference_mode():
        y = networks.analyse(pixels, quality)
        z_hat = networks.hyper_analyse(y)
        side = networks.side_information(z_hat, quality)
        parts = {
            "g_a": lambda: networks.analyse(pixels, quality),
            "h_a": lambda: networks.hyper_analyse(y),
            "h_s": lambda: (
                networks.side_information(z_hat, quality),
                side.tile(0, 0, grid, grid),
            ),
            "g_s": lambda: networks.synthesise(y, quality, SIDE, SIDE),
        }
        cost = {}
        for name, run in parts.items():
            with FlopCounterMode(display=False) as counter:
                run()
            cost[name] = counter.get_total_flops() / 2 / SIDE**2 / 1000
            print(f"{name}: {cost[name]:.2f} kMAC per pixel")
    print(f"encode {cost['g_a'] + cost['h_a'] + cost['h_s']:.2f} kMAC per pixel")
    print(f"decode {cost['h_s'] + cost['g_s']:.2f} kMAC per pixel")


if __name__ == "__main__":
    main()
