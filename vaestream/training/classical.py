"""The classical codecs that Pillow writes, to compare with on the same photos."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from vaestream.errors import VaestreamError


@dataclass(frozen=True)
class ClassicalCodec:
    """A format and settings of Pillow's; `sweep` holds what is varied, from small to large."""

    name: str
    format: str
    parameter: str
    sweep: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, pixels: NDArray[np.uint8], value: int) -> bytes:
        """A whole file without metadata; pixels (H, W, 3) or (H, W) uint8."""
        buffer = io.BytesIO()
        chosen: Any = [value] if self.parameter == "quality_layers" else value
        options = {**self.settings, self.parameter: chosen}
        if pixels.ndim == 3 and self.format == "JPEG2000":
            options["mct"] = 1  # Pillow leaves the channels correlated unless told
        Image.fromarray(pixels).save(buffer, self.format, **options)
        return buffer.getvalue()

    def decode(self, data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Pixels in a shape of three or two dimensions, as they were encoded."""
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB" if len(shape) == 3 else "L"))


def available(names: Sequence[str] = ()) -> list[ClassicalCodec]:
    """Those that this Pillow has, at the settings it has by default but for what is named.

    JPEG XL takes part where the package pillow-jxl-plugin is installed. names: if there are any,
    only codecs whose name begins with one, in any case. Raises VaestreamError where none does.
    """
    codecs = _available()
    chosen = [c for c in codecs if any(c.name.lower().startswith(n.lower()) for n in names)]
    for name in names:
        if not any(c.name.lower().startswith(name.lower()) for c in chosen):
            raise VaestreamError(
                f"no codec {name!r}: there are {', '.join(c.name for c in codecs)}"
            )
    return chosen if names else codecs


def _available() -> list[ClassicalCodec]:
    quality = (10, 25, 40, 55, 70, 80, 88, 94, 97)
    codecs = [
        ClassicalCodec("JPEG 4:2:0", "JPEG", "quality", quality, {"optimize": True}),
        ClassicalCodec("WebP", "WEBP", "quality", (2, *quality, 100)),
    ]
    if features.check("jpg_2000"):
        codecs.append(
            ClassicalCodec(
                "JPEG 2000",
                "JPEG2000",
                "quality_layers",
                (28, 30, 32, 34, 36, 38, 40, 42),
                {"quality_mode": "dB", "irreversible": True},
            )
        )
    if features.check("avif"):
        avif = (2, 10, 20, 35, 50, 62, 72, 80, 87, 93, 97)
        for subsampling in ("4:2:0", "4:4:4"):
            name = f"AVIF {subsampling}"
            settings = {"subsampling": subsampling}
            codecs.append(ClassicalCodec(name, "AVIF", "quality", avif, settings))
    try:
        import pillow_jxl  # noqa: F401  (registers the format)
    except ImportError:
        pass
    else:
        codecs.append(ClassicalCodec("JPEG XL", "JXL", "quality", (20, 40, 60, 75, 85, 92, 96)))
    return codecs
