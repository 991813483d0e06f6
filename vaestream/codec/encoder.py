"""The encoding half of the codec: a picture to a bitstream at a quality."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bitstream import MODEL_ID_BYTES, Header, Rectangle, pack
from .coding_costs import CodingCosts
from .config import NUM_SCALES
from .entropy import Table
from .lattice import SEARCH_STRENGTH, LatticeRounding
from .metrics import tensor_psnr
from .networks import MeanPrior, Networks, ScalePrior, cut
from .reduction import Source, best_ratio
from .refinement import refine
from .rendering import render
from .rounding import DEAD_ZONE
from .streams import SymbolCoding, TileEncoder, encode_z, tables_of_z
from .tiles import batches, paste
from .view import View

_Passes = Iterator[tuple[NDArray[np.int32], NDArray[np.uint8]]]
"""Symbols and table indices, pass by pass."""


@dataclass(frozen=True)
class Encoded:
    """A bitstream, the quality it was made with (0 to 100) and what decoding it gives.

    psnr: dB over all 8-bit samples of the decoded picture, infinite when equal; None when it was
    not measured.
    """

    data: bytes
    quality: float
    psnr: float | None


class Encoder:
    """Makes bitstreams of pictures, (H, W, 3) or (H, W) uint8, for callers in inference mode."""

    def __init__(
        self,
        networks: Networks,
        y_tables: Sequence[Table],
        z_tables: Sequence[Sequence[Table]],
        model_id: str,
        *,
        dead_zone: float = DEAD_ZONE,
        search_strength: float = SEARCH_STRENGTH,
    ) -> None:
        """y_tables: one a table index. z_tables: one a channel, for qualities from 0 to 100.
        dead_zone: see `rounding_offsets`. search_strength: likewise of `LatticeRounding`."""
        self._networks = networks
        lattice_from = networks.config.lattice_from
        self.coding = SymbolCoding(y_tables, lattice_from)
        self._y_tables = list(y_tables)
        self._z_tables = z_tables
        self._model_id = model_id
        self._lattice: LatticeRounding | None = None
        if lattice_from < NUM_SCALES:
            self._lattice = LatticeRounding(y_tables, lattice_from, search_strength)
        self._costs = CodingCosts(y_tables, networks.device, self._lattice, dead_zone=dead_zone)

    def source(self, image: NDArray[np.uint8], quality: float) -> Source:
        """A picture at the size at which it had better be coded."""

        def measure(source: Source) -> tuple[float, float]:
            encoded = self.encode(source, quality, measure=True)
            return 8 * len(encoded.data), squared_error(encoded, source.image)

        return Source.of(image, best_ratio(image, quality, measure))

    def analyse(self, image: NDArray[np.uint8], quality: float) -> Tensor:
        """y of a picture, (rows, columns, latent) float32, gain not applied."""
        return self._networks.analyse(self._to_rgb(image), self._networks.quality(quality))

    def encode(
        self,
        source: Source,
        quality: float,
        *,
        measure: bool,
        latents: Tensor | None = None,
        effort: int = 0,
    ) -> Encoded:
        """Encode at a quality. measure: say the PSNR too. latents: of another analysis, in place
        of one. effort: steps of `refine`."""
        header = source.header(round(quality * 100) / 100, self._model_id)
        q = self._networks.quality(header.coded_quality)
        gain = self._networks.gain(q)
        if latents is None:
            y = self.analyse(source.coded, header.coded_quality).mul_(gain)
        else:
            y = latents * gain
        z_hat = self._networks.hyper_analyse(y)
        if effort:
            pixels = self._to_rgb(source.coded)
            y = refine(self._networks, self._costs, pixels, y, z_hat, q, steps=effort)
        z_tables = tables_of_z(self._z_tables, header.coded_quality)
        z_stream = encode_z(z_hat[0].cpu().numpy(), z_tables)
        streams = [b""] * header.num_tiles
        for numbers, rectangles, means, passes in self._tiles(header, y, z_hat, q):
            encoders = [TileEncoder(self.coding) for _ in numbers]
            for symbols, index in passes:
                for i, encoder in enumerate(encoders):
                    encoder.add(symbols[i], index[i])
            for number, encoder in zip(numbers, encoders, strict=True):
                streams[number] = encoder.finish()
            if measure:
                self._reconstruct(y, header, rectangles, means, gain)
        psnr = None
        if measure:
            view = View.of(header.width, header.height, coded_size=header.coded_size)
            decoded = render(self._networks, y, header, view)
            psnr = tensor_psnr(_to_tensor(source.image).to(self._networks.device), decoded)
        return Encoded(pack(header, z_stream, streams), header.quality, psnr)

    @torch.inference_mode()
    def count_symbols(self, image: NDArray[np.uint8], quality: float) -> list[NDArray[np.int64]]:
        """How often each table of y codes each symbol in a picture, for calibrating the tables.

        One array a table: counts of the symbols -r..r that the table holds, and of all others.
        """
        header = self._plain_header(image, quality)
        counts = [np.zeros(len(t.counts), np.int64) for t in self._y_tables]
        with torch.autocast(self._networks.device.type, enabled=False):
            y, z_hat, q = self._latents(image, quality)
            for _, _, _, passes in self._tiles(header, y, z_hat, q):
                for symbols, index in passes:
                    flat, number = symbols.ravel(), index.ravel()
                    for i in np.unique(number):
                        counts[i] += self._y_tables[i].count(flat[number == i])
        return counts

    @torch.inference_mode()
    def count_hyper_symbols(
        self, image: NDArray[np.uint8], quality: float
    ) -> list[NDArray[np.int64]]:
        """As `count_symbols`, for the tables of z at a quality: one array a channel."""
        with torch.autocast(self._networks.device.type, enabled=False):
            _, z_hat, _ = self._latents(image, quality)
        tables = tables_of_z(self._z_tables, quality)
        channels = z_hat[0].flatten(1).cpu().numpy()
        return [table.count(symbols) for table, symbols in zip(tables, channels, strict=True)]

    @torch.inference_mode()
    def decoded_latents(self, image: NDArray[np.uint8], quality: float) -> Tensor:
        """y_hat of a picture, (rows, columns, latent) float32, the gain removed: what decoding its
        bitstream would make the picture of."""
        header = self._plain_header(image, quality)
        with torch.autocast(self._networks.device.type, enabled=False):
            y, z_hat, q = self._latents(image, quality)
            gain = self._networks.gain(q)
            for _, rectangles, means, passes in self._tiles(header, y, z_hat, q):
                for _ in passes:
                    pass
                self._reconstruct(y, header, rectangles, means, gain)
        return y

    def _plain_header(self, image: NDArray[np.uint8], quality: float) -> Header:
        """Of a picture in colour, not reduced."""
        height, width = image.shape[:2]
        return Header(width, height, 3, quality, self._model_id[: 2 * MODEL_ID_BYTES])

    def _latents(self, image: NDArray[np.uint8], quality: float) -> tuple[Tensor, Tensor, Tensor]:
        """y of a picture, scaled by the gain, z_hat, and the quality as the networks take it."""
        q = self._networks.quality(quality)
        y = self.analyse(image, quality).mul_(self._networks.gain(q))
        return y, self._networks.hyper_analyse(y), q

    def _tiles(
        self, header: Header, y: Tensor, z_hat: Tensor, quality: Tensor
    ) -> Iterator[tuple[list[int], list[Rectangle], MeanPrior, _Passes]]:
        """Tiles that are computed together: their numbers and places, their means, and what
        `_quantise` gives of scaled latents y, to be gone through before the next ones."""
        side = self._networks.side_information(z_hat, quality)
        for numbers, rectangles in batches(dict(enumerate(header.tiles()))):
            means, scales = side.means(rectangles), side.scales(rectangles)
            passes = self._quantise(cut(y, rectangles), means, scales)
            yield numbers, rectangles, means, passes

    def _reconstruct(
        self,
        y: Tensor,
        header: Header,
        rectangles: Sequence[Rectangle],
        means: MeanPrior,
        gain: Tensor,
    ) -> None:
        """Put what was coded of tiles into y, the gain removed."""
        whole = (0, 0, *header.latent_size)
        decoded = means.y_hat(self._networks.config.latent)
        paste(y, whole, rectangles, decoded, gain)

    def _quantise(self, y: Tensor, means: MeanPrior, scales: ScalePrior) -> _Passes:
        """Symbols and table indices of tiles of scaled latents, pass by pass: (tiles, symbols).

        Symbols are rounded with dead zones that are wider where the next symbol is dearer; members
        of groups are what a search on the lattice finds.
        """
        for number, p in enumerate(self._networks.config.passes):
            mean, index = means.predict(number, p), scales.predict(number, p)
            residual = y[..., p.start : p.stop] - mean
            magnitude = residual.abs()
            row = index.int().add_(magnitude >= 1, alpha=NUM_SCALES)
            # Several times as fast as indexing.
            offset = self._costs.offsets.index_select(0, row.flatten())
            magnitude.add_(offset.view_as(magnitude)).floor_()
            symbols = torch.copysign(magnitude, residual)
            mask = scales.mask(p)
            flat_symbols, flat_index = _coded(symbols, mask), _coded(index, mask)
            if self._lattice is not None:
                self._lattice.apply(_coded(residual, mask), flat_index, flat_symbols)
                on_lattice = torch.from_numpy(flat_symbols).to(symbols.device)
                if mask is None:
                    symbols = on_lattice.view(symbols.shape)
                else:
                    symbols[:, mask] = on_lattice.view(len(symbols), -1, symbols.shape[3])
            means.reveal(p, symbols, mean)
            scales.reveal(p, symbols)
            yield flat_symbols.astype(np.int32), flat_index

    def _to_rgb(self, image: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 on the device."""
        pixels = _to_tensor(image).to(self._networks.device)
        return pixels[:, :, None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels


def _coded(values: Tensor, mask: Tensor | None) -> NDArray[Any]:
    """(tiles, h, w, channels), where a pass codes: (tiles, symbols)."""
    chosen = values if mask is None else values[:, mask]
    flat: NDArray[Any] = chosen.flatten(1).cpu().numpy()
    return flat


def squared_error(encoded: Encoded, image: NDArray[np.uint8]) -> float:
    """Of a measured encoding, summed over the pixels; in each the mean over its samples."""
    assert encoded.psnr is not None
    return float(image.shape[0] * image.shape[1] * 255**2 * 10 ** (-encoded.psnr / 10))


def _to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """Shares the memory where torch can: it wants it contiguous and writable."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"]))
