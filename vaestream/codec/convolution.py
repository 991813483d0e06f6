"""Convolutions together with what follows them, in one pass over memory where that can be.

A ReLU or a sum reads and writes as much as the convolution before it, and costs the more the faster
the products are. On CPUs oneDNN can do both while the result is still in a cache. torch offers that
to its own compiler alone, by operators that are not public and have no gradient; where they are not
at hand the same is computed step by step.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve_relu(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """ReLU of a convolution: (N, C, H, W) -> (N, out, h, w)."""
    if _can_fuse(x, layer):
        return _fused_relu(x, layer)
    return F.relu(layer(x), inplace=True)


def convolve_add(x: Tensor, layer: nn.Conv2d, other: Tensor) -> Tensor:
    """A convolution plus `other`, which has the shape of its result and may be overwritten with it:
    a tensor less to clear and fill."""
    if _can_fuse(x, layer) and other.is_contiguous(memory_format=torch.channels_last):
        return _fused_add(x, layer, other)
    out: Tensor = layer(x)
    return out.add_(other)


def _can_fuse(x: Tensor, layer: nn.Conv2d) -> bool:
    return (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and x.dtype == layer.weight.dtype
        and x.is_contiguous(memory_format=torch.channels_last)
        and bool(torch.backends.mkldnn.enabled)
        and _works(x.dtype)
    )


def _fused_relu(x: Tensor, layer: nn.Conv2d) -> Tensor:
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, layer.weight, layer.bias, *_geometry(layer), "relu", [], ""
    )
    return out


def _fused_add(x: Tensor, layer: nn.Conv2d, other: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
        other, x, layer.weight, layer.bias, *_geometry(layer), "add", 1.0, None, [], ""
    )
    return out


def _geometry(layer: nn.Conv2d) -> tuple[object, ...]:
    return layer.padding, layer.stride, layer.dilation, layer.groups


@cache
@torch.no_grad()
def _works(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators, this CPU runs them in a dtype, and they give what is
    expected."""
    # Not initialised, because that would draw from the caller's random numbers.
    layer = nn.utils.skip_init(nn.Conv2d, 16, 16, 3, padding=1).to(dtype)  # type: ignore[no-untyped-call]
    for parameter in layer.parameters():
        values = torch.linspace(-0.1, 0.1, parameter.numel(), device="cpu")
        parameter.copy_(values.view_as(parameter))
    x = torch.linspace(-1, 1, 16 * 9 * 9, device="cpu")
    x = x.view(1, 9, 9, 16).permute(0, 3, 1, 2).to(dtype)
    try:
        plain = layer(x)
        return all(
            torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02)
            for found, expected in (
                (_fused_relu(x, layer), F.relu(plain)),
                (_fused_add(x, layer, x.clone()), plain + x),
            )
        )
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
