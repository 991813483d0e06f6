"""Training: one run over random crops and qualities, resumable at any moment."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaestream.codec import Codec
from vaestream.codec.config import STANDARD, ModelConfig
from vaestream.codec.hardware import best_dtype, device_of
from vaestream.codec.hyperprior import Hyperprior, Relaxation, TrainingOutput
from vaestream.codec.weights_file import DECODER, Weights, import_weights, with_decoder
from vaestream.errors import WeightsError

from .calibration import calibrated_weights
from .coded import CodedCrops
from .data import PhotoSet, list_photos, split, stratified
from .growth import grown
from .objective import rate_distortion
from .real_coding import RealCoding
from .soap import Soap

_VALIDATION_QUALITIES = (10.0, 30.0, 50.0, 70.0, 90.0)
_CHECKPOINT_SECONDS = 180.0
_LOG_STEPS = 100

ENCODER = ("g_a", "h_a", "log_gain")
"""What latents, scaled, and z follow from, for `TrainingSettings.fixed`."""


@dataclass(frozen=True)
class TrainingSettings:
    """What shapes a run.

    batch, crop: photos a step and their side in pixels (a multiple of 64).
    learning_rate: peak, for the networks; the entropy model learns `entropy_rate` times, the
        post-filter `filter_rate` times, the block transforms, which start near their optimum,
        `linear_rate` times as fast.
    constant: share of the run at the peak; then a cosine to `final_rate` of it.
    linear: share of the run at its start in which only the linear transform and the entropy model
        learn (skipped when the run starts from given weights).
    real: learn with `RealCoding`, by the tables of the given weights, in place of noise.
    coded: how many crops, of twice the side, the given weights code once, before the run, for the
        decoder alone to learn from, in less than half of the time a step. What the encoder writes
        stays, bit by bit. 0: none are, and everything learns.
    enlarged: share of the crops that are enlarged (`PhotoSet.crops`).
    fixed: parts of `Hyperprior` that do not learn, by their names there; see `ENCODER`.
    """

    batch: int = 4
    crop: int = 256
    learning_rate: float = 6e-4
    entropy_rate: float = 3.0
    filter_rate: float = 3.0
    linear_rate: float = 0.1
    warmup: float = 0.01
    constant: float = 0.5
    final_rate: float = 0.01
    linear: float = 0.03
    real: bool = False
    coded: int = 0
    fixed: tuple[str, ...] = ()
    enlarged: float = 0.0
    validation_photos: int = 16
    max_gigabytes: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.validation_photos < 1:
            raise ValueError("batch and validation_photos are at least 1")
        if self.crop < 64 or self.crop % 64:
            raise ValueError(f"crop {self.crop} is no multiple of 64")


def train(
    photos: Iterable[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    init: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    config: ModelConfig | None = None,
    settings: TrainingSettings | None = None,
    log: Callable[[str], None] = print,
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Train on `photos` (files and folders) and write a weights file to `out`.

    The run lasts `minutes` of computing time or `steps`, exactly one of which is given. Beside
    `out` it keeps `OUT.checkpoint`, from which the same call continues after an interruption, and
    `OUT.log.jsonl`, a line every 100 steps (loss, bpp, MSE, learning rate) and one a validation.
    `init` starts from the weights of an earlier run instead of the DCT, in networks that grow to
    `config` where that is given too (`growth.grown`).

    Raises ValueError if not exactly one of minutes and steps is given, and more than 0, or settings
    or config do not fit, SourceError if nothing is there to train on, WeightsError if `init` or the
    checkpoint cannot be used.
    """
    if (minutes is None) == (steps is None):
        raise ValueError("give either minutes or steps")
    if not all(length > 0 for length in (minutes, steps) if length is not None):
        raise ValueError("a run takes more than 0 minutes or steps")
    settings = settings or TrainingSettings()
    out = Path(out)
    if out.is_dir():
        raise WeightsError(f"{out}: is a folder, where a weights file is to be written")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch_device = device_of(device)
    torch.manual_seed(settings.seed)
    relax: Relaxation | None = None
    real = settings.real or settings.coded > 0
    start = b""
    if init is None:
        if real:
            raise ValueError("real coding needs weights to start from")
        model = Hyperprior(config or STANDARD)
    else:
        start, weights = _load_weights(Path(init))
        model = weights.model.train().requires_grad_(True)
        if config is not None and config != model.config:
            if settings.coded and not _same_encoder(config, model.config):
                raise ValueError("a run on coded crops changes the decoder alone")
            model = grown(model, config)
        if real:
            relax = RealCoding(weights.y_tables, torch_device, model.config.lattice_from)
    model.to(torch_device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _Run(model, relax, settings, minutes, steps, start)
    checkpoint = out.with_name(out.name + ".checkpoint")
    if checkpoint.exists():
        run.restore(checkpoint, torch_device)
        log(f"continuing {checkpoint} at step {run.step}")

    training, validation = split(
        list_photos(photos),
        settings.validation_photos,
        min_side=(2 if settings.coded else 1) * settings.crop,
        size=settings.crop,
        max_bytes=int(settings.max_gigabytes * 1e9),
    )
    log(f"{len(training.photos)} photos to train on, {len(validation)} to validate with")
    coded: CodedCrops | None = None
    if settings.coded:
        coded = CodedCrops.of(
            Codec(start, torch_device, torch.float32).encoder,
            training,
            settings.coded,
            2 * settings.crop,
            np.random.default_rng(settings.seed),
            enlarged=settings.enlarged,
        )
        log(f"{settings.coded} crops coded")

    with open(out.with_name(out.name + ".log.jsonl"), "a", encoding="utf-8") as journal:

        def record(entry: dict[str, Any]) -> None:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            log(
                " ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()
                )
            )

        saved = time.monotonic()
        while not run.finished:
            entry = run.advance(coded or training, torch_device)
            if entry is not None:
                record(entry)
            if on_step is not None:
                on_step(run.step)
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                run.save(checkpoint)
                record(_validate(validation, run, torch_device))
                saved = time.monotonic()
        record(_validate(validation, run, torch_device))
    run.save(checkpoint)
    model = run.model.cpu().eval()
    data = with_decoder(start, model) if coded else calibrated_weights(model, training)
    _write_atomically(out, data)
    checkpoint.unlink()
    return out


