"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025, with the
statistics of a convolution's output and input channels (its taps count as further samples).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Soap(torch.optim.Optimizer):
    """For weights of linear maps and convolutions, (out, in, ...).

    Weights of one shape are updated together, as batches of matrices: the preconditioners of a
    light network are many and small, and one by one they would cost more than its gradients. So
    either all or none of those that a group has of a shape must have a gradient in a step.

    lr: step size. betas: decay of the first and second moments. statistics_beta: decay of the
    Kronecker factors. refresh: steps between two turns of the eigenbases. max_side: channels beyond
    which a side keeps its own basis.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.98),
        statistics_beta: float = 0.98,
        refresh: int = 10,
        max_side: int = 400,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "statistics_beta": statistics_beta,
            "refresh": refresh,
            "max_side": max_side,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient. Takes no closure."""
        if closure is not None:
            raise ValueError("Soap takes no closure")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for weights in shapes.values():
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        # (batch, out, taps, in): both sides multiply without a copy.
        gradient = torch.stack([_as_taps(p.grad) for p in weights if p.grad is not None])
        state = self.state[weights[0]]
        if not state:
            state["step"] = 0
            for side, size in (("left", gradient.shape[1]), ("right", gradient.shape[3])):
                if size <= group["max_side"]:
                    factor = _second_moment(gradient, side)
                    state[side] = factor
                    state[side + "_basis"] = _eigenvectors(factor)
            state["moment1"] = torch.zeros_like(gradient)
            state["moment2"] = torch.zeros_like(gradient)
            return  # the bases are of this very gradient: its own step would be of size one
        state["step"] += 1
        step, (beta1, beta2) = state["step"], group["betas"]
        projected = _to_basis(gradient, state)
        moment1, moment2 = state["moment1"], state["moment2"]
        moment1.lerp_(projected, 1 - beta1)
        moment2.lerp_(projected.square_(), 1 - beta2)
        size = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        update = _from_basis(moment1 / moment2.sqrt().add_(group["eps"]), state)
        for p, u in zip(weights, update, strict=True):
            p.sub_(_like(u, p), alpha=size)
        for side in ("left", "right"):
            if side in state:
                state[side].lerp_(_second_moment(gradient, side), 1 - group["statistics_beta"])
        if step % group["refresh"] == 0:
            _refresh(state)


def _eigenvectors(factor: Tensor) -> Tensor:
    """Of symmetric matrices, those of the largest eigenvalues first."""
    scale = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[:, None, None]
    vectors: Tensor = torch.linalg.eigh((factor / scale).double())[1]
    return vectors.flip(-1).to(factor.dtype).contiguous()


def _as_taps(x: Tensor) -> Tensor:
    """(out, in, ...) -> (out, taps, in)."""
    return x.flatten(2).transpose(1, 2) if x.ndim > 2 else x[:, None]


def _like(x: Tensor, p: Tensor) -> Tensor:
    """(out, taps, in) -> the shape of p."""
    return x.transpose(1, 2).reshape(p.shape) if p.ndim > 2 else x[:, 0]


def _second_moment(x: Tensor, side: str) -> Tensor:
    if side == "left":
        rows = x.flatten(2)
        return rows @ rows.mT
    columns = x.flatten(1, 2)
    return columns.mT @ columns


def _to_basis(x: Tensor, state: dict[str, Any]) -> Tensor:
    if "left" in state:
        x = (state["left_basis"].mT @ x.flatten(2)).view_as(x)
    if "right" in state:
        x = (x.flatten(1, 2) @ state["right_basis"]).view_as(x)
    return x


def _from_basis(x: Tensor, state: dict[str, Any]) -> Tensor:
    if "left" in state:
        x = (state["left_basis"] @ x.flatten(2)).view_as(x)
    if "right" in state:
        x = (x.flatten(1, 2) @ state["right_basis"].mT).view_as(x)
    return x


def _refresh(state: dict[str, Any]) -> None:
    """One step of power iteration turns the bases towards the eigenvectors; moments follow."""
    moment1 = _from_basis(state["moment1"], state)
    moment2 = state["moment2"]
    for side, axis in (("left", 1), ("right", 3)):
        if side not in state:
            continue
        basis = state[side + "_basis"]
        product = state[side] @ basis
        order = (basis * product).sum(-2).argsort(-1, descending=True)
        shape = [len(order), 1, 1, 1]
        shape[axis] = order.shape[1]
        moment2 = torch.take_along_dim(moment2, order.view(shape), axis)
        product = torch.take_along_dim(product, order[:, None, :], 2)
        state[side + "_basis"] = torch.linalg.qr(product)[0].contiguous()
    state["moment2"] = moment2.contiguous()
    state["moment1"] = _to_basis(moment1, state)
