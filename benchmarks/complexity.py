"""Parameters, and multiply-accumulates per pixel of encoding and decoding, part by part.

python benchmarks/complexity.py [--weights W]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vaestream import Codec
from vaestream.codec.bitstream import Header
from vaestream.codec.networks import Networks

SIDE = 1024
# The counter knows the float products that return a tensor of their own.
PRODUCTS: dict[Any, Any] = {
    torch.ops.aten.mm.out: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._int_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights")
    args = parser.parse_args()
    networks = Codec.load(args.weights, device="cpu", precision="float32").networks
    model = networks.model
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {model.config}")
    quality = networks.quality(50)
    pixels = torch.zeros((SIDE, SIDE, 3), dtype=torch.uint8)
    with torch.inference_mode():
        y = networks.analyse(pixels, quality)
        z_hat = networks.hyper_analyse(y)
        parts: dict[str, Callable[[], object]] = {
            "g_a": lambda: networks.analyse(pixels, quality),
            "h_a": lambda: networks.hyper_analyse(y),
            "h_s and contexts": lambda: prior(networks, z_hat, quality),
            "g_s and post-filter": lambda: networks.synthesise(y, quality, SIDE, SIDE),
        }
        cost = {}
        for name, run in parts.items():
            # Without oneDNN nothing is fused: the counter does not know fused convolutions.
            with (
                torch.backends.mkldnn.flags(enabled=False),
                FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter,
            ):
                run()
            cost[name] = counter.get_total_flops() / 2 / SIDE**2 / 1000
            print(f"{name}: {cost[name]:.2f} kMAC per pixel")
    synthesis = cost["g_s and post-filter"]
    print(f"encode {sum(cost.values()) - synthesis:.2f} kMAC per pixel")
    print(f"decode {cost['h_s and contexts'] + synthesis:.2f} kMAC per pixel")


def prior(networks: Networks, z_hat: Tensor, quality: Tensor) -> None:
    """All that decoding computes before the synthesis."""
    header = Header(SIDE, SIDE, 3, float(quality), "")
    side = networks.side_information(z_hat, quality)
    means, scales = side.means(header.tiles()), side.scales(header.tiles())
    for number, p in enumerate(networks.config.passes):
        mean = means.predict(number, p)
        scales.predict(number, p)
        symbols = torch.zeros_like(mean)
        means.reveal(p, symbols, mean)
        scales.reveal(p, symbols)


if __name__ == "__main__":
    main()
