"""The networks as the codec runs them: one photo, in windows, on one device.

A photo goes through the networks alone and in windows whose shape follows from its size only. So
its bitstream and its pixels cannot depend on which photos come with it (library kernels do not
give the same last bits for different batch sizes).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import HYPER_STRIDE, Z_LIMIT, CodingPass
from .exact import ExactScaleBranch
from .transforms import STRIDE, depth_to_space, space_to_depth
from .weights_file import Weights
from .windows import windows

_LATENTS_PER_Z = HYPER_STRIDE // STRIDE
_STRIP = 64  # rows of latents


class SideInformation:
    """What z_hat says about y, for the whole picture."""

    def __init__(self, networks: "Networks", z_hat: Tensor, quality: Tensor) -> None:
        self._networks = networks
        mean = networks.model.h_s_mean.features(z_hat.float(), quality)
        self._mean = mean[0].permute(1, 2, 0)
        self._scale = networks.exact.features(z_hat)

    def tile(self, top: int, left: int, bottom: int, right: int) -> "TilePrior":
        """The prior of the symbols in a rectangle of latents."""
        return TilePrior(
            self._networks, self._mean[top:bottom, left:right], self._scale[top:bottom, left:right]
        )


class TilePrior:
    """Mean and table index of a tile's symbols, pass by pass, as they become known.

    For every pass in `ModelConfig.passes`, in order: `predict`, then `reveal`. A tile knows nothing
    of its neighbours, so that each can be decoded alone.
    """

    def __init__(self, networks: "Networks", mean_features: Tensor, scale_features: Tensor) -> None:
        """Features: (h, w, mean_width) float32 and (h, w, scale_width) uint8."""
        self._exact = networks.exact
        self._branch = networks.model.h_s_mean
        project = self._branch.project
        self._mean = F.linear(mean_features, project.weight[:, :, 0, 0], project.bias)
        self._features = scale_features
        size = self._mean.shape[:2]
        passes = networks.config.passes
        self._masks = {p.parity: p.mask(*size, self._mean.device) for p in passes}
        self._residual = torch.empty_like(self._mean)
        # The last group's symbols are context to none.
        known = max(p.known for p in passes)
        self._symbols = self._mean.new_zeros((*size, known))

    def mask(self, p: CodingPass) -> Tensor | None:
        """(h, w) bool, True where the pass codes; None where it codes everywhere."""
        return self._masks[p.parity]

    def predict(self, number: int, p: CodingPass) -> tuple[Tensor, Tensor]:
        """Mean and table index of a pass: (h, w, channels) float32 and uint8."""
        mean = self._mean[:, :, p.start : p.stop]
        if not p.known:
            return mean, self._exact.indices(number, self._features)
        residual = self._residual[:, :, : p.known].permute(2, 0, 1)[None]
        correction = self._branch.correction(number, residual)[0].permute(1, 2, 0)
        symbols = self._symbols[:, :, : p.known]
        return mean + correction, self._exact.indices(number, self._features, symbols)

    def reveal(self, p: CodingPass, symbols: Tensor, mean: Tensor) -> None:
        """Take in the symbols of a pass, (h, w, channels) float32, and the mean it was given."""
        part = slice(p.start, p.stop)
        decoded = symbols + (mean - self._mean[:, :, part])
        mask = self.mask(p)
        if mask is not None:
            if p.parity == 0:
                self._residual[:, :, part] = 0
            decoded = torch.where(mask[:, :, None], decoded, self._residual[:, :, part])
            symbols = torch.where(mask[:, :, None], symbols, self._symbols[:, :, part])
        self._residual[:, :, part] = decoded
        if p.stop <= self._symbols.shape[2]:
            self._symbols[:, :, part] = symbols

    def y_hat(self) -> Tensor:
        """The reconstruction in steps, (h, w, latent) float32, once all passes are revealed."""
        return self._residual.add_(self._mean)


class Networks:
    """g_a, g_s, h_a, h_s on a device, in bfloat16 or float32."""

    def __init__(
        self, weights: Weights, device: torch.device, dtype: torch.dtype, *, window: int
    ) -> None:
        """window: side, in latents, of the largest piece computed at once."""
        self.model = weights.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = self.model.config
        self.device = device
        self._window = window
        # The linear paths, the mean branch and the quality tables stay in float32.
        for part in (self.model.g_a, self.model.g_s, self.model.h_a):
            for module in part.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.to(dtype)
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
        y = torch.empty((rows, columns, self.config.latent), device=self.device)
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
            quarter = space_to_depth(crop.permute(2, 0, 1)[None], 4).float().sub_(128)
            part = self.model.g_a.latents(quarter, quality)[0].permute(1, 2, 0)
            y[w.top : w.bottom, w.left : w.right] = part[w.inner(1)]
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

    def side_information(self, z_hat: Tensor, quality: Tensor) -> SideInformation:
        """Mean and scale from z_hat, (1, hyper, h, w) int32."""
        return SideInformation(self, z_hat, quality)

    def synthesise(self, y_hat: Tensor, quality: Tensor, height: int, width: int) -> Tensor:
        """y_hat (rows, columns, latent) float32, gain removed -> (height, width, 3) uint8."""
        rows, columns, _ = y_hat.shape
        pixels = torch.empty((height, width, 3), dtype=torch.uint8, device=self.device)
        for w in windows(rows, columns, size=self._window, halo=self.config.synthesis_radius):
            outer = y_hat[w.outer_top : w.outer_bottom, w.outer_left : w.outer_right]
            quarter = self.model.g_s.quarter(outer.permute(2, 0, 1)[None], quality)
            inner = quarter[:, :, *w.inner(STRIDE // 4)]
            # Rounding before the last rearrangement moves a quarter of the bytes.
            levels = (inner + 128.5).clamp_(0, 255).to(torch.uint8)
            part = depth_to_space(levels, 4)[0].permute(1, 2, 0)
            top, left = w.top * STRIDE, w.left * STRIDE
            target = pixels[top : w.bottom * STRIDE, left : w.right * STRIDE]
            target.copy_(part[: target.shape[0], : target.shape[1]])
        return pixels


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if cpuinfo.exists() else ""
        fast = "avx512_bf16" in flags or "amx_bf16" in flags
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def _repeat_edges(x: Tensor, height: int, width: int) -> Tensor:
    """(h, w, C) -> (height, width, C), the last row and column repeated."""
    if x.shape[0] < height:
        x = torch.cat([x, x[-1:].expand(height - x.shape[0], -1, -1)], dim=0)
    if x.shape[1] < width:
        x = torch.cat([x, x[:, -1:].expand(-1, width - x.shape[1], -1)], dim=1)
    return x
