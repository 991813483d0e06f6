"""Fused convolutions give what the steps one by one give, and do not hinder training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vaestream.codec.convolution import convolve_add, convolve_relu


@pytest.fixture
def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(layer, nn.Conv2d)
    return layer


def picture(memory_format: torch.memory_format) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 32, 21, 34, generator=generator)
    return x.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("onednn", [True, False])
def test_results_are_those_of_the_steps(
    layer: nn.Conv2d, memory_format: torch.memory_format, onednn: bool
) -> None:
    x = picture(memory_format)
    before = x.clone()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        relu, plus = convolve_relu(x, layer), convolve_add(x, layer, x.clone())
        plain = layer(x)
    torch.testing.assert_close(relu, F.relu(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plus, plain + x, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def test_a_part_of_a_picture_is_convolved_as_its_copy(layer: nn.Conv2d) -> None:
    part = picture(torch.channels_last)[:, :, 2:-3, 1:-1]
    with torch.no_grad():
        found = convolve_relu(part, layer), convolve_add(part, layer, part.clone())
        copy = part.contiguous(memory_format=torch.channels_last)
        expected = convolve_relu(copy, layer), convolve_add(copy, layer, copy.clone())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_pass(layer: nn.Conv2d) -> None:
    x = picture(torch.channels_last).requires_grad_(True)
    (convolve_relu(x, layer).sum() + convolve_add(x, layer, x).sum()).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and layer.weight.grad is not None
    assert float(x.grad.abs().sum()) > 0 and float(layer.weight.grad.abs().sum()) > 0


def test_autocast_decides_the_precision(layer: nn.Conv2d) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert convolve_relu(picture(torch.channels_last), layer).dtype == torch.bfloat16


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        double = nn.utils.skip_init(nn.Conv2d, 4, 4, 1, dtype=torch.float64)  # type: ignore[no-untyped-call]
        for parameter in double.parameters():
            nn.init.ones_(parameter)
        x = torch.ones(1, 4, 5, 5, dtype=torch.float64).contiguous(
            memory_format=torch.channels_last
        )
        assert float(convolve_relu(x, double)[0, 0, 0, 0]) == 5
    assert torch.equal(torch.rand(1), expected)
