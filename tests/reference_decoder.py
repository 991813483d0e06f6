"""A plain decoder of vaestream bitstreams, written from docs/format.md alone.

It takes nothing from the package, so that whatever both decode alike, the format describes.
Sections and steps named here are those of that page. Tensors are (channels, rows, columns).
"""

import bisect
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

EVEN, ODD, OTHERS = {(0, 0)}, {(1, 1)}, {(0, 1), (1, 0)}
"""Positions by the parities of their row and column."""
STEPS = {1: [EVEN | ODD | OTHERS], 2: [EVEN | ODD, OTHERS], 3: [EVEN, ODD, OTHERS]}
GROUP, CHECKS = 32, (15, 23, 27, 29, 30, 31)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Table:
    """Counts of the symbols low, low + step, ...; the last is that of the escape."""

    low: int
    counts: NDArray[np.int64]
    step: int = 1

    @cached_property
    def left(self) -> list[int]:
        """Where the categories begin among the numbers of 24 bits, and where the last ends."""
        k, before = len(self.counts), np.cumsum(self.counts) - self.counts
        begin = np.floor(before * ((2**24 - k) / float(self.counts.sum()))) + np.arange(k)
        return [*begin.astype(np.int64).tolist(), 2**24]

    def of_parity(self, parity: int) -> "Table":
        """For a check ("Groups and checks"): without the symbols of the other parity."""
        first = (self.low + parity) % 2
        return Table(self.low + first, np.append(self.counts[first:-1:2], self.counts[-1]), 2)


