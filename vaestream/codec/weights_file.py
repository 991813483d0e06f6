"""The weights file: networks, probability tables and the known answer of the integer branch.

One safetensors file (nothing in it can run code). Networks that compute in bfloat16 where the
hardware has it are stored in bfloat16, but for the small ones of the mean branch; the scale branch
in the integers it computes with.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vaestream.errors import WeightsError

from .config import NUM_SCALES, SCALE_MAX, SCALE_MIN, Z_LIMIT, ModelConfig
from .entropy import Table
from .exact import ExactScaleBranch
from .hyperprior import Hyperprior
from .scale_branch import SCALE_WEIGHT_BITS, integer_weight
from .transforms import QUALITY_NODES

_FORMAT = "vaestream-weights"
_VERSION = "6"
# 1 had no contexts, 2 no choice of the steps, 3 none steered, 4 no lattice, 5 no filter.
_READABLE = ("1", "2", "3", "4", "5", "6")
BFLOAT16_PARTS = ("g_a.", "g_s.", "post_filter.", "h_a.")
"""Where convolutions are stored, and where the hardware has it computed, in bfloat16."""

DECODER = ("g_s.", "post_filter.")
"""What only the decoded picture follows from, and no bitstream."""

_TOTAL_COUNT = 1 << 22
_PRIOR_STRENGTH = 32.0  # counts of prior for every category of a table
_HYPER_PRIOR_STRENGTH = 256.0  # counts of prior in a table of z
_TAIL = 6.0  # a table reaches this many standard deviations; beyond it is the escape

Z_QUALITIES = tuple(100.0 * node / (QUALITY_NODES - 1) for node in range(QUALITY_NODES))
"""The qualities for which z has tables of its own."""


@dataclass(frozen=True)
class Weights:
    """A loaded weights file.

    y_tables: one table a scale index. z_tables[node][channel]: one node for each of `Z_QUALITIES`.
    known_answer: CRC-32 that `ExactScaleBranch.self_test` expects.
    id: SHA-256 of the file, hexadecimal.
    """

    model: Hyperprior
    y_tables: list[Table]
    z_tables: list[list[Table]]
    known_answer: int
    id: str


def export_weights(
    model: Hyperprior,
    symbol_counts: Sequence[NDArray[np.int64]] | None = None,
    hyper_counts: Sequence[Sequence[NDArray[np.int64]]] | None = None,
) -> bytes:
    """Bytes of a weights file. The model is on the CPU.

    symbol_counts: what `Encoder.count_symbols` gave, summed over photos and qualities; the tables
    then follow it instead of the Gaussian of their scale. hyper_counts: for each quality of
    `Z_QUALITIES` what `Encoder.count_hyper_symbols` gave, summed over photos; likewise instead of
    the learned logistics.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors[name] = _stored(name, tensor)
    # A reader needs to know nothing of the units they were trained in.
    for number, predictor in model.h_s_mean.predictors().items():
        folded = {"mix.weight": predictor.mix, "out.weight": predictor.out[..., None, None]}
        if (steering := predictor.steering) is not None:
            weight, bias = steering.offset
            folded["offset.weight"], folded["offset.bias"] = weight[..., None, None], bias
        for name, tensor in folded.items():
            tensors[f"h_s_mean.context.{number}.{name}"] = tensor.detach().contiguous()
    y_tables = gaussian_tables()
    if symbol_counts is not None:
        y_tables = [
            _empirical_table(table, _symmetric(counts), _PRIOR_STRENGTH * len(counts))
            for table, counts in zip(y_tables, symbol_counts, strict=True)
        ]
    z_tables = _z_tables(model)
    if hyper_counts is not None:
        z_tables = [
            [
                _empirical_table(table, counts, _HYPER_PRIOR_STRENGTH)
                for table, counts in zip(tables, of_node, strict=True)
            ]
            for tables, of_node in zip(z_tables, hyper_counts, strict=True)
        ]
    tensors.update(_pack_tables("tables.y", y_tables))
    tensors.update(_pack_tables("tables.z", [t for node in z_tables for t in node]))
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(asdict(model.config), sort_keys=True),
        "known_answer": str(
            ExactScaleBranch(
                model.h_s_scale.integer_layers(), torch.device("cpu"), torch.int64
            ).answer()
        ),
    }
    return save_safetensors(tensors, metadata)


def with_decoder(data: bytes, model: Hyperprior) -> bytes:
    """A weights file with `DECODER` of a model, which is on the CPU and may have grown there.

    All else stays as it is, bit by bit, and so does what the encoder makes of a picture. Raises
    WeightsError as `import_weights` does.
    """
    tensors, metadata = _parse(data)
    for name, tensor in model.state_dict().items():
        if name.startswith(DECODER):
            tensors[name] = _stored(name, tensor)
    config = json.dumps(asdict(model.config), sort_keys=True)
    return save_safetensors(tensors, {**metadata, "version": _VERSION, "config": config})


