"""The codec: pictures to bitstreams and back."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from numbers import Integral
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaestream.errors import BitstreamError, ModelMismatchError, WeightsError
from vaestream.text import describe
from vaestream.urls import public_text, public_url

from .bitstream import MAX_SIDE, MODEL_ID_BYTES, Bitstream, Header, Rectangle, unpack
from .config import HYPER_STRIDE, Z_LIMIT, CodingPass
from .encoder import Encoded, Encoder
from .hardware import best_dtype, device_of
from .networks import Networks, ScalePrior, SideInformation, cut
from .rate_control import encode_to_psnr, encode_to_rate
from .rendering import render, wanted_latents
from .streams import TileDecoder, decode_z, tables_of_z
from .tiles import batches, hull, overlapping, paste
from .view import Region, View
from .weights_file import import_weights

_WINDOW_PIXELS = 2048
MAX_PIXELS = 1 << 29
"""What `Codec.decode` takes at most unless told otherwise."""

_WHOLE_BY_REGION = 8
"""How many times `max_pixels` the whole may have that a region is in: its z is decoded whole."""

_INT16 = np.iinfo(np.int16)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Latents:
    """The integers of a bitstream, or of what a view needs of it: equal on every device. Pickles.

    z_hat: (hyper, H/64, W/64) int16, the hyper-latents of the whole coded picture, H and W its
    sides (`Header.coded_size`). symbols: (rows, columns, channels) int16, or int32 where one needs
    it: the latents y in steps from their means. rectangle: where they lie in the grid of latents.
    header: the bitstream's. view: what is to be shown.
    """

    z_hat: Tensor
    symbols: Tensor
    rectangle: Rectangle
    header: Header
    view: View


class Codec:
    """Encodes and decodes 8-bit pictures with one set of weights on one device.

    The same picture, weights, device, number of threads and quality give the same bytes, whatever
    comes with it in a call. Any device decodes any other's bitstreams without an entropy-coding
    error; pixels of whole pictures may differ by a level or two between devices, and do not on one
    with as many threads.
    """

    def __init__(
        self,
        weights: bytes,
        device: torch.device,
        dtype: torch.dtype,
        *,
        window_pixels: int = _WINDOW_PIXELS,
    ) -> None:
        """weights: a weights file. Most callers want `Codec.load` or `Codec.of`.

        window_pixels: side of the largest square that goes through the networks at once; memory
        grows with its area.
        """
        # Gradients (`effort`) take no tensors of inference mode.
        with torch.inference_mode(False):
            loaded = import_weights(weights)
            window = max(1, window_pixels // 16)
            self.networks = Networks(loaded, device, dtype, window=window)
        self._window_pixels = window_pixels
        self.weights = weights
        self.model_id = loaded.id
        self.device = device
        self.dtype = dtype
        self._z_tables = loaded.z_tables
        self.encoder = Encoder(self.networks, loaded.y_tables, loaded.z_tables, loaded.id)
        self._coding = self.encoder.coding

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
        data = shipped_weights() if weights is None else _fetch(weights, storage_options)
        try:
            return cls.of(data, device=device, precision=precision)
        except WeightsError as error:
            name = "shipped weights" if weights is None else public_url(os.fspath(weights))
            raise WeightsError(f"{name}: {error}") from error

    @classmethod
    def of(cls, weights: bytes, *, device: str = "auto", precision: str = "auto") -> "Codec":
        """With a weights file at hand; device and precision as `load` takes them.

        Raises WeightsError if it cannot be used, ValueError on an unknown device or precision.
        """
        try:
            torch_device = device_of(device)
            torch.empty(0, device=torch_device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used here: {error}") from error
        if precision != "auto" and precision not in _DTYPES:
            raise ValueError(f"precision {precision!r}: one of auto, {', '.join(_DTYPES)}")
        dtype = best_dtype(torch_device) if precision == "auto" else _DTYPES[precision]
        return cls(weights, torch_device, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was made of: the coder's tables are of a library that pickles none."""
        make = partial(type(self), window_pixels=self._window_pixels)
        return make, (self.weights, self.device, self.dtype)

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

        Raises ValueError unless exactly one of the three is given, effort is a whole number, at
        least 0, and the picture is (H, W, 3) or (H, W) uint8 of 1 to 2**20 pixels a side.
        """
        given = [v for v in (quality, target_bpp, target_psnr) if v is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of quality, target_bpp and target_psnr")
        if not isinstance(effort, Integral) or effort < 0:
            raise ValueError(f"effort {effort} is no number of steps")
        _check_image(image)
        with torch.autocast(self.device.type, enabled=False):
            if quality is not None:
                if not 0 <= quality <= 100:
                    raise ValueError(f"quality {quality} is outside 0 to 100")
                source = self.encoder.source(image, quality)
                return self.encoder.encode(source, quality, measure=measure, effort=effort)
            if target_bpp is not None:
                return encode_to_rate(
                    self.encoder, image, target_bpp, measure=measure, effort=effort
                )
            assert target_psnr is not None
            if math.isnan(target_psnr):
                raise ValueError("target_psnr is not a number")
            return encode_to_psnr(self.encoder, image, target_psnr, effort=effort)

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
        memory follow from its size, but for a byte per ten pixels of the whole. The result is that
        of decoding all, within a level. max_size: shrink what is longer than that on its longer
        side, at a cost that falls with the size (see `View.of`). max_pixels: regions beyond, and
        wholes of more than eight times as many, are refused before memory is taken, since a few
        bytes can claim a large picture; None for no limit.

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
            whole = header.width * header.height
            if max_pixels is not None and max(pixels, whole / _WHOLE_BY_REGION) > max_pixels:
                raise BitstreamError(
                    f"{pixels} pixels of a picture of {header.width}x{header.height} are more than "
                    f"max_pixels = {max_pixels} allows"
                )
            passes = config.passes[: view.passes(config.passes)]
            tiles = overlapping(header, wanted_latents(config, header, view))
            top, left, bottom, right = rectangle = hull(tiles.values())
            shape = (bottom - top, right - left, passes[-1].stop)
            symbols = torch.empty(shape, dtype=torch.int16, device=self.device)
            z_hat = self._z_hat(stream)
            side = self._side_information(z_hat, header, rectangle)
            for numbers, rectangles in batches(tiles, part=len(tiles) < header.num_tiles):
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
            return render(self.networks, self._y_hat(latents), latents.header, latents.view)

    @torch.inference_mode()
    def _decode_one(
        self, blob: bytes, region: Region | None, max_size: int | None, max_pixels: int | None
    ) -> NDArray[np.uint8]:
        latents = self.decode_latents(blob, region=region, max_size=max_size, max_pixels=max_pixels)
        with torch.autocast(self.device.type, enabled=False):
            y_hat, header, view = self._y_hat(latents), latents.header, latents.view
            # The synthesis is where memory is scarce.
            del latents
            pixels: NDArray[np.uint8] = render(self.networks, y_hat, header, view).cpu().numpy()
        return pixels

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
        wanted = wanted_latents(self.networks.config, header, latents.view)
        shape = (wanted[2] - wanted[0], wanted[3] - wanted[1], channels)
        y_hat = torch.empty(shape, dtype=torch.float32, device=self.device)
        tiles = overlapping(header, wanted)
        for _, rectangles in batches(tiles, part=len(tiles) < header.num_tiles):
            places = [
                (y - top, x - left, end - top, right - left) for y, x, end, right in rectangles
            ]
            revealed, means = cut(symbols, places), side.means(rectangles)
            for number, p in enumerate(passes):
                means.reveal(p, revealed[..., p.start : p.stop], means.predict(number, p))
            paste(y_hat, wanted, rectangles, means.y_hat(channels), gain)
        return y_hat

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
        tables = tables_of_z(self._z_tables, header.coded_quality)
        z_hat = decode_z(stream.z, tables, rows, columns)
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
        decoders = [TileDecoder(data, self._coding) for data in streams]
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


def shipped_weights() -> bytes:
    """The weights file that comes with this release."""
    folder = resources.files("vaestream.codec") / "weights"
    try:
        return (folder / "vaestream.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(f"this installation holds no weights: {error.filename}") from error


def _fetch(url: str | os.PathLike[str], storage_options: dict[str, Any] | None) -> bytes:
    try:
        with fsspec.open(os.fspath(url), "rb", **(storage_options or {})) as file:
            data: bytes = file.read()
    except Exception as error:  # each store has errors of its own
        # Some stores raise an OSError of their own with the URL in place of number and reason.
        system = isinstance(error, OSError) and isinstance(error.errno, int) and error.strerror
        told = public_text(system or describe(error.__cause__ or error))
        raise WeightsError(f"{public_url(os.fspath(url))}: {told}") from error
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
