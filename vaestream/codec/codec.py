"""The codec: pictures to bitstreams and back."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaestream.errors import BitstreamError, ModelMismatchError, WeightsError

from .bitstream import (
    MAX_SIDE,
    MODEL_ID_BYTES,
    Bitstream,
    Header,
    Rectangle,
    pack,
    unpack,
)
from .coding_costs import CodingCosts
from .config import HYPER_STRIDE, Z_LIMIT, CodingPass
from .networks import MeanPrior, Networks, ScalePrior, SideInformation, best_dtype, cut
from .rate_control import rounding_offsets, sample_patches, solve_quality
from .reduction import Source, best_ratio
from .refinement import refine
from .streams import TileDecoder, TileEncoder, decode_z, encode_z
from .transforms import STRIDE
from .view import Region, View
from .weights_file import import_weights

_WINDOW_PIXELS = 2048
_TILES_AT_ONCE = 8
MAX_PIXELS = 1 << 29
"""What `Codec.decode` takes at most unless told otherwise."""

_SEARCH_QUALITY = 50.0
_RATE_TOLERANCE = 0.02
_PSNR_TOLERANCE = 0.05
_SAMPLES_AT_ONCE = 1 << 18
_INT16 = np.iinfo(np.int16)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Encoded:
    """A bitstream, the quality it was made with (0 to 100) and what decoding it gives.

    psnr: dB over all 8-bit samples of the decoded picture, infinite when equal; None when it was
    not measured.
    """

    data: bytes
    quality: float
    psnr: float | None


@dataclass(frozen=True)
class Latents:
    """The integers of a bitstream, or of what a view needs of it: equal on every device. Pickles.

    z_hat: (hyper, H/64, W/64) int16, the hyper-latents of the whole picture. symbols: (rows,
    columns, channels) int16, or int32 where one needs it: the latents y in steps from their means.
    rectangle: where they lie in the picture's grid of latents. header: the bitstream's. view: what
    is to be shown.
    """

    z_hat: Tensor
    symbols: Tensor
    rectangle: Rectangle
    header: Header
    view: View


class Codec:
    """Encodes and decodes 8-bit pictures with one set of weights on one device.

    The same picture, weights, device and quality give the same bytes, whatever comes with it in a
    call. Any device decodes any other's bitstreams without an entropy-coding error; decoded
    pixels may differ by a level or two between devices, and do not on one device.
    """

    def __init__(
        self,
        weights: bytes,
        device: torch.device,
        dtype: torch.dtype,
        *,
        window_pixels: int = _WINDOW_PIXELS,
    ) -> None:
        """weights: a weights file. Most callers want `Codec.load`.

        window_pixels: side of the largest square that goes through the networks at once; memory
        grows with its area.
        """
        loaded = import_weights(weights)
        self.weights = weights
        self.model_id = loaded.id
        self.device = device
        self.dtype = dtype
        self.networks = Networks(loaded, device, dtype, window=max(1, window_pixels // 16))
        self._y_tables = loaded.y_tables
        self._z_tables = loaded.z_tables
        self._rounding = torch.from_numpy(rounding_offsets(loaded.y_tables)).to(device)
        self._costs = CodingCosts(loaded.y_tables, device)

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        storage_options: dict[str, Any] | None = None,
    ) -> "Codec":
        """Load weights from a path or fsspec URL, or the ones that come with vaestream.

        device: "auto" (CUDA if there is one), or what `torch.device` takes. precision: "auto"
        (bfloat16 where the hardware is fast at it), "bfloat16" or "float32".

        Raises WeightsError naming the file if it is missing or cannot be used, ValueError on an
        unknown device or precision.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch_device = torch.device(device)
            torch.empty(0, device=torch_device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used here: {error}") from error
        if precision != "auto" and precision not in _DTYPES:
            raise ValueError(f"precision {precision!r}: one of auto, {', '.join(_DTYPES)}")
        dtype = best_dtype(torch_device) if precision == "auto" else _DTYPES[precision]
        data = shipped_weights() if weights is None else _fetch(weights, storage_options)
        try:
            return cls(data, torch_device, dtype)
        except WeightsError as error:
            raise WeightsError(f"{weights or 'shipped weights'}: {error}") from error

    def encode(self, images: Sequence[NDArray[np.uint8]], quality: float = 50.0) -> list[bytes]:
        """Encode pictures, (H, W, 3) RGB or (H, W) gray uint8, each to a bitstream of its own.

        quality: 0 (smallest) to 100, taken to the nearest hundredth. Raises ValueError on another
        shape, dtype or quality.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[-1] == 3:
            raise ValueError("images is one picture: give a list of them")
        return [self.compress(i, quality=quality, measure=False).data for i in images]

    @torch.inference_mode()
    def compress(
        self,
        image: NDArray[np.uint8],
        *,
        quality: float | None = None,
        target_bpp: float | None = None,
        target_psnr: float | None = None,
        measure: bool = True,
        effort: int = 0,
    ) -> Encoded:
        """Encode one picture at a quality, or at the one that meets a target.

        target_bpp: bits per pixel of the whole bitstream; the result is the largest within 2 % of
        it where the model's range allows. target_psnr: dB; the result is the smallest that
        reaches it where the range allows. measure: also say the PSNR, at the cost of a synthesis.
        effort: steps of `refine`, which take time and save bits; 0 for none.

        Raises ValueError unless exactly one of the three is given, effort is not negative and the
        picture is (H, W, 3) or (H, W) uint8 of 1 to 2**20 pixels a side.
        """
        given = [v for v in (quality, target_bpp, target_psnr) if v is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of quality, target_bpp and target_psnr")
        if effort < 0:
            raise ValueError(f"effort {effort} is negative")
        _check_image(image)
        with torch.autocast(self.device.type, enabled=False):
            if quality is not None:
                if not 0 <= quality <= 100:
                    raise ValueError(f"quality {quality} is outside 0 to 100")
                source = self._source(image, quality)
                return self._encode_at(source, quality, measure=measure, effort=effort)
            if target_bpp is not None:
                return self._encode_to_rate(image, target_bpp, measure=measure, effort=effort)
            assert target_psnr is not None
            return self._encode_to_psnr(image, target_psnr, effort=effort)

    def decode(
        self,
        blobs: Sequence[bytes],
        *,
        region: Region | None = None,
        max_size: int | None = None,
        max_pixels: int | None = MAX_PIXELS,
    ) -> list[NDArray[np.uint8]]:
        """Decode bitstreams to uint8 pictures, (H, W, 3) or (H, W) as they were encoded.

        region: left, top, width and height in pixels of the part to decode, from each; time and
        memory follow from its size. The result is that of decoding all, within a level. max_size:
        shrink what is longer than that on its longer side, at a cost that falls with the size (see
        `View.of`). max_pixels: regions beyond are refused before memory is taken, since a few bytes
        can claim a large picture; None for no limit.

        Raises ModelMismatchError if other weights are needed, BitstreamError if a blob is damaged
        or too large, ValueError if a picture does not have the region.
        """
        if isinstance(blobs, bytes | bytearray | memoryview):
            raise ValueError("blobs is one bitstream: give a list of them")
        return [self._decode_one(blob, region, max_size, max_pixels) for blob in blobs]

    @torch.no_grad()
    def decode_latents(
        self,
        blob: bytes,
        *,
        region: Region | None = None,
        max_size: int | None = None,
        max_pixels: int | None = MAX_PIXELS,
    ) -> Latents:
        """The first half of `decode`, entropy decoding: what `synthesise` makes a picture of.

        For the two halves in different processes, the second with a GPU: the latents are the same
        wherever they are decoded. Raises as `decode` does.
        """
        with torch.autocast(self.device.type, enabled=False):
            stream = self._open(blob)
            header, config = stream.header, self.networks.config
            view = View.of(
                header.width,
                header.height,
                region=region,
                max_size=max_size,
                coded_size=header.coded_size,
            )
            pixels = view.region[2] * view.region[3]
            if max_pixels is not None and pixels > max_pixels:
                raise BitstreamError(
                    f"{pixels} pixels of a picture of {header.width}x{header.height} are more than "
                    f"max_pixels = {max_pixels}"
                )
            passes = config.passes[: view.passes(config.passes)]
            tiles = _overlapping(header, self._wanted(header, view))
            top, left, bottom, right = rectangle = _hull(tiles.values())
            shape = (bottom - top, right - left, passes[-1].stop)
            symbols = torch.empty(shape, dtype=torch.int16, device=self.device)
            z_hat = self._z_hat(stream)
            side = self._side_information(z_hat, header, rectangle)
            for numbers, rectangles in _batches(tiles, part=len(tiles) < header.num_tiles):
                streams = [stream.tiles[n] for n in numbers]
                found = self._decode_tiles(streams, side.scales(rectangles), passes)
                if found.dtype != symbols.dtype:
                    symbols = symbols.to(torch.int32)
                for (y, x, y_end, x_end), tile in zip(rectangles, found, strict=True):
                    symbols[y - top : y_end - top, x - left : x_end - left] = tile
            return Latents(z_hat, symbols, rectangle, header, view)

    def synthesise(self, latents: Latents) -> NDArray[np.uint8]:
        """The second half of `decode`: a uint8 picture, (H, W, 3) or (H, W).

        Raises ModelMismatchError if other weights are needed.
        """
        pixels: NDArray[np.uint8] = self.render(latents).cpu().numpy()
        return pixels

    @torch.no_grad()
    def render(self, latents: Latents) -> Tensor:
        """`synthesise`, with the pixels left on the codec's device."""
        self._check_model(latents.header)
        with torch.autocast(self.device.type, enabled=False):
            return self._render(self._y_hat(latents), latents.header, latents.view)

    @torch.inference_mode()
    def _decode_one(
        self, blob: bytes, region: Region | None, max_size: int | None, max_pixels: int | None
    ) -> NDArray[np.uint8]:
        latents = self.decode_latents(blob, region=region, max_size=max_size, max_pixels=max_pixels)
        with torch.autocast(self.device.type, enabled=False):
            y_hat, header, view = self._y_hat(latents), latents.header, latents.view
            # The synthesis is where memory is scarce.
            del latents
            pixels: NDArray[np.uint8] = self._render(y_hat, header, view).cpu().numpy()
        return pixels

    def _wanted(self, header: Header, view: View) -> Rectangle:
        """The latents that a view follows from."""
        return view.latents(*header.latent_size, halo=self.networks.config.synthesis_radius)

    def _y_hat(self, latents: Latents) -> Tensor:
        """The latents that the view follows from, (rows, columns, channels) float32, the gain
        removed."""
        header = latents.header
        top, left = latents.rectangle[:2]
        symbols, z_hat = (t.to(self.device) for t in (latents.symbols, latents.z_hat))
        channels = symbols.shape[2]
        passes = [p for p in self.networks.config.passes if p.stop <= channels]
        gain = self.networks.gain(self.networks.quality(header.coded_quality))[:channels]
        side = self._side_information(z_hat, header, latents.rectangle)
        wanted = self._wanted(header, latents.view)
        shape = (wanted[2] - wanted[0], wanted[3] - wanted[1], channels)
        y_hat = torch.empty(shape, device=self.device)
        tiles = _overlapping(header, wanted)
        for _, rectangles in _batches(tiles, part=len(tiles) < header.num_tiles):
            places = [
                (y - top, x - left, end - top, right - left) for y, x, end, right in rectangles
            ]
            revealed, means = cut(symbols, places), side.means(rectangles)
            for number, p in enumerate(passes):
                means.reveal(p, revealed[..., p.start : p.stop], means.predict(number, p))
            _paste(y_hat, wanted, rectangles, means.y_hat(channels), gain)
        return y_hat

    def _render(self, y_hat: Tensor, header: Header, view: View) -> Tensor:
        """The view, (H, W, 3) or (H, W) uint8."""
        top, left, bottom, right = (STRIDE * at for at in self._wanted(header, view))
        if view.shrink == 1:
            coded_width, coded_height = header.coded_size
            height, width = min(bottom, coded_height) - top, min(right, coded_width) - left
            quality = self.networks.quality(header.coded_quality)
            pixels = self.networks.synthesise(y_hat, quality, height, width)
        else:
            pixels = self.networks.synthesise_reduced(y_hat, view.shrink)
        if header.channels == 1:
            pixels = _to_gray(pixels)
        if view.is_crop:
            return pixels[view.place(top, left)].contiguous()
        shown = view.show(pixels.cpu().numpy(), top, left)
        return torch.from_numpy(np.require(shown, requirements="W")).to(self.device)

    @torch.inference_mode()
    def count_symbols(self, image: NDArray[np.uint8], quality: float) -> list[NDArray[np.int64]]:
        """How often each table codes each symbol in a picture, for calibrating the tables.

        One array a table: counts of the symbols -r..r that the table holds, and of all others.
        """
        _check_image(image)
        height, width = image.shape[:2]
        header = Header(width, height, 3, quality, self.model_id[: 2 * MODEL_ID_BYTES])
        with torch.autocast(self.device.type, enabled=False):
            q = self.networks.quality(quality)
            y = self._analyse(image, quality).mul_(self.networks.gain(q))
            side = self.networks.side_information(self.networks.hyper_analyse(y), q)
            counts = [np.zeros(len(t.counts), np.int64) for t in self._y_tables]
            for _, rectangles in _batches(dict(enumerate(header.tiles()))):
                means, scales = side.means(rectangles), side.scales(rectangles)
                for symbols, index in self._quantise(cut(y, rectangles), means, scales):
                    flat, number = symbols.ravel(), index.ravel()
                    for i in np.unique(number):
                        table = self._y_tables[i]
                        category = flat[number == i] - table.low
                        category[(category < 0) | (category > table.escape)] = table.escape
                        counts[i] += np.bincount(category, minlength=len(counts[i]))
        return counts

    def _encode_to_rate(
        self, image: NDArray[np.uint8], bpp: float, *, measure: bool, effort: int
    ) -> Encoded:
        """Search with the latents of one analysis, rescaled; then settle on true encodings."""
        if not bpp > 0:
            raise ValueError(f"a target of {bpp} bits per pixel cannot be met")
        pixels = image.shape[0] * image.shape[1]
        low, high = math.log2(bpp * (1 - _RATE_TOLERANCE)), math.log2(bpp)

        def rate(encoded: Encoded) -> float:
            return math.log2(len(encoded.data) * 8 / pixels)

        def search(source: Source, guess: float) -> float:
            latents = self._analyse(source.coded, source.coded_quality(_SEARCH_QUALITY))
            return solve_quality(
                lambda q: rate(self._encode_at(source, q, measure=False, latents=latents)),
                low,
                high,
                guess=guess,
                slope=0.04,
            )

        def settle(source: Source, guess: float) -> Encoded:
            tried: dict[float, Encoded] = {}

            def of_whole(q: float) -> float:
                # Measured at once: the first try mostly stands, and a second encoding costs more.
                tried[q] = self._encode_at(source, q, measure=measure, effort=effort)
                return rate(tried[q])

            solve_quality(of_whole, low, high, guess=guess, slope=0.04, evaluations=4)
            within = [e for e in tried.values() if rate(e) <= high]
            return max(within, key=rate) if within else min(tried.values(), key=rate)

        whole = Source.of(image)
        quality = search(whole, _SEARCH_QUALITY)
        reduced = self._source(image, quality)
        if reduced.ratio > 1:
            found = settle(reduced, search(reduced, quality))
            if rate(found) >= low:
                return found  # else the model's range ends below: the whole reaches farther
        return settle(whole, quality)

    def _encode_to_psnr(self, image: NDArray[np.uint8], psnr: float, *, effort: int) -> Encoded:
        """Search on sample patches; then settle on the whole picture."""
        patches = [Source.of(p) for p in sample_patches(image, side=512, count=3)]

        def of_patches(q: float) -> float:
            error = sum(
                _squared_error(self._encode_at(p, q, measure=True), p.image) for p in patches
            )
            error /= sum(p.image.shape[0] * p.image.shape[1] for p in patches)
            return 10 * math.log10(255**2 / error) if error else math.inf

        def settle(source: Source) -> list[Encoded]:
            tried: dict[float, Encoded] = {}

            def of_whole(q: float) -> float:
                tried[q] = self._encode_at(source, q, measure=True, effort=effort)
                value = tried[q].psnr
                assert value is not None
                return value

            solve_quality(of_whole, psnr, high, guess=guess, slope=0.12)
            return list(tried.values())

        high = psnr + _PSNR_TOLERANCE
        guess = _SEARCH_QUALITY
        if len(patches) > 1:
            guess = solve_quality(of_patches, psnr, high, guess=guess, slope=0.12)
        tried: list[Encoded] = []
        reduced = self._source(image, guess)
        if reduced.ratio > 1:
            tried = settle(reduced)
        if not any(e.psnr is not None and e.psnr >= psnr for e in tried):
            tried = settle(Source.of(image))
        reached = [e for e in tried if e.psnr is not None and e.psnr >= psnr]
        if reached:
            return min(reached, key=lambda e: len(e.data))
        return max(tried, key=lambda e: e.psnr or 0.0)

    def _source(self, image: NDArray[np.uint8], quality: float) -> Source:
        """A picture at the size at which it had better be coded."""

        def measure(source: Source) -> tuple[float, float]:
            encoded = self._encode_at(source, quality, measure=True)
            return 8 * len(encoded.data), _squared_error(encoded, source.image)

        return Source.of(image, best_ratio(image, quality, measure))

    def _analyse(self, image: NDArray[np.uint8], quality: float) -> Tensor:
        """y of a picture, (rows, columns, latent) float32, gain not applied."""
        return self.networks.analyse(self._to_rgb(image), self.networks.quality(quality))

    def _to_rgb(self, image: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 on the device."""
        pixels = _to_tensor(image).to(self.device)
        return pixels[:, :, None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels

    def _encode_at(
        self,
        source: Source,
        quality: float,
        *,
        measure: bool,
        latents: Tensor | None = None,
        effort: int = 0,
    ) -> Encoded:
        """Encode at a quality; `latents` stand in for the analysis."""
        header = source.header(round(quality * 100) / 100, self.model_id)
        q = self.networks.quality(header.coded_quality)
        gain = self.networks.gain(q)
        if latents is None:
            y = self._analyse(source.coded, header.coded_quality).mul_(gain)
        else:
            y = latents * gain
        z_hat = self.networks.hyper_analyse(y)
        if effort:
            pixels = self._to_rgb(source.coded)
            y = refine(self.networks, self._costs, pixels, y, z_hat, q, steps=effort)
        side = self.networks.side_information(z_hat, q)
        z_stream = encode_z(z_hat[0].cpu().numpy(), self._tables_of_z(header.coded_quality))
        streams = [b""] * header.num_tiles
        for numbers, rectangles in _batches(dict(enumerate(header.tiles()))):
            means, scales = side.means(rectangles), side.scales(rectangles)
            encoders = [TileEncoder(self._y_tables) for _ in numbers]
            for symbols, index in self._quantise(cut(y, rectangles), means, scales):
                for i, encoder in enumerate(encoders):
                    encoder.add(symbols[i], index[i])
            for number, encoder in zip(numbers, encoders, strict=True):
                streams[number] = encoder.finish()
            if measure:
                whole = (0, 0, *header.latent_size)
                _paste(y, whole, rectangles, means.y_hat(self.networks.config.latent), gain)
        psnr = None
        if measure:
            view = View.of(header.width, header.height, coded_size=header.coded_size)
            decoded = self._render(y, header, view)
            psnr = _psnr(_to_tensor(source.image).to(self.device), decoded)
        return Encoded(pack(header, z_stream, streams), header.quality, psnr)

    def _quantise(
        self, y: Tensor, means: MeanPrior, scales: ScalePrior
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """Symbols and table indices of tiles of scaled latents, pass by pass: (tiles, symbols).

        Symbols are rounded with a dead zone that is wider where leaving zero is dearer.
        """
        for number, p in enumerate(self.networks.config.passes):
            mean, index = means.predict(number, p), scales.predict(number, p)
            residual = y[..., p.start : p.stop] - mean
            magnitude = residual.abs().add_(self._rounding[index.int()]).floor_()
            symbols = torch.copysign(magnitude, residual, out=magnitude)
            means.reveal(p, symbols, mean)
            scales.reveal(p, symbols)
            mask = scales.mask(p)
            if mask is not None:
                symbols, index = symbols[:, mask], index[:, mask]
            yield (
                symbols.to(torch.int32).flatten(1).cpu().numpy(),
                index.flatten(1).cpu().numpy(),
            )

    def _open(self, blob: bytes) -> Bitstream:
        """A bitstream of this model. Raises what `decode` raises."""
        stream = unpack(blob)
        self._check_model(stream.header)
        return stream

    def _check_model(self, header: Header) -> None:
        if not self.model_id.startswith(header.model_id_prefix):
            raise ModelMismatchError(
                f"written with model {header.model_id_prefix}, but the one at hand is "
                f"{self.model_id[: 2 * MODEL_ID_BYTES]}: load the codec with that model's weights "
                f"(an archive keeps its own under models/)"
            )

    def _z_hat(self, stream: Bitstream) -> Tensor:
        """(hyper, rows, columns) int16, checked."""
        header = stream.header
        columns, rows = (-(-side // HYPER_STRIDE) for side in header.coded_size)
        z_hat = decode_z(stream.z, self._tables_of_z(header.coded_quality), rows, columns)
        if z_hat.min() < -Z_LIMIT or z_hat.max() > Z_LIMIT:
            raise BitstreamError(f"hyper-latents beyond {Z_LIMIT}")
        return torch.from_numpy(z_hat.astype(np.int16)).to(self.device)

    def _side_information(
        self, z_hat: Tensor, header: Header, within: Rectangle
    ) -> SideInformation:
        return self.networks.side_information(
            z_hat[None], self.networks.quality(header.coded_quality), within
        )

    def _decode_tiles(
        self, streams: Sequence[bytes], prior: ScalePrior, passes: Sequence[CodingPass]
    ) -> Tensor:
        """The symbols of the first passes of tiles of one shape: (tiles, h, w, channels) int16, or
        int32 where one needs it."""
        decoders = [TileDecoder(data, self._y_tables) for data in streams]
        found: Tensor | None = None
        for number, p in enumerate(passes):
            index = prior.predict(number, p)
            mask = prior.mask(p)
            coded = (index if mask is None else index[:, mask]).flatten(1).cpu().numpy()
            flat = np.stack([d.take(i) for d, i in zip(decoders, coded, strict=True)])
            symbols = torch.from_numpy(flat).to(self.device)
            if found is None:
                shape = (*index.shape[:3], passes[-1].stop)
                found = torch.empty(shape, dtype=torch.int16, device=self.device)
            if flat.max(initial=0) > _INT16.max or flat.min(initial=0) < _INT16.min:
                found = found.to(torch.int32)
            own = found[..., p.start : p.stop]
            if mask is None:
                own.copy_(symbols.view(index.shape))
            else:
                own[:, mask] = symbols.view(len(flat), -1, index.shape[3]).to(found.dtype)
            prior.reveal(p, own)
        assert found is not None
        return found

    def _tables_of_z(self, quality: float) -> Any:
        return self._z_tables[round(quality / 100 * (len(self._z_tables) - 1))]


def shipped_weights() -> bytes:
    """The weights file that comes with this release."""
    folder = resources.files("vaestream.codec") / "weights"
    try:
        return (folder / "vaestream.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(f"this installation holds no weights: {error.filename}") from error


def _batches(
    tiles: Mapping[int, Rectangle], *, part: bool = False
) -> Iterator[tuple[list[int], list[Rectangle]]]:
    """Tiles, by number, that are computed together: some of one shape, with their numbers.

    part: whether they are part of a picture. A few tiles then are all there is, and would take more
    memory together than all else that a region needs: they come one by one.
    """
    at_once = 1 if part else _TILES_AT_ONCE
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, (top, left, bottom, right) in tiles.items():
        by_shape.setdefault((bottom - top, right - left), []).append(number)
    for numbers in by_shape.values():
        for start in range(0, len(numbers), at_once):
            chosen = numbers[start : start + at_once]
            yield chosen, [tiles[n] for n in chosen]


def _paste(
    y: Tensor, place: Rectangle, rectangles: Sequence[Rectangle], tiles: Tensor, gain: Tensor
) -> None:
    """Write tiles of scaled latents, with the gain removed, into y (rows, columns, channels), what
    of them lies in its place."""
    for rectangle, tile in zip(rectangles, tiles, strict=True):
        top, left = (max(rectangle[i], place[i]) for i in (0, 1))
        bottom, right = (min(rectangle[i], place[i]) for i in (2, 3))
        own = tile[
            top - rectangle[0] : bottom - rectangle[0], left - rectangle[1] : right - rectangle[1]
        ]
        y_part = y[top - place[0] : bottom - place[0], left - place[1] : right - place[1]]
        torch.div(own, gain, out=y_part)


def _overlapping(header: Header, wanted: Rectangle) -> dict[int, Rectangle]:
    """The tiles, by number, that hold some of the latents that are wanted."""
    return {n: tile for n, tile in enumerate(header.tiles()) if _overlap(tile, wanted)}


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _hull(rectangles: Iterable[Rectangle]) -> Rectangle:
    tops, lefts, bottoms, rights = zip(*rectangles, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def _fetch(url: str | os.PathLike[str], storage_options: dict[str, Any] | None) -> bytes:
    try:
        with fsspec.open(os.fspath(url), "rb", **(storage_options or {})) as file:
            data: bytes = file.read()
    except OSError as error:
        raise WeightsError(f"{url}: {error.strerror or error}") from error
    return data


def _check_image(image: NDArray[np.uint8]) -> None:
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] != 3)
    ):
        shape = getattr(image, "shape", None)
        raise ValueError(
            f"a picture is a uint8 array (H, W, 3) or (H, W), not {type(image).__name__} "
            f"of shape {shape} and dtype {getattr(image, 'dtype', None)}"
        )
    if not all(0 < side <= MAX_SIDE for side in image.shape[:2]):
        raise ValueError(f"a picture of {image.shape[1]}x{image.shape[0]} cannot be encoded")


def _to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """Shares the memory where torch can: it wants it contiguous and writable."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"]))


def _to_gray(pixels: Tensor) -> Tensor:
    """(H, W, 3) uint8 -> (H, W) uint8, the rounded mean of the channels."""
    return ((pixels.int().sum(2) * 2 + 3) // 6).to(torch.uint8)


def _squared_error(encoded: Encoded, image: NDArray[np.uint8]) -> float:
    """Of a measured encoding, summed over the pixels; in each the mean over its samples."""
    assert encoded.psnr is not None
    return float(image.shape[0] * image.shape[1] * 255**2 * 10 ** (-encoded.psnr / 10))


def _psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 tensors, in dB."""
    total = 0.0
    for x, y in zip(*(torch.split(t.flatten(), _SAMPLES_AT_ONCE) for t in (a, b)), strict=True):
        difference = x.float().sub_(y)  # small enough to stay in the cache
        total += float(difference.dot(difference))
    return 10 * math.log10(255**2 * a.numel() / total) if total else math.inf
