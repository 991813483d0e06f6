"""Small photos to test with."""

import io
from pathlib import Path

import numpy as np
from fsspec import AbstractFileSystem
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def pixels(seed: int, height: int = 72, width: int = 96) -> np.ndarray:
    """Smooth colours with some grain, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (smooth + rng.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)


def png(seed: int, note: str | None = None) -> bytes:
    """A PNG file, with a note that stands in it as it is."""
    text = PngInfo()
    if note is not None:
        text.add_text("Comment", note)
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def fill(folder: Path, names: list[str], first: int = 0) -> Path:
    """Write a PNG under each name."""
    for seed, name in enumerate(names, first):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
    return folder


def files(archive: Path) -> dict[str, bytes]:
    """Every file of an archive, the manifest included; not the report, which has times in it."""
    return {
        str(path.relative_to(archive)): path.read_bytes()
        for path in sorted(archive.rglob("*"))
        if path.is_file() and path.name != "report.html"
    }


def stored(fs: AbstractFileSystem, root: str) -> dict[str, bytes]:
    """`files` of an archive in any store: every object below `root`."""
    return {
        path.removeprefix(f"{root}/"): fs.cat_file(path)
        for path in fs.find(root)
        if path != f"{root}/report.html"
    }
