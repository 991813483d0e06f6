"""Archives for the tests: rows as a job makes them, with a codec that needs no training."""

import hashlib
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

import vaestream.codec
from vaestream.archive.index import build_index
from vaestream.archive.manifest import PartInfo, write_manifest
from vaestream.archive.models import write_model
from vaestream.archive.schema import Row
from vaestream.archive.writer import write_part
from vaestream.errors import BitstreamError

MODEL = b"weights of the stand-in codec"


class StandInCodec:
    """The codec's face over PNG, so that what an archive gives back can be told exactly."""

    def __init__(self, weights: bytes) -> None:
        self.weights = weights
        self.model_id = hashlib.sha256(weights).hexdigest()

    @classmethod
    def of(cls, weights: bytes, *, device: str = "auto") -> "StandInCodec":
        return cls(weights)

    def decode(self, blobs: Sequence[bytes], **_: object) -> list[np.ndarray]:
        return [np.asarray(Image.open(io.BytesIO(blob))) for blob in blobs]

    @staticmethod
    def check(blob: bytes) -> None:
        if not blob.startswith(b"\x89PNG"):
            raise BitstreamError("wrong magic")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaestream.codec, "Codec", StandInCodec, raising=False)
    monkeypatch.setattr(vaestream.codec, "check", StandInCodec.check, raising=False)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(seed: int, shape: tuple[int, ...] = (9, 13, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def row(key: str, data: bytes, **values: object) -> Row:
    defaults: dict[str, object] = {
        "codec": "source",
        "source_size": 2 * len(data),
        "source_url": f"s3://bucket/{key}",
        "source_sha256": hashlib.sha256(key.encode(errors="replace")).hexdigest(),
        "source_mtime": datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC),
    }
    return Row(key=key, data=data, **{**defaults, **values})  # type: ignore[arg-type]


def photo_rows(count: int, *, seed: int = 0, prefix: str = "") -> Iterator[Row]:
    """Rows of bitstreams with EXIF, XMP and ICC on some, gray ones among them."""
    for i in range(count):
        gray = i % 7 == 3
        array = pixels(seed + i, (9, 13) if gray else (9, 13, 3))
        yield row(
            f"{prefix}2019/IMG_{i:05}.jpg",
            png(array),
            codec="vae",
            width=13,
            height=9,
            channels=1 if gray else 3,
            quality=50.0,
            psnr=30.0 + i,
            source_format="JPEG",
            source_etag=f"etag-{i}",
            exif=b"Exif\0\0" + bytes([i % 256]) * (10 + i % 50) if i % 3 else None,
            xmp=b"<x:xmpmeta/>" * (i % 4) if i % 2 else None,
            icc=b"profile-%d" % (i % 3) * 30 if i % 5 else None,
        )


def byte_rows(count: int, *, size: int = 4000, seed: int = 0, prefix: str = "k") -> Iterator[Row]:
    """Rows of kept sources of random bytes, about `size` each."""
    dice = random.Random(seed)
    for i in range(count):
        data = dice.randbytes(dice.randrange(size // 2, size * 3 // 2))
        yield row(f"{prefix}/{i:05}", data, reason="not a format this reader knows")


def commit(
    url: str,
    parts: Mapping[str, Sequence[Row]],
    *,
    row_group_bytes: int = 96 << 20,
    model: bytes = MODEL,
    storage_options: dict[str, Any] | None = None,
) -> list[PartInfo]:
    """A whole archive, the way a job writes one."""
    fs, root = fsspec.core.url_to_fs(url, **(storage_options or {}))
    infos = [
        write_part(fs, root, part_id, rows, row_group_bytes=row_group_bytes)
        for part_id, rows in parts.items()
    ]
    model_id = write_model(fs, root, model)
    index_sha256 = build_index(fs, root, [info.name for info in infos])
    write_manifest(
        fs,
        root,
        settings={"quality": 50.0},
        model_id=model_id,
        parts=infos,
        index_sha256=index_sha256,
    )
    return infos
