"""The optimiser does what its paper says: Adam, in a basis that follows the gradients."""

import copy

import torch
from torch import Tensor

from vaestream.training.soap import Soap


def _rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return rotation


def _gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_without_a_basis_it_is_adam() -> None:
    weights = [torch.nn.Parameter(torch.zeros(4, 6, 3, 3)) for _ in range(3)]
    soap, adam = weights[:2], weights[2]
    mine = Soap(soap, lr=0.01, betas=(0.9, 0.99), max_side=1)
    theirs = torch.optim.Adam([adam], lr=0.01, betas=(0.9, 0.99))
    for number, gradient in enumerate(_gradients((4, 6, 3, 3), 6)):
        soap[0].grad, soap[1].grad, adam.grad = gradient, -gradient, gradient
        mine.step()
        if number:  # the first gradient only makes the basis
            theirs.step()
    torch.testing.assert_close(soap[0], adam)
    torch.testing.assert_close(soap[1], -adam)


def test_a_turned_problem_takes_turned_steps() -> None:
    left, right = _rotation(6, 2), _rotation(6, 3)
    plain, turned = torch.nn.Parameter(torch.zeros(6, 6)), torch.nn.Parameter(torch.zeros(6, 6))
    both = [Soap([p], lr=0.1, refresh=2) for p in (plain, turned)]
    for gradient in _gradients((6, 6), 7):
        plain.grad, turned.grad = gradient, left @ gradient @ right
        for optimizer in both:
            optimizer.step()
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(turned, left @ plain @ right, rtol=1e-3, atol=1e-3)


def test_it_goes_on_from_its_state() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4, 2, 2))
    optimizer = Soap([weight], lr=0.1, refresh=2)
    gradients = _gradients((3, 4, 2, 2), 8)
    for gradient in gradients[:4]:
        weight.grad = gradient
        optimizer.step()
    copied = torch.nn.Parameter(weight.detach().clone())
    resumed = Soap([copied], lr=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[4:]:
        weight.grad, copied.grad = gradient, gradient.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(weight, copied)


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Soap([unused, used], lr=0.1)
    for gradient in _gradients((3, 4), 3):
        used.grad = gradient
        optimizer.step()
    assert torch.equal(unused, torch.ones(3, 4)) and not torch.equal(used, unused)