class _Run:
    """The moving state of a run: model, optimiser, clock."""

    def __init__(
        self,
        model: Hyperprior,
        relax: Relaxation | None,
        settings: TrainingSettings,
        minutes: float | None,
        steps: int | None,
        start: bytes,
    ) -> None:
        """start: the weights file that the run starts from, empty if from none."""
        self.model = model
        self._relax = relax
        self.settings = settings
        self.limit_seconds = math.inf if minutes is None else minutes * 60
        self.limit_steps = math.inf if steps is None else steps
        self.linear = 0.0 if start else settings.linear
        self._start = hashlib.sha256(start).hexdigest()
        self.step = 0
        self.seconds = 0.0
        self.rng = np.random.default_rng(settings.seed)
        unknown = set(settings.fixed) - {name for name, _ in model.named_children()}
        if unknown:
            raise ValueError(f"no parts of the model: {', '.join(sorted(unknown))}")
        entropy = {"h_a", "h_s_mean", "h_s_scale", "z_prior", "log_gain"}
        groups: dict[tuple[bool, float, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            part, factor = name.split(".")[0], 1.0
            if part in settings.fixed or (settings.coded and not name.startswith(DECODER)):
                parameter.requires_grad_(False)
                continue
            if part in entropy:
                factor = settings.entropy_rate
            elif part == "post_filter":
                factor = settings.filter_rate
            elif name.endswith(".linear"):
                factor = settings.linear_rate
            # Those that the linear phase passes over apart: see `Soap`.
            linear = part in entropy or name.endswith(".linear")
            groups.setdefault((parameter.ndim > 1, factor, linear), []).append(parameter)
        self.optimizers: list[torch.optim.Optimizer] = []
        for are_matrices, kind in ((True, Soap), (False, torch.optim.Adam)):
            chosen = [
                {"params": parameters, "peak": settings.learning_rate * factor}
                for (matrices, factor, _), parameters in groups.items()
                if matrices == are_matrices
            ]
            if chosen:
                self.optimizers.append(kind(chosen, lr=0.0))
        self._sums: list[Tensor] = []

    @property
    def progress(self) -> float:
        return max(self.step / self.limit_steps, self.seconds / self.limit_seconds)

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    def rate(self) -> float:
        """Learning rate now, as a share of the peak."""
        s, p = self.settings, self.progress
        if p < s.warmup:
            return (p + 1e-4) / s.warmup
        if p < s.constant or s.constant >= 1:
            return 1.0
        phase = (p - s.constant) / (1 - s.constant)
        return s.final_rate + (1 - s.final_rate) * 0.5 * (1 + math.cos(math.pi * min(phase, 1)))

    def forward(self, x: Tensor, quality: Tensor) -> TrainingOutput:
        """The model's output, in bfloat16 where that does, by the phase of the run."""
        with _autocast(x.device):
            output: TrainingOutput = self.model(
                x, quality, linear_only=self.progress < self.linear, relax=self._relax
            )
        return output

    def decode(self, y_hat: Tensor, quality: Tensor) -> TrainingOutput:
        """Likewise of latents that were coded, the gain removed; their bits count as none."""
        with _autocast(y_hat.device):
            x_hat = self.model.synthesise(y_hat, quality)
        none = torch.zeros_like(quality)
        return TrainingOutput(x_hat, none, none)

    def advance(self, photos: PhotoSet | CodedCrops, device: torch.device) -> dict[str, Any] | None:
        """One step; every 100th returns a log entry."""
        start = time.monotonic()
        s = self.settings
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate()
        if isinstance(photos, CodedCrops):
            y_hat, x, quality = (t.to(device) for t in photos.batch(s.batch, s.crop, self.rng))
            output = self.decode(y_hat, quality)
        else:
            x = photos.crops(s.batch, s.crop, self.rng, enlarged=s.enlarged)
            x = x.to(device, memory_format=torch.channels_last)
            # Every batch spans the qualities.
            quality = torch.from_numpy(stratified(s.batch, 100, self.rng)).float().to(device)
            output = self.forward(x, quality)
        cost = rate_distortion(output, x, quality)
        self.model.zero_grad(set_to_none=True)
        cost.loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if bool(torch.isfinite(norm)):
            for optimizer in self.optimizers:
                optimizer.step()
        self._sums.append(torch.stack([cost.loss, cost.bpp.mean(), cost.mse.mean(), norm]).detach())
        self.step += 1
        self.seconds += time.monotonic() - start
        if self.step % _LOG_STEPS:
            return None
        loss, bpp, mse, gradient = torch.stack(self._sums).mean(0).tolist()
        self._sums.clear()
        return {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "loss": loss,
            "bpp": bpp,
            "mse": mse,
            "gradient": gradient,
            "rate": self.rate(),
        }

    def save(self, path: Path) -> None:
        """Write the whole state; whoever reads `path` sees the old state or the new one."""
        state = {
            "config": asdict(self.model.config),
            "settings": asdict(self.settings),
            "start": self._start,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "linear": self.linear,
        }
        temporary = path.with_name(path.name + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def restore(self, path: Path, device: torch.device) -> None:
        """Continue from `save`. Raises WeightsError if the run there was another one."""
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            ours = self.model.config, asdict(self.settings), self._start
            if (ModelConfig(**state["config"]), state["settings"], state["start"]) != ours:
                raise WeightsError(
                    f"{path}: made by a run from other weights or with other settings; remove it "
                    "first"
                )
            self.model.load_state_dict(state["model"])
            for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(held)
            self.step, self.seconds = state["step"], state["seconds"]
            self.linear = state["linear"]
        except WeightsError:
            raise
        except Exception as error:  # torch.load raises whatever pickle and zip raise
            raise WeightsError(f"{path}: not a usable checkpoint: {error}") from error
        self.rng = np.random.default_rng((self.settings.seed, self.step))


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where that does."""
    dtype = best_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def _validate(crops: Tensor, run: _Run, device: torch.device) -> dict[str, Any]:
    """Estimated bits per pixel and PSNR (dB) of what is set aside, at fixed qualities."""
    curve = []
    for quality in _VALIDATION_QUALITIES:
        torch.manual_seed(0)  # the same noise every time, so that curves compare
        bpp, psnr = [], []
        for x in torch.split(crops, 8):
            x = x.to(device, memory_format=torch.channels_last)
            q = torch.full((len(x),), quality, device=device)
            cost = rate_distortion(run.forward(x, q), x, q)
            bpp.append(cost.bpp)
            psnr.append(10 * torch.log10(255**2 / cost.mse))
        curve.append([round(float(torch.cat(v).mean()), 4) for v in (bpp, psnr)])
    torch.manual_seed(run.step)
    return {"step": run.step, "seconds": round(run.seconds, 1), "validation": curve}


def _same_encoder(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether models differ in nothing but the decoder's shape."""
    decoder = {
        name: getattr(other, name)
        for name in ("synthesis_blocks8", "synthesis_blocks16", "filter_width", "filter_blocks")
    }
    return replace(one, **decoder) == other


def _load_weights(path: Path) -> tuple[bytes, Weights]:
    """A weights file, as it is and loaded. Raises WeightsError naming the file."""
    try:
        data = path.read_bytes()
        return data, import_weights(data)
    except (OSError, WeightsError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
