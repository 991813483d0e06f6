"""The networks as the codec runs them: one photo, in windows, on one device.

A photo goes through the networks alone and in windows whose shape follows from its size only. So
its bitstream and its pixels cannot depend on which photos come with it (library kernels do not
give the same last bits for different batch sizes).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .bitstream import Rectangle
from .config import HYPER_STRIDE, Z_LIMIT, CodingPass, Cosets
from .exact import ExactScaleBranch, magnitudes
from .post_filter import GROUP, PostFilter, filter_reach
from .transforms import CORRECTION_UNIT, STRIDE, depth_to_space, space_to_depth
from .weights_file import BFLOAT16_PARTS, Weights
from .windows import Margins, windows

_LATENTS_PER_Z = HYPER_STRIDE // STRIDE
_Z_HALO = 2  # how far, in z, the features of a latent reach
_STRIP = 64  # rows of latents
_PRECISE = 64  # latent channels whose values 8 bits cannot hold, in linear paths and contexts
_STRIP_POSITIONS = 512  # latents
_GROUPS = STRIDE // GROUP  # a latent spans as many in each direction
_FILTER_ROWS = 256  # of groups


class SideInformation:
    """What z_hat says about y, for the whole picture or for a rectangle of latents in it.

    Its two halves are apart, because entropy decoding needs the scales alone.
    """

    def __init__(
        self,
        networks: "Networks",
        z_hat: Tensor,
        quality: Tensor,
        within: Rectangle | None = None,
    ) -> None:
        self._networks = networks
        self._top = self._left = 0
        if within is not None:
            top, left = (max(0, at // _LATENTS_PER_Z - _Z_HALO) for at in within[:2])
            bottom, right = (-(-at // _LATENTS_PER_Z) + _Z_HALO for at in within[2:])
            z_hat = z_hat[:, :, top:bottom, left:right]
            self._top, self._left = top * _LATENTS_PER_Z, left * _LATENTS_PER_Z
        self._z_hat = z_hat
        self._quality = quality

    @cached_property
    def _mean_features(self) -> Tensor:
        features = self._networks.model.h_s_mean.features(self._z_hat.float(), self._quality)
        upright: Tensor = features[0].permute(1, 2, 0)
        return upright

    @cached_property
    def _scale_features(self) -> Tensor:
        return self._networks.exact.features(self._z_hat)

    def means(self, rectangles: Sequence[Rectangle]) -> "MeanPrior":
        """The means of the symbols in some tiles of one shape."""
        return MeanPrior(self._networks, cut(self._mean_features, self._places(rectangles)))

    def scales(self, rectangles: Sequence[Rectangle]) -> "ScalePrior":
        """The table indices of the symbols in some tiles of one shape."""
        return ScalePrior(self._networks, cut(self._scale_features, self._places(rectangles)))

    def _places(self, rectangles: Sequence[Rectangle]) -> list[Rectangle]:
        return [
            (top - self._top, left - self._left, bottom - self._top, right - self._left)
            for top, left, bottom, right in rectangles
        ]


class ScalePrior:
    """The table index of each symbol of tiles, in integers alone: all that entropy coding needs to
    know.

    For every pass in `ModelConfig.passes`, in order: `predict`, then `reveal`. A tile knows nothing
    of its neighbours, so that each can be decoded alone; tiles of one shape are computed together
    because that is faster. All tensors are (tiles, h, w, channels).
    """

    def __init__(self, networks: "Networks", features: Tensor) -> None:
        """features: scale_width channels, uint8."""
        self._exact = networks.exact
        self._features = features
        passes = networks.config.passes
        tiles, height, width, _ = features.shape
        self._masks: dict[Cosets | None, Tensor | None] = {
            p.cosets: p.mask(height, width, features.device) for p in passes
        }
        # The last group's symbols are context to none.
        shape = (tiles, height, width, max(p.known for p in passes))
        self._known = torch.zeros(shape, dtype=torch.int8, device=features.device)

    def mask(self, p: CodingPass) -> Tensor | None:
        """(h, w) bool, True where the pass codes; None where it codes everywhere."""
        return self._masks[p.cosets]

    def predict(self, number: int, p: CodingPass) -> Tensor:
        """Table index of a pass, uint8; 0 at places that it does not code."""
        known = self._known[..., : p.known] if p.known else None
        return self._exact.indices(number, self._features, known, p.grids())

    def reveal(self, p: CodingPass, symbols: Tensor) -> None:
        """Take in the symbols of a pass, integers in any dtype; others than its own don't count."""
        if p.stop > self._known.shape[3]:
            return
        known = self._known[..., p.start : p.stop]
        for places in p.places():
            known[places] = magnitudes(symbols[places])