def import_weights(data: bytes) -> Weights:
    """Read a weights file. Raises WeightsError if it is not one, or not one of this version."""
    tensors, metadata = _parse(data)
    try:
        # On the CPU in float32, whatever the process has for its defaults, and without a draw from
        # its random numbers: what a network starts from is thrown away.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = Hyperprior(ModelConfig(**json.loads(metadata["config"]))).float()
        y_tables = _unpack_tables("tables.y", tensors)
        z_flat = _unpack_tables("tables.z", tensors)
        for name in filter(_is_integer, tensors):
            tensors[name] = tensors[name].float() / 2**SCALE_WEIGHT_BITS
        model.load_state_dict({k: v.float() for k, v in tensors.items()})
        model.h_s_mean.unfold_contexts()
        model.h_s_scale.integer_layers()  # raises where sums may be inexact
        answer = int(metadata["known_answer"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"damaged weights: {error}") from error
    channels = model.config.hyper
    if not all(bool(t.isfinite().all()) for t in model.state_dict().values()):
        raise WeightsError("damaged weights: a value is not finite")
    if len(y_tables) != NUM_SCALES or len(z_flat) != QUALITY_NODES * channels:
        raise WeightsError("damaged weights: a probability table is missing")
    if any(t.low > -2 or len(t.counts) != 2 - 2 * t.low for t in y_tables):
        raise WeightsError("damaged weights: a probability table of y is not symmetric")
    z_tables = [z_flat[n * channels : (n + 1) * channels] for n in range(QUALITY_NODES)]
    digest = hashlib.sha256(data).hexdigest()
    return Weights(model.eval().requires_grad_(False), y_tables, z_tables, answer, digest)


def _parse(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a weights file. Raises WeightsError."""
    try:
        tensors = load_safetensors(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"not a safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise WeightsError("a safetensors file, but not of vaestream weights")
    if metadata.get("version") not in _READABLE:
        raise WeightsError(
            f"weights of version {metadata.get('version')}; "
            f"this release reads {', '.join(_READABLE)}"
        )
    return tensors, metadata


def _stored(name: str, tensor: Tensor) -> Tensor:
    """A parameter by its name in `Hyperprior`, in the type that the file has it in."""
    stored = tensor.detach().float()
    if _is_integer(name):
        return integer_weight(stored).to(torch.int8).contiguous()
    if name.startswith(BFLOAT16_PARTS) and not name.endswith((".linear", ".nodes")):
        stored = stored.bfloat16()
    return stored.contiguous()


def _is_integer(name: str) -> bool:
    """Whether a tensor is a weight of the scale branch."""
    return name.startswith("h_s_scale.") and name.endswith(".weight")


def gaussian_tables() -> list[Table]:
    """The table that each scale index stands for before any symbols were counted."""
    tables = []
    for index in range(NUM_SCALES):
        scale = SCALE_MIN * (SCALE_MAX / SCALE_MIN) ** (index / (NUM_SCALES - 1))
        radius = max(2, math.ceil(_TAIL * scale))
        edges = (np.arange(-radius, radius + 2) - 0.5) / scale
        below = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
        tables.append(Table(-radius, _counts(np.diff(below))))
    return tables


def _empirical_table(
    prior: Table, counts: NDArray[np.int64] | NDArray[np.float64], strength: float
) -> Table:
    """Counts of a table's categories, and as many more as `strength` says, spread like the prior:
    they fill up what is thin."""
    expected = prior.counts / prior.counts.sum()
    mass = (counts + strength * expected) / (counts.sum() + strength)
    return Table(prior.low, _counts(mass[:-1]))


def _symmetric(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts of -r..r and of all others, with those of n and -n evened out."""
    return np.append((counts[:-1] + counts[-2::-1]) / 2, counts[-1])


def _z_tables(model: Hyperprior) -> list[list[Table]]:
    """Tables of the learned logistics at each quality node, over their central 1 - 2**-16."""
    tables = []
    with torch.no_grad():
        for node_quality in Z_QUALITIES:
            quality = torch.tensor([node_quality], device="cpu")
            center = model.z_prior.center(quality).double().flatten().numpy()
            scale = model.z_prior.log_scale(quality).double().exp().flatten().numpy()
            row = []
            for c, s in zip(center, scale, strict=True):
                reach = s * math.log(2.0**17)
                low = max(-Z_LIMIT, math.floor(c - reach))
                high = min(Z_LIMIT, math.ceil(c + reach))
                edges = (np.arange(low, high + 2) - 0.5 - c) / s
                row.append(Table(low, _counts(np.diff(1 / (1 + np.exp(-edges))))))
            tables.append(row)
    return tables


def _counts(mass: NDArray[np.float64]) -> NDArray[np.int32]:
    """Integer counts of symbols and, last, of the escape; none is zero."""
    escape = max(1.0 - float(mass.sum()), 2.0**-20)
    counts = np.maximum(1, np.round(np.append(mass, escape) * _TOTAL_COUNT))
    return counts.astype(np.int32)


def _integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cpu")


def _pack_tables(name: str, tables: list[Table]) -> dict[str, Tensor]:
    return {
        f"{name}.low": _integers(t.low for t in tables),
        f"{name}.size": _integers(len(t.counts) for t in tables),
        f"{name}.counts": torch.from_numpy(np.concatenate([t.counts for t in tables])),
    }


def _unpack_tables(name: str, tensors: dict[str, Tensor]) -> list[Table]:
    """Take the tables `name` out of `tensors`."""
    low = tensors.pop(f"{name}.low").tolist()
    size = tensors.pop(f"{name}.size").tolist()
    counts = tensors.pop(f"{name}.counts").numpy()
    if min(size) < 2 or sum(size) != len(counts) or len(low) != len(size) or counts.min() < 1:
        raise ValueError(f"{name} is inconsistent")
    ends = np.cumsum(size)
    return [Table(lo, counts[e - n : e]) for lo, n, e in zip(low, size, ends, strict=True)]
