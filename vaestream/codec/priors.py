"""The entropy model: what the decoder knows about y and z before it reads a symbol.

`ScaleBranch` picks the probability table of every symbol and computes in integers alone, so that
encoder and decoder agree on it on any device, for ever. `MeanBranch` is ordinary float32: a
last-bit difference there moves a pixel by a fraction of a level and never derails the entropy
decoder, because the integer symbols are what is coded.

Both start from z_hat and then, pass by pass (`ModelConfig.passes`), take in the symbols that are
known by then: the scale their magnitudes, as integers; the mean what they stand for.

Sources: Ballé et al., "Variational image compression with a scale hyperprior", ICLR 2018; Minnen
et al., "Joint autoregressive and hierarchical priors", NeurIPS 2018 (mean and context); Ballé et
al., "Integer networks for data compression with latent-variable models", ICLR 2019.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NUM_SCALES, SCALE_MAX, SCALE_MIN, Z_LIMIT, CodingPass, ModelConfig
from .transforms import QualityTable, depth_to_space

# Fixed-point formats of the scale branch, as numbers of fractional bits.
SCALE_WEIGHT_BITS = 6
_ACTIVATION_BITS = 4
_INDEX_BITS = 7  # of the accumulator of the last layer: one real unit is 2**3 table indices
_FLOAT32_EXACT = 2**24

MAGNITUDE_LIMIT = 15
MAGNITUDE_UNIT = 4
"""A context reads min(|symbol|, MAGNITUDE_LIMIT) * MAGNITUDE_UNIT, with 4 fractional bits."""


class HyperAnalysis(nn.Module):
    """h_a: (N, latent, H/16, W/16) scaled latents -> (N, hyper, H/64, W/64), not rounded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(config.latent, 128, 1)
        self.down1 = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(128, config.hyper, 3, stride=2, padding=1)

    def forward(self, y: Tensor) -> Tensor:
        return self.downsample(self.pointwise(y))

    def pointwise(self, y: Tensor) -> Tensor:
        """What looks at one position at a time: (N, latent, h, w) -> (N, 128, h, w)."""
        # The logarithm tames the few huge low-frequency values without losing the small ones.
        y = torch.sign(y) * torch.log1p(y.abs())
        return F.relu(self.reduce(y.to(self.reduce.weight.dtype)))

    def downsample(self, hidden: Tensor) -> Tensor:
        """The rest: (N, 128, h, w) -> (N, hyper, h/4, w/4)."""
        hidden = F.relu(self.down1(hidden))
        z: Tensor = self.down2(hidden).float()
        return z


