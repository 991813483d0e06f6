"""Photo archives several times smaller, with every photo still at hand.

    import vaestream

    vaestream.compress("photos/", "archive/", quality=50)    # a Ray job, local or on a cluster
    archive = vaestream.open("archive/")                      # lazy: any fsspec URL
    archive["2019/IMG_0001.jpg"]                              # a PIL.Image, EXIF and ICC in place

    codec = vaestream.Codec.load()                            # the codec alone: arrays <-> bytes
    images = codec.decode(codec.encode(images, quality=50))

Names are resolved on first use, so that `import vaestream` costs nothing and the codec works where
ray is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaestream.archive.reader import Archive
    from vaestream.archive.reader import open_archive as open
    from vaestream.codec import Codec
    from vaestream.errors import VaestreamError
    from vaestream.pipeline.job import Summary, compress

__version__ = "0.1.0"

__all__ = ["Archive", "Codec", "Summary", "VaestreamError", "__version__", "compress", "open"]

_HOMES = {
    "Archive": ("vaestream.archive.reader", "Archive"),
    "Codec": ("vaestream.codec", "Codec"),
    "Summary": ("vaestream.pipeline.job", "Summary"),
    "VaestreamError": ("vaestream.errors", "VaestreamError"),
    "compress": ("vaestream.pipeline.job", "compress"),
    "open": ("vaestream.archive.reader", "open_archive"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
