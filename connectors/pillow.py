"""Bitstreams as a format of Pillow's: importing this module registers it.

>>> import vaestream.connectors.pillow
>>> from PIL import Image
>>> Image.open("photo.png").convert("RGB").save("photo.vst", quality=50)    # doctest: +SKIP
>>> Image.open("photo.vst").thumbnail((256, 256))                           # doctest: +SKIP

With it, whatever opens files with Pillow reads bitstreams: torchvision's ImageFolder, given
an `is_valid_file` that takes them, and the `image` column of an archive in Hugging Face datasets.
"""

import os
from functools import lru_cache
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile

from vaestream.archive.reader import Archive
from vaestream.codec import Codec
from vaestream.codec.bitstream import MAGIC, MODEL_ID_BYTES, read_header
from vaestream.codec.view import View
from vaestream.errors import BitstreamError, ModelMismatchError

FORMAT = "VAESTREAM"
ENDING = ".vst"
MEDIA_TYPE = "image/x-vaestream"

_HEADER_BYTES = 64
_DRAFTS = (8, 4, 2)


class VaestreamImageFile(ImageFile.ImageFile):
    """A picture of mode "RGB" or "L" whose size is known once it is open, without a model; it is
    decoded when its pixels are asked for.

    `draft`, which `thumbnail` calls, makes that a decoding at 1/2, 1/4 or 1/8 of the size, at a
    fraction of the cost. Errors of the bitstream are an OSError when the pixels are asked for, as
    with Pillow's own formats; one that needs a model which is not at hand says which
    (see `add_model`).
    """

    format = FORMAT
    format_description = "vaestream bitstream"

    _max_size: int | None = None

    def _open(self) -> None:
        try:
            assert self.fp is not None
            header = read_header(self.fp.read(_HEADER_BYTES))
        except BitstreamError as error:
            raise SyntaxError(str(error)) from error  # which tells Pillow to try other formats
        self.fp.seek(0)
        self._mode = "RGB" if header.channels == 3 else "L"
        self._size = header.width, header.height
        self.info["quality"] = header.quality
        self.tile = []

    def draft(
        self, mode: str | None, size: tuple[int, int] | None
    ) -> tuple[str, tuple[int, int, float, float]] | None:
        """Decode at the smallest of 1/2, 1/4 and 1/8 of the size that is not below `size`.

        Returns the mode and the box that the picture has in the smaller one, None where nothing is
        gained or the pixels are there already. The mode stays what it is.
        """
        if size is None or self._max_size is not None or getattr(self, "_im", None) is not None:
            return None
        width, height = self._size
        for divisor in _DRAFTS:
            reduced = max(1, max(width, height) // divisor)
            view = View.of(width, height, max_size=reduced)
            if view.size[0] >= size[0] and view.size[1] >= size[1]:
                self._max_size, self._size = reduced, view.size
                return self.mode, (0, 0, float(view.size[0]), float(view.size[1]))
        return None

    def load(self) -> Any:
        """Decode, if that has not been done."""
        # One that comes out of a pickle or a deep copy has its pixels, and no file.
        file = getattr(self, "fp", None)
        if file is not None and getattr(self, "_im", None) is None:
            file.seek(0)
            blob = file.read()
            try:
                codec = _codec_for(read_header(blob).model_id_prefix)
                limit = None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
                (pixels,) = codec.decode([blob], max_size=self._max_size, max_pixels=limit)
            except (BitstreamError, ModelMismatchError) as error:
                name = os.fsdecode(self.filename) or "picture"
                raise OSError(f"{name}: {error}") from error
            self.im = Image.fromarray(pixels).im
            if self._exclusive_fp and self._close_exclusive_fp_after_loading:
                file.close()
            self.fp = None
        return super().load()


def add_model(model: str | os.PathLike[str] | Archive, *, device: str = "auto") -> None:
    """Decode pictures that were made with a model other than the shipped one, in this process and
    those forked from it.

    model: path or URL of its weights file, or an archive, which has its own. device: as
    `Codec.load` takes it; an archive has one already. Raises WeightsError or ArchiveError.
    """
    codec = model.codec if isinstance(model, Archive) else Codec.load(model, device=device)
    _added()[codec.model_id[: 2 * MODEL_ID_BYTES]] = codec


@lru_cache(maxsize=1)
def _added() -> dict[str, Codec]:
    """Codecs by the model ids that bitstreams tell."""
    return {}


@lru_cache(maxsize=1)
def _shipped() -> Codec:
    return Codec.load()


def _codec_for(model: str) -> Codec:
    """Where there is none for the model, the shipped one, whose error says what is missing."""
    found = _added().get(model)
    return _shipped() if found is None else found


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


def _save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    """Pillow's `save`: quality 0 to 100, or target_bpp, or target_psnr; effort.

    By default at quality 50, and a picture opened from a bitstream at that one's quality.
    """
    if image.mode not in ("RGB", "L"):
        raise OSError(f"cannot write mode {image.mode} as {FORMAT}: convert it to RGB or L")
    asked = image.encoderinfo
    names = ("quality", "target_bpp", "target_psnr")
    rate = {name: asked[name] for name in names if asked.get(name) is not None}
    default = image.info.get("quality", 50.0) if image.format == FORMAT else 50.0
    encoded = _shipped().compress(
        np.asarray(image),
        **(rate or {"quality": default}),
        effort=asked.get("effort", 0),
        measure=False,
    )
    file.write(encoded.data)


def _register() -> None:
    Image.register_open(FORMAT, VaestreamImageFile, _accept)
    Image.register_save(FORMAT, _save)
    Image.register_extension(FORMAT, ENDING)
    Image.register_mime(FORMAT, MEDIA_TYPE)


_register()