class MeanBranch(nn.Module):
    """h_s, the mean: (N, hyper, H/64, W/64) z_hat -> (N, latent, H/16, W/16), always float32.

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
        """Everything but the last 1x1: (N, mean_width, H/16, W/16)."""
        hidden = F.relu(depth_to_space(self.up1(z_hat), 2) + self.condition(quality))
        return F.relu(depth_to_space(self.up2(hidden), 2))

    def forward(self, z_hat: Tensor, quality: Tensor) -> Tensor:
        """The mean that z alone gives."""
        mean: Tensor = self.project(self.features(z_hat, quality))
        return mean

    def correction(self, number: int, residual: Tensor, features: Tensor) -> Tensor:
        """What the known symbols add to the mean of a pass that has a context.

        residual: (N, known, h, w), y_hat in steps minus the mean that z alone gives; 0 where not
        known. features: `features` of the same places. Returns (N, channels of the pass, h, w).
        """
        out: Tensor = self.context[str(number)](residual, features)
        return out

    def predictors(self, dtype: torch.dtype = torch.float32) -> dict[int, "Predictor"]:
        """`MeanContext.predictor` of every pass that has a context, steered in a dtype."""
        predictors = {}
        for number, context in self.context.items():
            assert isinstance(context, MeanContext)
            predictors[int(number)] = context.predictor(dtype)
        return predictors

    def unfold_contexts(self) -> None:
        """Take the weights of the contexts for those of `predictors`."""
        for context in self.context.values():
            assert isinstance(context, MeanContext)
            context.unfold()


@dataclass(frozen=True)
class Steering:
    """What bends a predictor to the place: its gate and an offset, from the known symbols and z.

    look (hidden, known, 3, 3) with a bias, of the residuals' signed logarithms; join (hidden,
    features); think (hidden, hidden), gate (width, hidden) and offset (channels, hidden), each with
    a bias. A bias is (outputs,).
    """

    look: Tensor
    look_bias: Tensor
    join: Tensor
    think: Tensor
    think_bias: Tensor
    gate: Tensor
    gate_bias: Tensor
    offset: Tensor
    offset_bias: Tensor

    def hidden(self, residual: Tensor, features: Tensor, stride: int) -> Tensor:
        """(n, h, w, hidden) in the dtype of the weights, of what a `Predictor` takes."""
        dtype = self.look.dtype
        tame = torch.copysign(torch.log1p(residual.abs()), residual).to(dtype)
        seen = F.conv2d(tame.permute(0, 3, 1, 2), self.look, self.look_bias, stride)
        hidden = F.relu(seen.permute(0, 2, 3, 1) + F.linear(features.to(dtype), self.join))
        return F.relu(F.linear(hidden, self.think, self.think_bias))


@dataclass(frozen=True)
class Predictor:
    """What known symbols add to the mean of others: linear in the residuals, as the step is in the
    picture's contrast, if nothing steers it.

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
            gate = F.linear(hidden, s.gate, s.gate_bias).float()
            offset = F.linear(hidden, s.offset, s.offset_bias).float()
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
        unit = 64 / torch.arange(1, p.stop + 1)
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
        biases = [layer.bias for layer in (self.look, self.think, self.gate, self.offset)]
        look, think, gate, offset = (bias for bias in biases if bias is not None)
        offset_weight, offset = self.offset.weight[:, :, 0, 0] * unit[:, None], offset * unit
        steering = Steering(
            look=self.look.weight.to(dtype),
            look_bias=look.to(dtype),
            join=self.join.weight[:, :, 0, 0].to(dtype),
            think=self.think.weight[:, :, 0, 0].to(dtype),
            think_bias=think.to(dtype),
            gate=self.gate.weight[:, :, 0, 0].to(dtype),
            gate_bias=gate.to(dtype),
            offset=offset_weight.to(dtype),
            offset_bias=offset.to(dtype),
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


@dataclass(frozen=True)
class IntegerLayer:
    """clamp((x @ matrix + bias + half) >> shift, 0, limit), by rows.

    matrix: int32 (inputs, outputs). bias: int32 (outputs,). The inputs of a 3x3 convolution are
    ordered (row, column, channel).
    """

    matrix: Tensor
    bias: Tensor
    shift: int
    limit: int


@dataclass(frozen=True)
class PassLayers:
    """The layers of one pass: context is None where nothing is known yet."""

    context: IntegerLayer | None
    index: IntegerLayer


@dataclass(frozen=True)
class ScaleLayers:
    """All integers of the scale branch."""

    up: tuple[IntegerLayer, IntegerLayer]
    passes: tuple[PassLayers, ...]


class ScaleBranch(nn.Module):
    """h_s, the scale: integers in, table index out, by integer arithmetic alone.

    From z_hat: 3x3 to 4*scale_width, depth_to_space, the same again, giving the features of every
    position; 1x1 to the index. A pass with a context adds a hidden layer, 3x3 over the known
    magnitudes plus 1x1 over the features, which the index sees too. Weights are int8 (6 fractional
    bits), activations 0..255 (4 fractional bits), and requantisation adds half and shifts right.
    The methods are the differentiable simulation used in training; `vaestream.codec.exact` runs
    the same integers for coding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.scale_width
        self.passes = config.passes
        self.up1 = nn.Conv2d(config.hyper, 4 * width, 3, padding=1)
        self.up2 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.project = nn.Conv2d(width, config.latent, 1)
        self.context = nn.ModuleDict(
            {
                str(number): ScaleContext(
                    p.known, width, config.scale_context_width, p.stop - p.start
                )
                for number, p in enumerate(self.passes)
                if p.known
            }
        )
        with torch.no_grad():
            # z_hat spans tens of units, so the first layer starts small; the last starts at a
            # standard deviation near one step.
            self.up1.weight.mul_(0.5)
            nn.init.constant_(self.project.bias, 20 / 8)  # type: ignore[arg-type]

    def features(self, z_hat: Tensor) -> Tensor:
        """(N, hyper, H/64, W/64) integers -> (N, scale_width, H/16, W/16) float32."""
        hidden = z_hat.float()
        for layer, in_bits in ((self.up1, 0), (self.up2, _ACTIVATION_BITS)):
            acc = _fake_quantised_conv(layer, hidden, in_bits)
            hidden = depth_to_space(_quantise_activation(acc), 2)
        return hidden

    def index(self, number: int, features: Tensor, symbols: Tensor | None = None) -> Tensor:
        """Table index of every symbol of a pass: (N, channels, h, w) in [0, 63], float32.

        symbols: (N, known, h, w) integers, 0 where not known, for a pass that has a context.
        """
        p = self.passes[number]
        acc = _fake_quantised_conv(self.project, features, _ACTIVATION_BITS, p.start, p.stop)
        if symbols is not None:
            context = self.context[str(number)]
            assert isinstance(context, ScaleContext)
            magnitudes = symbols.abs().clamp_max(MAGNITUDE_LIMIT)
            magnitudes = magnitudes * (MAGNITUDE_UNIT * 2.0**-_ACTIVATION_BITS)
            hidden = _fake_quantised_conv(context.mix, magnitudes, _ACTIVATION_BITS)
            hidden = hidden + _fake_quantised_conv(context.join, features, _ACTIVATION_BITS)
            hidden = _quantise_activation(hidden)
            acc = acc + _fake_quantised_conv(context.out, hidden, _ACTIVATION_BITS)
        unit = 2.0 ** (SCALE_WEIGHT_BITS + _ACTIVATION_BITS - _INDEX_BITS)
        return round_ste(acc * unit).clamp(0, NUM_SCALES - 1)

    def integer_layers(self) -> ScaleLayers:
        """The integers that coding computes with.

        Raises ValueError if a sum could leave the range in which float32 counts exactly.
        """
        shift = SCALE_WEIGHT_BITS
        up1 = _integer_layer([(self.up1, Z_LIMIT)], 0, shift - _ACTIVATION_BITS, 255)
        up2 = _integer_layer([(self.up2, 255)], _ACTIVATION_BITS, shift, 255)
        passes = []
        for number, p in enumerate(self.passes):
            hidden = None
            last = [(self.project, 255)]
            rows = slice(p.start, p.stop)
            if p.known:
                context = self.context[str(number)]
                assert isinstance(context, ScaleContext)
                first = [(context.mix, MAGNITUDE_LIMIT * MAGNITUDE_UNIT), (context.join, 255)]
                hidden = _integer_layer(first, _ACTIVATION_BITS, shift, 255)
                last.append((context.out, 255))
            index = _integer_layer(last, _ACTIVATION_BITS, _INDEX_BITS, NUM_SCALES - 1, rows)
            passes.append(PassLayers(hidden, index))
        return ScaleLayers((up1, up2), tuple(passes))


class ScaleContext(nn.Module):
    """Weights by which the magnitudes of known symbols change the index."""

    def __init__(self, known: int, features: int, width: int, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(known, width, 3, padding=1)
        self.join = nn.Conv2d(features, width, 1, bias=False)
        self.out = nn.Conv2d(width, channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)


def round_ste(x: Tensor) -> Tensor:
    """Round half up, with the gradient of the identity."""
    return x + (torch.floor(x + 0.5) - x).detach()


def integer_weight(weight: Tensor) -> Tensor:
    """Weights of the scale branch in units of 2**-6: integers in [-127, 127], as floats."""
    return torch.round(weight * 2**SCALE_WEIGHT_BITS).clamp(-127, 127)


def _integer_layer(
    convolutions: list[tuple[nn.Conv2d, int]],
    in_bits: int,
    shift: int,
    limit: int,
    rows: slice | None = None,
) -> IntegerLayer:
    """The sum of convolutions, given with the largest magnitude of their inputs, as one layer.

    rows: the outputs to keep of the first, which has the bias; the others have no more.
    """
    bias = convolutions[0][0].bias
    assert bias is not None
    rows = rows or slice(None)
    integer_bias = torch.round(bias[rows].double() * 2 ** (SCALE_WEIGHT_BITS + in_bits)).to(
        torch.int32
    )
    largest = integer_bias.abs().long() + (1 << shift)
    matrices = []
    for number, (convolution, input_limit) in enumerate(convolutions):
        weight = integer_weight(convolution.weight).to(torch.int32)
        weight = weight[rows] if number == 0 else weight
        largest = largest + input_limit * weight.abs().sum(dim=(1, 2, 3))
        # (out, in, kh, kw) -> (kh*kw*in, out)
        matrices.append(weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]))
    if int(largest.max()) >= _FLOAT32_EXACT:
        raise ValueError("scale branch: a sum may pass 2**24, where float32 stops counting")
    return IntegerLayer(torch.cat(matrices), integer_bias, shift, limit)


def _fake_quantised_conv(
    layer: nn.Conv2d, x: Tensor, in_bits: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """The convolution with quantised weights, of the outputs [start, stop)."""
    full = layer.weight[start:stop]
    weight = full + (integer_weight(full) * 2.0**-SCALE_WEIGHT_BITS - full).detach()
    bias = None
    if layer.bias is not None:
        unit = 2.0 ** (SCALE_WEIGHT_BITS + in_bits)
        bias = layer.bias[start:stop]
        bias = bias + (torch.round(bias * unit) / unit - bias).detach()
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, bias, padding=layer.padding)


def _quantise_activation(x: Tensor) -> Tensor:
    return round_ste(x * 2.0**_ACTIVATION_BITS).clamp(0, 255) * 2.0**-_ACTIVATION_BITS


class HyperPrior(nn.Module):
    """Density of z: a logistic per channel whose centre and width follow the quality."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.center = QualityTable(channels)
        self.log_scale = QualityTable(channels)
        nn.init.constant_(self.log_scale.nodes, 1.0)

    def bits(self, z: Tensor, quality: Tensor) -> Tensor:
        """-log2 of the mass of [z - 1/2, z + 1/2]; same shape as z."""
        return -torch.log2(self.mass(z, quality).clamp_min(1e-9))

    def mass(self, z: Tensor, quality: Tensor) -> Tensor:
        """Probability of [z - 1/2, z + 1/2]."""
        centered = z - self.center(quality)
        inverse = torch.exp(-self.log_scale(quality))
        # Taken on the left tail, where the difference of sigmoids does not cancel.
        centered = -centered.abs()
        return torch.sigmoid((centered + 0.5) * inverse) - torch.sigmoid((centered - 0.5) * inverse)


def scale_of_index(index: Tensor) -> Tensor:
    """Standard deviation that a table index stands for, log-spaced; real indices too."""
    step = math.log(SCALE_MAX / SCALE_MIN) / (NUM_SCALES - 1)
    return torch.exp(index * step + math.log(SCALE_MIN))


def gaussian_bits(s: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the mass that a centred Gaussian gives to [s - 1/2, s + 1/2]."""
    s = -s.abs()
    inverse = math.sqrt(0.5) / scale
    mass = 0.5 * (torch.erfc(-(s + 0.5) * inverse) - torch.erfc(-(s - 0.5) * inverse))
    return -torch.log2(mass.clamp_min(1e-9))
