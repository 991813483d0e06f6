"""The mean of every symbol of y, from z_hat and from the symbols that are known: floating point.

See `vaestream.codec.priors`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CodingPass, ModelConfig
from .transforms import QualityTable, depth_to_space, signed_log


class MeanBranch(nn.Module):
    """h_s, the mean: (N, hyper, H/64, W/64) z_hat -> (N, latent, H/16, W/16), in float32 but for
    `Steering`.

    float32 because at high qualities the means reach hundreds of steps, beyond bfloat16.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.mean_width
        self.up1 = nn.Conv2d(config.hyper, 4 * width, 3, padding=1)
        self.up2 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.project = nn.Conv2d(width, config.latent, 1)
        self.condition = QualityTable(width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]
        # By number of the pass; none where nothing is known yet.
        self.context = nn.ModuleDict(
            {
                str(number): MeanContext(p, config)
                for number, p in enumerate(config.passes)
                if p.known
            }
        )

    def features(self, z_hat: Tensor, quality: Tensor) -> Tensor:
        """(N, mean_width, H/16, W/16); `project` makes of it the mean that z alone gives."""
        hidden = F.relu(depth_to_space(self.up1(z_hat), 2) + self.condition(quality))
        return F.relu(depth_to_space(self.up2(hidden), 2))

    def correction(self, number: int, residual: Tensor, features: Tensor) -> Tensor:
        """What the known symbols add to the mean of a pass that has a context.

        residual: (N, known, h, w), y_hat in steps minus the mean that z alone gives; 0 where not
        known. features: `features` of the same places. Returns (N, channels of the pass, h, w).
        """
        out: Tensor = self.context[str(number)](residual, features)
        return out

    def predictors(
        self, dtype: torch.dtype = torch.float32, precise: int = 0
    ) -> dict[int, "Predictor"]:
        """`MeanContext.predictor` of every pass that has a context, steered in a dtype, but in
        float32 where the pass is one of the first `precise` channels."""
        predictors = {}
        for number, context in self.context.items():
            assert isinstance(context, MeanContext)
            own = torch.float32 if context.start < precise else dtype
            predictors[int(number)] = context.predictor(own)
        return predictors

    def unfold_contexts(self) -> None:
        """Take the weights of the contexts for those of `predictors`."""
        for context in self.context.values():
            assert isinstance(context, MeanContext)
            context.unfold()


Dense = tuple[Tensor, Tensor]
"""Weights (outputs, inputs, ...) and biases (outputs,) of a layer."""


@dataclass(frozen=True)
class Steering:
    """What bends a predictor to the place: its gate and an offset, from the known symbols and z.

    look: 3x3, of the signed logarithms of residuals; join, without biases: 1x1, of the features;
    their sum goes through think, 1x1, to gate and offset, 1x1. May compute in bfloat16 where the
    residuals of its pass are small.
    """

    look: Dense
    join: Tensor
    think: Dense
    gate: Dense
    offset: Dense

    def hidden(self, residual: Tensor, features: Tensor, stride: int) -> Tensor:
        """(n, h, w, hidden) in the dtype of the weights, of what a `Predictor` takes."""
        dtype = self.join.dtype
        tame = signed_log(residual).to(dtype)
        seen = F.conv2d(tame.permute(0, 3, 1, 2), *self.look, stride).permute(0, 2, 3, 1)
        hidden = F.relu(seen + F.linear(features.to(dtype), self.join))
        return F.relu(F.linear(hidden, *self.think))