@dataclass(frozen=True)
class Pass:
    """Channels [start, stop) at some positions, coded when the channels [0, known) are known."""

    start: int
    stop: int
    known: int
    parities: set[tuple[int, int]]

    def mask(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) bool, True where the pass codes."""
        chosen = torch.zeros(rows, columns, dtype=torch.bool)
        for row, column in self.parities:
            chosen[row::2, column::2] = True
        return chosen


class Weights:
    """Section "The weights file". check_tables: that of index i and a parity at 2 * i + parity."""

    def __init__(self, data: bytes) -> None:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        self.digest = hashlib.sha256(data).digest()
        self.config: dict[str, Any] = json.loads(header["__metadata__"]["config"])
        self.known_answer = int(header["__metadata__"]["known_answer"])
        self.tensors = load(data)
        self.passes = passes_of(self.config)
        self.y_tables, self.z_tables = self.tables("y"), self.tables("z")
        self.check_tables = [table.of_parity(odd) for table in self.y_tables for odd in (0, 1)]

    def tables(self, name: str) -> list[Table]:
        low, size, counts = (self.tensors[f"tables.{name}.{x}"] for x in ("low", "size", "counts"))
        parts = np.split(counts.long().numpy(), size.cumsum(0)[:-1].tolist())
        return [Table(first, part) for first, part in zip(low.tolist(), parts, strict=True)]

    def layer(self, path: str, x: Tensor) -> Tensor:
        """A convolution in float32."""
        weight, bias = self.tensors[f"{path}.weight"], self.tensors.get(f"{path}.bias")
        return convolve(x, weight.float(), None if bias is None else bias.float())

    def integer_layer(self, path: str, x: Tensor, f: int) -> Tensor:
        """`acc` of a layer of `h_s_scale`, its input with f fractional bits."""
        weight = self.tensors[f"h_s_scale.{path}.weight"].double()
        bias = self.tensors.get(f"h_s_scale.{path}.bias")
        bias = None if bias is None else torch.round(bias.double() * 2 ** (6 + f))
        return convolve(x.double(), weight, bias).long()  # float64 holds these sums exactly

    def at_quality(self, path: str, quality: float) -> Tensor:
        """Step 1: a value for each channel."""
        nodes, node = self.tensors[f"{path}.nodes"], min(int(quality / 10), 9)
        return torch.lerp(nodes[node], nodes[node + 1], quality / 10 - node)[:, None, None]


def passes_of(config: dict[str, Any]) -> list[Pass]:
    """Section "Tile stream"."""
    groups = config.get("groups") or []
    if not groups:
        return [Pass(0, config["latent"], 0, STEPS[1][0])]
    passes: list[Pass] = []
    start = 0
    all_steps = config.get("steps") or [2] + [1] * (len(groups) - 1)
    for size, steps in zip(groups, all_steps, strict=True):
        for parities in STEPS[steps]:
            known = start if parities is STEPS[steps][0] else start + size
            passes.append(Pass(start, start + size, known, parities))
        start += size
    return passes


class Reader:
    """Takes bytes off the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        require(self.at <= len(self.data), "cut off")
        return self.data[self.at - size : self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        byte = self.integer(1)
        return byte if byte < 128 else byte - 128 + (self.varint() << 7)


def grid(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of y (stride 16) or z (64)."""
    width, height = size
    return -(-height // stride), -(-width // stride)


def tile_places(rows: int, columns: int) -> list[tuple[slice, slice, slice]]:
    """Section "Grids and tiles": what cuts each tile out of the grid of y."""
    return [
        (slice(None), slice(top, top + 32), slice(left, left + 32))  # the grid cuts the last off
        for top in range(0, rows, 32)
        for left in range(0, columns, 32)
    ]


class Bitstream:
    """Sections "Layout" and "Reduced pictures". Sizes are (width, height), the quality in
    hundredths; a decoder for more than tests would not believe the sizes."""

    def __init__(self, blob: bytes, model: bytes) -> None:
        reader = Reader(blob)
        magic, version, flags, quality, written_with = struct.unpack("<4sBBH8s", reader.take(16))
        require((magic, version) == (b"\x8bVST", 1), "not a bitstream of version 1")
        require(written_with == model, "written with another model")
        require(flags < 4 and quality <= 10000, "unknown flags or a quality above 100")
        self.gray = bool(flags & 1)
        self.size = self.coded_size = reader.varint(), reader.varint()
        self.coded_quality = quality
        if flags & 2:
            self.coded_size = reader.varint(), reader.varint()
            self.coded_quality = reader.integer(2)
        z_size = reader.varint()
        tiles = len(tile_places(*grid(self.coded_size, 16)))
        table = [(reader.varint(), reader.integer(4)) for _ in range(tiles)] if tiles > 1 else []
        covered, crc = blob[: reader.at], reader.integer(4)
        self.z_stream = reader.take(z_size)
        self.tile_streams = [reader.take(size) for size, _ in table] or [reader.rest()]
        require(not reader.rest(), "bytes left over")
        covered += self.z_stream + (b"" if table else self.tile_streams[0])
        require(zlib.crc32(covered) == crc, "CRC mismatch")
        for (_, tile_crc), tile in zip(table, self.tile_streams, strict=False):
            require(zlib.crc32(tile) == tile_crc, "CRC mismatch in a tile")


class SymbolStream:
    """Section "An entropy-coded stream"."""

    def __init__(self, data: bytes) -> None:
        reader = Reader(data)
        zigzag = [reader.varint() for _ in range(reader.varint())]
        self.escapes = [-(v + 1) // 2 if v % 2 else v // 2 for v in zigzag][::-1]  # next one last
        words = reader.rest()
        require(len(words) % 4 == 0, "a part of a word")
        self.words = list(struct.unpack(f"<{len(words) // 4}I", words))
        self.state = 0
        for _ in self.words[:2]:
            self.state = self.state << 32 | self.words.pop()

    def take(self, table: Table) -> int:
        """The next symbol."""
        left, q = table.left, self.state % 2**24
        c = bisect.bisect_right(left, q) - 1
        self.state = (self.state >> 24) * (left[c + 1] - left[c]) + q - left[c]
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        if c < len(table.counts) - 1:
            return table.low + table.step * c
        require(bool(self.escapes), "an escape is missing")
        return self.escapes.pop()

    def finish(self) -> None:
        require(not (self.state or self.words or self.escapes), "symbols left over")


def decode_z(stream: Bitstream, weights: Weights) -> Tensor:
    """Section "z stream": z_hat."""
    rows, columns = grid(stream.coded_size, 64)
    hyper, node = weights.config["hyper"], round(stream.coded_quality / 1000)  # halves to even
    tables = weights.z_tables[node * hyper : (node + 1) * hyper]
    symbols = SymbolStream(stream.z_stream)
    z_hat = [[[symbols.take(t) for _ in range(columns)] for _ in range(rows)] for t in tables]
    symbols.finish()
    return torch.tensor(z_hat)


def decode_tile(data: bytes, weights: Weights, features: Tensor) -> Tensor:
    """Section "Tile stream": the symbols. features: those in the place of the tile."""
    skip, stream = data[0], SymbolStream(data[1:])
    rows, columns = features.shape[1:]
    symbols = torch.zeros(weights.config["latent"], rows, columns, dtype=torch.long)
    for number, p in enumerate(weights.passes):
        mask = p.mask(rows, columns)
        indices = table_indices(weights, number, features, symbols[: p.known])
        numbered = indices.permute(1, 2, 0)[mask]
        decoded = torch.tensor(decode_pass(stream, weights, numbered.flatten().tolist(), skip))
        symbols[p.start : p.stop, mask] = decoded.long().view(numbered.shape).T
    stream.finish()
    return symbols


def decode_pass(stream: SymbolStream, weights: Weights, index: list[int], skip: int) -> list[int]:
    """Sections "Tile stream" and "Groups and checks": a pass's symbols, by their numbers."""
    symbols = [0] * len(index)
    order = sorted(range(len(index)), key=lambda number: index[number])  # stable: then by number
    first = weights.config.get("lattice_from", 64)
    members = [number for number in order if index[number] >= first]
    members = members[len(members) % GROUP :]
    groups = [members[at : at + GROUP] for at in range(0, len(members), GROUP)]
    checks = {group[place] for group in groups for place in CHECKS}
    for number in order:
        if index[number] >= skip and number not in checks:
            symbols[number] = stream.take(weights.y_tables[index[number]])
    keys = []
    for group in groups:
        parities = check_parities([symbols[number] for number in group])
        for place, parity in zip(CHECKS, parities, strict=True):
            keys.append((2 * index[group[place]] + parity, group[place]))
    for key, number in sorted(keys, key=lambda pair: pair[0]):  # stable: then by group and place
        if index[number] >= skip:
            symbols[number] = stream.take(weights.check_tables[key])
    return symbols


def check_parities(symbols: list[int]) -> list[int]:
    """Section "Groups and checks": 1 for each of the CHECKS of a group that is odd."""
    odd = [place for place in range(GROUP) if place not in CHECKS and symbols[place] % 2]
    s, t = 0, len(odd) % 2
    for place in odd:
        s ^= place
    return [int((s >> i) % 2 != t) for i in (4, 3, 2, 1, 0)] + [s.bit_count() % 2]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x[None], weight, bias, padding=weight.shape[2] // 2)[0]


def depth_to_space(x: Tensor, k: int) -> Tensor:
    """D2S(k) of section "Layers"."""
    _, rows, columns = x.shape
    parts = x.reshape(k, k, -1, rows, columns).permute(2, 3, 0, 4, 1)  # c, i, dy, j, dx
    return parts.reshape(-1, k * rows, k * columns)


def rescale(acc: Tensor, bits: int, most: int) -> Tensor:
    """Section "Table indices": clamp((acc + half) >> bits, 0, most)."""
    return ((acc + (1 << (bits - 1))) >> bits).clamp(0, most)


def scale_features(weights: Weights, z_hat: Tensor) -> Tensor:
    """Section "Table indices": the features, with the grid of z times 4."""
    x = depth_to_space(rescale(weights.integer_layer("up1", z_hat, 0), 2, 255), 2)
    return depth_to_space(rescale(weights.integer_layer("up2", x, 4), 6, 255), 2)


def table_indices(weights: Weights, number: int, features: Tensor, known: Tensor) -> Tensor:
    """Section "Table indices", of a pass at all positions of a tile. known: symbols, or 0."""
    p, context = weights.passes[number], f"context.{number}"
    acc = weights.integer_layer("project", features, 4)[p.start : p.stop]
    if p.known:
        hidden = weights.integer_layer(f"{context}.mix", 4 * known.abs().clamp(max=15), 4)
        hidden = rescale(hidden + weights.integer_layer(f"{context}.join", features, 4), 6, 255)
        acc = acc + weights.integer_layer(f"{context}.out", hidden, 4)
    return rescale(acc, 7, 63)


def known_answer(weights: Weights) -> int:
    """What the weights file should have as `known_answer` (section "Table indices")."""

    def pattern(channels: int, rows: int, columns: int) -> Tensor:
        n = np.arange(channels * rows * columns)
        m = ((2654435761 * n + 12345) % 2**32) >> 8
        values = np.where(n % 5 == 0, m % 511 - 255, m % 9 - 4)
        return torch.from_numpy(values).view(channels, rows, columns)

    features = scale_features(weights, pattern(weights.config["hyper"], 5, 7))
    crc = 0
    for number, p in enumerate(weights.passes):
        indices = table_indices(weights, number, features, pattern(p.known, 20, 28))
        crc = zlib.crc32(indices.permute(1, 2, 0).numpy().astype(np.uint8).tobytes(), crc)
    return crc


def y_hat(weights: Weights, z_hat: Tensor, symbols: Tensor, quality: float) -> Tensor:
    """Steps 2 and 3."""
    _, rows, columns = symbols.shape
    x = depth_to_space(weights.layer("h_s_mean.up1", z_hat.float()), 2)
    x = F.relu(x + weights.at_quality("h_s_mean.condition", quality))
    features = F.relu(depth_to_space(weights.layer("h_s_mean.up2", x), 2))[:, :rows, :columns]
    base = weights.layer("h_s_mean.project", features)
    y = base.clone()
    for at in tile_places(rows, columns):
        y[at] += decoded_residuals(weights, features[at], symbols[at])
    return y / torch.exp(weights.at_quality("log_gain", quality))


def decoded_residuals(weights: Weights, features: Tensor, symbols: Tensor) -> Tensor:
    """Step 2 in a tile: symbol + mean - the mean that z_hat alone gives."""
    residuals = torch.zeros(symbols.shape)
    for number, p in enumerate(weights.passes):
        decoded = symbols[p.start : p.stop].float()
        if p.known:
            decoded += mean_context(weights, number, features, residuals[: p.known])
        mask = p.mask(*symbols.shape[1:])
        residuals[p.start : p.stop, mask] = decoded[:, mask]
    return residuals


def mean_context(weights: Weights, number: int, features: Tensor, r: Tensor) -> Tensor:
    """Step 2: what the residuals r of the known channels add to the mean of a pass."""

    def layer(name: str, x: Tensor) -> Tensor:
        return weights.layer(f"h_s_mean.context.{number}.{name}", x)

    if not weights.config.get("mean_context_hidden", 0):
        return layer("out", layer("mix", r))
    seen = layer("look", torch.sign(r) * torch.log(1 + r.abs())) + layer("join", features)
    hidden = F.relu(layer("think", F.relu(seen)))
    return layer("out", layer("mix", r) * (1 + layer("gate", hidden))) + layer("offset", hidden)


def synthesise(weights: Weights, y: Tensor, quality: float) -> Tensor:
    """Step 4: a picture with the full size of the grid."""

    def residual_block(path: str, x: Tensor) -> Tensor:
        hidden = F.relu(weights.layer(f"{path}.reduce", x))
        return x + weights.layer(f"{path}.expand", F.relu(weights.layer(f"{path}.mix", hidden)))

    linear = convolve(y, weights.tensors["g_s.linear"][:, :, None, None], None)
    x = weights.layer("g_s.project", y / 64)
    x = F.relu(x + weights.at_quality("g_s.condition", quality))
    for number in range(weights.config["synthesis_blocks16"]):
        x = residual_block(f"g_s.blocks16.{number}", x)
    x = depth_to_space(weights.layer("g_s.up", x), 2)
    for number in range(weights.config["synthesis_blocks8"]):
        x = residual_block(f"g_s.blocks8.{number}", x)
    x = F.relu(depth_to_space(weights.layer("g_s.expand", x), 2))
    return depth_to_space(depth_to_space(linear, 4) + 16 * weights.layer("g_s.head", x), 4)


def post_filter(weights: Weights, picture: Tensor, quality: float) -> Tensor:
    """Step 5."""
    around = F.avg_pool2d(picture, 6, stride=2, padding=2, count_include_pad=False)
    detail = torch.cat([picture[:, dy::2, dx::2] - around for dy in (0, 1) for dx in (0, 1)])
    u: float = 8.84 * (1.576 / 8.84) ** (quality / 100)
    x = weights.layer("post_filter.first", detail / u)
    x = F.relu(x + weights.at_quality("post_filter.condition", quality))
    for number in range(weights.config["filter_blocks"]):
        block = f"post_filter.blocks.{number}"
        x = x + weights.layer(f"{block}.two", F.relu(weights.layer(f"{block}.one", x)))
    return picture + u * depth_to_space(weights.layer("post_filter.last", x), 2)


def enlarge(pixels: NDArray[np.int64], width: int, height: int) -> NDArray[np.int64]:
    """Step 7."""
    for axis, m in ((1, width), (0, height)):
        n = pixels.shape[axis]
        d = np.arange(n) + 0.5 - (np.arange(m)[:, None] + 0.5) * n / m
        lanczos = np.where(np.abs(d) < 3, np.sinc(d) * np.sinc(d / 3), 0)
        lanczos /= lanczos.sum(axis=1, keepdims=True)
        mean = np.moveaxis(np.tensordot(lanczos, pixels, (1, axis)), 0, axis)
        pixels = np.rint(mean).clip(0, 255).astype(np.int64)
    return pixels


def to_pixels(stream: Bitstream, picture: Tensor) -> NDArray[np.int64]:
    """Steps 6 and 7."""
    (width, height), levels = stream.coded_size, torch.round((picture + 128).clamp(0, 255))
    pixels = levels[:, :height, :width].permute(1, 2, 0).numpy().astype(np.int64)
    if stream.gray:
        pixels = np.rint(pixels.mean(axis=2)).astype(np.int64)
    return pixels if stream.size == stream.coded_size else enlarge(pixels, *stream.size)


@dataclass(frozen=True)
class Decoded:
    """pixels: (height, width[, 3])."""

    z_hat: Tensor
    symbols: Tensor
    pixels: NDArray[np.int64]


def decode(weights: Weights, blob: bytes) -> Decoded:
    """Raises ValueError where a CRC is wrong or something is left over."""
    stream = Bitstream(blob, weights.digest[:8])
    quality = stream.coded_quality / 100
    z_hat = decode_z(stream, weights)
    rows, columns = grid(stream.coded_size, 16)
    features = scale_features(weights, z_hat)[:, :rows, :columns]
    symbols = torch.zeros(weights.config["latent"], rows, columns, dtype=torch.long)
    for at, data in zip(tile_places(rows, columns), stream.tile_streams, strict=True):
        symbols[at] = decode_tile(data, weights, features[at])
    picture = synthesise(weights, y_hat(weights, z_hat, symbols, quality), quality)
    if weights.config.get("filter_width", 0):
        picture = post_filter(weights, picture, quality)
    return Decoded(z_hat, symbols, to_pixels(stream, picture))