class MeanPrior:
    """The mean of each symbol of tiles, and what the symbols stand for; used like `ScalePrior`."""

    def __init__(self, networks: "Networks", features: Tensor) -> None:
        """features: mean_width channels, float32."""
        self._predictors = networks.predictors
        self._features = features
        project = networks.model.h_s_mean.project
        self._mean = F.linear(features, project.weight[:, :, 0, 0], project.bias)
        self._residual = torch.zeros_like(self._mean)

    def predict(self, number: int, p: CodingPass) -> Tensor:
        """Mean of a pass, float32; at places that it does not code, what z alone says."""
        mean = self._mean[..., p.start : p.stop]
        if not p.known:
            return mean
        mean, predictor = mean.clone(), self._predictors[number]
        around = F.pad(self._residual[..., : p.known], (0, 0, 1, 1, 1, 1))
        for (row, column), stride in p.grids():
            places = mean[:, row::stride, column::stride]
            if places.numel():
                features = self._features[:, row::stride, column::stride]
                places += predictor(around[:, row:, column:], features, stride)
        return mean

    def reveal(self, p: CodingPass, symbols: Tensor, mean: Tensor) -> None:
        """Take in the symbols of a pass, in any dtype, and the mean it was given; symbols at other
        places than its own don't count."""
        part = slice(p.start, p.stop)
        for places in p.places():
            correction = mean[places] - self._mean[*places, part]
            torch.add(correction, symbols[places], out=self._residual[*places, part])

    def y_hat(self, channels: int) -> Tensor:
        """The reconstruction in steps, float32, of the first channels, once they are revealed."""
        return self._residual[..., :channels].add_(self._mean[..., :channels])


def cut(grid: Tensor, rectangles: Sequence[Rectangle]) -> Tensor:
    """Rectangles of one shape out of (rows, columns, channels): (n, h, w, channels)."""
    parts = [grid[top:bottom, left:right] for top, left, bottom, right in rectangles]
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