@dataclass(frozen=True)
class Predictor:
    """What known symbols add to the mean of others: linear and without bias if nothing steers it,
    so that the correction scales with the step, whatever the quality.

    mix (width, known, 3, 3), out (channels, width), without bias.
    """

    mix: Tensor
    out: Tensor
    steering: Steering | None

    def __call__(self, residual: Tensor, features: Tensor, stride: int = 1) -> Tensor:
        """Residuals in steps and features (n, h, w, mean_width) -> (n, h, w, channels).

        residual: (n, rows, columns, known), with the neighbours: the place (i, j) of the features
        is in the middle of the 3x3 from (stride*i, stride*j) on.
        """
        gate = offset = None
        if (s := self.steering) is not None:
            hidden = s.hidden(residual, features, stride)
            gate = F.linear(hidden, *s.gate).float()
            offset = F.linear(hidden, *s.offset).float()
        with torch.autocast(residual.device.type, enabled=False):
            mixed = F.conv2d(residual.permute(0, 3, 1, 2), self.mix, None, stride)
            mixed = mixed.permute(0, 2, 3, 1)
            if gate is not None:
                mixed = mixed * (1 + gate)
            mean = F.linear(mixed, self.out)
        return mean if offset is None else mean + offset


class MeanContext(nn.Module):
    """The weights of a `Predictor` of one pass, as they learn."""

    _unit_in: Tensor
    _unit_out: Tensor

    def __init__(self, p: CodingPass, config: ModelConfig) -> None:
        super().__init__()
        known, channels = p.known, p.stop - p.start
        self.start = p.start
        width, hidden = config.mean_context_width, config.mean_context_hidden
        self.mix = nn.Conv2d(known, width, 3, padding=1, bias=False)
        self.out = nn.Conv2d(width, channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)
        self.steered = hidden > 0
        if self.steered:
            self.look = nn.Conv2d(known, hidden, 3, padding=1)
            self.join = nn.Conv2d(config.mean_width, hidden, 1, bias=False)
            self.think = nn.Conv2d(hidden, hidden, 1)
            self.gate = nn.Conv2d(hidden, width, 1)
            self.offset = nn.Conv2d(hidden, channels, 1)
            for layer in (self.gate, self.offset):
                nn.init.zeros_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        # Residuals fall by two orders of magnitude from the first channel to the last. Learning
        # in units of that decline makes all weights alike in size; without it, training is poor.
        unit = 64 / torch.arange(1, p.stop + 1, dtype=torch.float32)
        self.register_buffer("_unit_in", unit[:known, None, None], persistent=False)
        self.register_buffer("_unit_out", unit[p.start : p.stop], persistent=False)

    def forward(self, residual: Tensor, features: Tensor) -> Tensor:
        """(N, known, h, w) and (N, mean_width, h, w) -> (N, channels, h, w)."""
        around = F.pad(residual.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        return self.predictor()(around, features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def predictor(self, dtype: torch.dtype = torch.float32) -> Predictor:
        """With the units in its weights, steered in a dtype; gradients pass."""
        mix = (self.mix.weight / self._unit_in).contiguous(memory_format=torch.channels_last)
        out = self.out.weight[:, :, 0, 0] * self._unit_out[:, None]
        if not self.steered:
            return Predictor(mix, out, None)
        unit = self._offset_unit
        offset, offset_bias = _dense(self.offset, torch.float32)
        steering = Steering(
            look=_dense(self.look, dtype),
            join=self.join.weight[:, :, 0, 0].to(dtype),
            think=_dense(self.think, dtype),
            gate=_dense(self.gate, dtype),
            offset=((offset * unit[:, None]).to(dtype), (offset_bias * unit).to(dtype)),
        )
        return Predictor(mix, out, steering)

    @property
    def _offset_unit(self) -> Tensor:
        return self._unit_out.clamp_max(1)

    @torch.no_grad()
    def unfold(self) -> None:
        """Take the weights that stand here for those of `predictor`."""
        self.mix.weight *= self._unit_in
        self.out.weight /= self._unit_out[:, None, None, None]
        if self.steered:
            assert self.offset.bias is not None
            self.offset.weight /= self._offset_unit[:, None, None, None]
            self.offset.bias /= self._offset_unit


def _dense(layer: nn.Conv2d, dtype: torch.dtype) -> Dense:
    """The weights of a convolution, without its taps if it has one."""
    assert layer.bias is not None
    weight = layer.weight
    if layer.kernel_size == (1, 1):
        weight = weight[:, :, 0, 0]
    return weight.to(dtype), layer.bias.to(dtype)
