"""The probability table of every symbol of y, from z_hat and from the symbols that are known, in
integers alone: as it learns. `vaestream.codec.exact` runs it for coding.

Source: Ballé et al., "Integer networks for data compression with latent-variable models", ICLR
2019.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NUM_SCALES, Z_LIMIT, ModelConfig
from .rounding import round_ste
from .transforms import depth_to_space

# Fixed-point formats of the scale branch, as numbers of fractional bits.
SCALE_WEIGHT_BITS = 6
_ACTIVATION_BITS = 4
_INDEX_BITS = 7  # of the accumulator of the last layer: one real unit is 2**3 table indices
_FLOAT32_EXACT = 2**24

MAGNITUDE_LIMIT = 15
MAGNITUDE_UNIT = 4
"""A context reads min(|symbol|, MAGNITUDE_LIMIT) * MAGNITUDE_UNIT, with 4 fractional bits."""


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