class Networks:
    """g_a, g_s, the post-filter, h_a, h_s on a device, in bfloat16 or float32."""

    def __init__(
        self, weights: Weights, device: torch.device, dtype: torch.dtype, *, window: int
    ) -> None:
        """window: side, in latents, of the largest piece computed at once."""
        self.model = weights.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = self.model.config
        self.device = device
        self._window = window
        # The mean branch, but for what steers it, and the quality tables stay in float32, and of
        # the linear paths the channels with large values.
        for name, module in self.model.named_modules():
            if name.startswith(BFLOAT16_PARTS) and isinstance(module, torch.nn.Conv2d):
                module.to(dtype)
        self._dtype = dtype
        precise = self.config.latent if dtype == torch.float32 else _PRECISE
        linear = self.model.g_a.linear
        self._analysis, self._analysis_rest = linear[:precise], linear[precise:].to(dtype)
        linear = self.model.g_s.linear
        self._linear = linear[:, :precise].contiguous()
        self._linear_rest = linear[:, precise:].to(dtype)
        self.predictors = self.model.h_s_mean.predictors(dtype, precise)
        self.exact = ExactScaleBranch(self.model.h_s_scale.integer_layers(), device)
        self.exact.self_test(weights.known_answer)

    def quality(self, quality: float) -> Tensor:
        """A quality as the networks take it, (1,) float32."""
        return torch.tensor([quality], dtype=torch.float32, device=self.device)

    def gain(self, quality: Tensor) -> Tensor:
        """(latent,) float32: latents times this are coded with step 1."""
        gain: Tensor = self.model.gain(quality)
        return gain.flatten()

    def analyse(self, pixels: Tensor, quality: Tensor) -> Tensor:
        """(H, W, 3) uint8 -> y, (rows, columns, latent) float32, not scaled by the gain.

        Beyond the right and lower edges the last pixels repeat up to a multiple of 16.
        """
        height, width, _ = pixels.shape
        rows, columns = -(-height // STRIDE), -(-width // STRIDE)
        shape = (rows, columns, self.config.latent)
        y = torch.empty(shape, dtype=torch.float32, device=self.device)
        for w in windows(rows, columns, size=self._window, halo=self.config.analysis_radius):
            crop = pixels[
                w.outer_top * STRIDE : w.outer_bottom * STRIDE,
                w.outer_left * STRIDE : w.outer_right * STRIDE,
            ]
            crop = _repeat_edges(
                crop,
                (w.outer_bottom - w.outer_top) * STRIDE,
                (w.outer_right - w.outer_left) * STRIDE,
            )
            # Exact in bfloat16.
            quarter = space_to_depth(crop.permute(2, 0, 1)[None], 4).to(self._dtype).sub_(128)
            correction = self.model.g_a.correction(quarter, quality, w.margins)
            inner = y[w.top : w.bottom, w.left : w.right]
            within, _ = w.margins.scaled(STRIDE // 4).crop(quarter)
            blocks = space_to_depth(within, 4)[0].permute(1, 2, 0)
            precise = len(self._analysis)
            inner[..., :precise] = F.linear(blocks.float(), self._analysis)
            inner[..., precise:] = F.linear(blocks, self._analysis_rest)
            inner.add_(correction[0].permute(1, 2, 0), alpha=CORRECTION_UNIT)
        return y

    def hyper_analyse(self, y: Tensor) -> Tensor:
        """Scaled y (rows, columns, latent) -> z_hat, (1, hyper, rows/4, columns/4) int32."""
        rows, columns, _ = y.shape
        # In strips: the float32 copies that this makes of y would be the codec's largest tensors.
        hidden = torch.cat(
            [
                self.model.h_a.pointwise(strip.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
                for strip in torch.split(y, _STRIP)
            ]
        )
        hidden = _repeat_edges(
            hidden,
            -(-rows // _LATENTS_PER_Z) * _LATENTS_PER_Z,
            -(-columns // _LATENTS_PER_Z) * _LATENTS_PER_Z,
        )
        z: Tensor = self.model.h_a.downsample(hidden.permute(2, 0, 1)[None])
        return torch.floor(z + 0.5).clamp_(-Z_LIMIT, Z_LIMIT).to(torch.int32)

    def side_information(
        self, z_hat: Tensor, quality: Tensor, within: Rectangle | None = None
    ) -> SideInformation:
        """From z_hat, (1, hyper, h, w) integers, for all latents or a rectangle of them."""
        return SideInformation(self, z_hat, quality, within)

    def synthesise(self, y_hat: Tensor, quality: Tensor, height: int, width: int) -> Tensor:
        """y_hat (rows, columns, latent) float32, gain removed -> (height, width, 3) uint8."""
        rows, columns, _ = y_hat.shape
        pixels = torch.empty((height, width, 3), dtype=torch.uint8, device=self.device)
        for w in windows(rows, columns, size=self._window, halo=self.config.synthesis_radius):
            outer = y_hat[w.outer_top : w.outer_bottom, w.outer_left : w.outer_right]
            outer = outer.permute(2, 0, 1)[None]
            seen, unseen = w.margins.split(self.config.filter_radius)
            correction = self.model.g_s.correction(outer, quality, unseen)
            inner, _ = unseen.crop(outer)
            levels = self._levels(inner[0].permute(1, 2, 0), correction[0].permute(1, 2, 0))
            target = pixels[w.top * STRIDE : w.bottom * STRIDE, w.left * STRIDE : w.right * STRIDE]
            if self.model.post_filter is None:
                for top, strip in levels:
                    _write(_as_pixels(strip.clamp_(0, 255).to(torch.uint8)), target, top * STRIDE)
            else:
                groups = torch.empty(
                    (inner.shape[2] * _GROUPS, inner.shape[3] * _GROUPS, GROUP * GROUP * 3),
                    dtype=torch.float32,
                    device=self.device,
                )
                for top, strip in levels:
                    _group(strip, groups[_GROUPS * top :][: _GROUPS * len(strip)])
                self._filter(self.model.post_filter, groups, quality, seen.scaled(_GROUPS), target)
        return pixels

    def synthesise_reduced(self, y_hat: Tensor, shrink: int) -> Tensor:
        """y_hat (rows, columns, channels) -> (16 rows / shrink, 16 columns / shrink, 3) uint8.

        The averages of shrink x shrink pixels of the linear path, from its averaged basis: what the
        networks add to it averages out.
        """
        _, columns, channels = y_hat.shape
        side = STRIDE // shrink
        basis = self.model.g_s.linear[:, :channels].t()[:, :, None, None]
        basis = depth_to_space(depth_to_space(basis, 4), 4)  # (channels, 3, 16, 16)
        basis = F.avg_pool2d(basis, shrink).permute(2, 3, 1, 0).reshape(-1, channels)
        offset = basis.new_full((len(basis),), 128.5)  # rounds, once truncated
        strips = []
        for strip in torch.split(y_hat, _STRIP):
            levels = F.linear(strip.reshape(-1, channels), basis, offset).clamp_(0, 255)
            places = levels.to(torch.uint8).view(len(strip), columns, side, side, 3)
            strips.append(places.transpose(1, 2).reshape(len(strip) * side, columns * side, 3))
        return torch.cat(strips)

    def _levels(self, y_hat: Tensor, correction: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Linear path plus correction, (4h, 4w, 48), in strips that stay in a cache.

        Gives the first row of latents of each, and its levels + 0.5, so that cutting off rounds
        them: (rows, 4, w, 4, 48) float32, where 48 is (dy, dx, colour) in a place of 4x4 pixels.
        """
        height, width, latent = y_hat.shape
        offset = y_hat.new_full((768,), 128.5)
        step = max(1, _STRIP_POSITIONS // width)
        for top in range(0, height, step):
            strip = y_hat[top : top + step]
            rows = strip.shape[0]
            large, rest = strip.reshape(-1, latent).tensor_split([self._linear.shape[1]], dim=1)
            levels = F.linear(large, self._linear, offset)
            if rest.shape[1]:
                levels.add_(F.linear(rest.to(self._linear_rest.dtype), self._linear_rest))
            # (row, column, dy of 4, dx of 4, 48): every latent's 4x4 places of the correction
            levels = levels.view(rows, width, 4, 4, 48).transpose(1, 2)
            part = correction[4 * top : 4 * (top + rows)].reshape(rows, 4, width, 4, 48)
            yield top, levels.add_(part, alpha=CORRECTION_UNIT)

    def _filter(
        self,
        post_filter: PostFilter,
        groups: Tensor,
        quality: Tensor,
        margins: Margins,
        target: Tensor,
    ) -> None:
        """Groups of pixels, (h, w, 12), through the post-filter and without their margins into
        target, (H, W, 3) uint8. In strips, too."""
        halo = filter_reach(self.config.filter_blocks)
        height, width, _ = groups.shape
        bottom = height - margins.bottom
        for top in range(margins.top, bottom, _FILTER_ROWS):
            end = min(top + _FILTER_ROWS, bottom)
            first = max(0, top - halo)
            outer = groups[first : end + halo].permute(2, 0, 1)[None]
            filtered = post_filter.grouped(outer, quality)
            inner = filtered[:, :, top - first : end - first, margins.left : width - margins.right]
            rows = depth_to_space(inner.clamp(0, 255).to(torch.uint8), GROUP)[0].permute(1, 2, 0)
            _write(rows, target, (top - margins.top) * GROUP)


def _as_pixels(levels: Tensor) -> Tensor:
    """(rows, 4, w, 4, 48) -> (16 rows, 16 w, 3)."""
    rows, _, width, _, _ = levels.shape
    places = levels.view(rows, 4, width, 4, 4, 4, 3).permute(0, 1, 4, 2, 3, 5, 6)
    return places.reshape(rows * STRIDE, width * STRIDE, 3)


def _group(levels: Tensor, groups: Tensor) -> None:
    """(rows, 4, w, 4, 48) into (8 rows, 8 w, 12): groups of 2x2 pixels, as the post-filter takes
    them."""
    rows, _, width, _, _ = levels.shape
    places = levels.view(rows, 4, width, 4, 2, 2, 2, 2, 3).permute(0, 1, 4, 2, 3, 6, 5, 7, 8)
    groups.view(rows, 4, 2, width, 4, 2, 2, 2, 3).copy_(places)


def _write(rows: Tensor, target: Tensor, top: int) -> None:
    """Put rows of pixels where they belong, those that the target has."""
    wanted = target[top : top + rows.shape[0]]
    wanted.copy_(rows[: wanted.shape[0], : wanted.shape[1]])


def _repeat_edges(x: Tensor, height: int, width: int) -> Tensor:
    """(h, w, C) -> (height, width, C), the last row and column repeated."""
    if x.shape[0] < height:
        x = torch.cat([x, x[-1:].expand(height - x.shape[0], -1, -1)], dim=0)
    if x.shape[1] < width:
        x = torch.cat([x, x[:, -1:].expand(-1, width - x.shape[1], -1)], dim=1)
    return x
