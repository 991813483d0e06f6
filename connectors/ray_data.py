"""Archives as sources and sinks of Ray Data, and the codec for anybody's pipeline.

>>> from vaestream.connectors.ray_data import Decode, Encode, read_archive, write_archive
>>> photos = read_archive("s3://bucket/archive", columns=["width"], max_size=512)  # doctest: +SKIP
>>> write_archive(photos, "s3://bucket/small", quality=40)                         # doctest: +SKIP

On GPUs, read bytes and decode them in actors of their own:

>>> photos = read_archive("s3://bucket/archive", decode=False)                     # doctest: +SKIP
>>> photos.map_batches(                                                            # doctest: +SKIP
...     Decode, fn_constructor_args=["s3://bucket/archive"],
...     batch_size=16, num_gpus=0.25, compute=ray.data.ActorPoolStrategy(size=4))
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasink, Datasource, ReadTask, WriteResult

from vaestream import images
from vaestream.archive.manifest import PartInfo
from vaestream.archive.models import shared_codec
from vaestream.archive.reader import Archive, open_archive
from vaestream.archive.schema import Row, RowInfo
from vaestream.archive.writer import write_part
from vaestream.codec import Codec, check
from vaestream.codec.bitstream import MAGIC
from vaestream.codec.view import Region, check_view, see
from vaestream.errors import ArchiveError, VaestreamError
from vaestream.pipeline.compressor import Compressor, Settings
from vaestream.pipeline.destination import Destination
from vaestream.pipeline.plan import SourceObject, Version
from vaestream.pipeline.stores import options_for, store_of
from vaestream.urls import public_url

Batch = dict[str, "np.ndarray[Any, Any]"]

_BYTES_A_PIXEL = 3


def read_archive(
    url: str,
    *,
    keys: Sequence[str] | None = None,
    filter: pc.Expression | None = None,
    columns: Sequence[str] = (),
    decode: bool = True,
    region: Region | None = None,
    max_size: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    override_num_blocks: int | None = None,
) -> "ray.data.Dataset":
    """A dataset with a row a photo: `key`, `image` and what `columns` ask for.

    keys: which photos, by default all that have no error and are pictures. filter: a pyarrow
    expression over the columns of the archive's index, such as `pc.field("width") > 2000`: rows
    that it leaves out are not read. columns: further fields of `RowInfo`. decode: `image` is a
    uint8 array, (H, W, 3), or (H, W, 1) of a gray photo; otherwise its bytes as the archive keeps
    them. region, max_size: see `Archive.read`.

    Blocks are cut by the bytes that they will have, `DataContext.target_max_block_size`, and hold
    neighbours of the archive. Errors: ValueError for a column that is not there, or a region that
    no photo can have; ArchiveError, as the archive is opened and as it is read.
    """
    source = ArchiveDatasource(
        url,
        keys=keys,
        filter=filter,
        columns=columns,
        decode=decode,
        region=region,
        max_size=max_size,
        storage_options=storage_options,
    )
    dataset: ray.data.Dataset = ray.data.read_datasource(
        source, override_num_blocks=override_num_blocks
    )
    return dataset


class ArchiveDatasource(Datasource):
    """What `read_archive` reads; the arguments are explained there."""

    def __init__(
        self,
        url: str,
        *,
        keys: Sequence[str] | None = None,
        filter: pc.Expression | None = None,
        columns: Sequence[str] = (),
        decode: bool = True,
        region: Region | None = None,
        max_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_view(region, max_size)
        known = [field.name for field in fields(RowInfo)]
        if unknown := [name for name in columns if name not in known]:
            raise ValueError(f"no column {unknown[0]!r}: there are {', '.join(known)}")
        options = options_for(url, storage_options)
        archive = open_archive(url, device="cpu", storage_options=options)
        rows = archive.positions(keys)
        if filter is not None:
            marked = archive.index.take(rows).append_column("__row", rows)
            try:
                rows = marked.filter(filter)["__row"].combine_chunks()
            except pa.ArrowInvalid as error:
                names = ", ".join(archive.index.column_names)
                raise ValueError(f"filter {filter}: the index has the columns {names}") from error
        self._archive = archive.select(rows.unique().sort())
        self._columns, self._decode = tuple(columns), decode
        self._region, self._max_size = region, max_size
        self._sizes = self._decoded_sizes() if decode else self._archive.index["length"].to_numpy()

    def get_name(self) -> str:
        """What Ray's progress calls it."""
        return "ReadArchive"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows."""
        return int(self._sizes.sum())

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Tasks of neighbouring rows: as many as asked for, more where blocks would be large."""
        context = data_context or DataContext.get_current()
        target = context.target_max_block_size or 128 << 20
        total = self.estimate_inmemory_data_size()
        each = max(1, min(target, -(-total // max(1, parallelism))))
        tasks = []
        ends = np.cumsum(self._sizes)
        start = 0
        while start < len(ends):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + each, side="right")))
            tasks.append(self._task(start, stop, per_task_row_limit))
            start = stop
        return tasks

    def _task(self, start: int, stop: int, limit: int | None) -> ReadTask:
        part = self._archive.select(pa.array(range(start, stop), pa.int64()))
        read = _Read(part, self._columns, self._decode, self._region, self._max_size)
        metadata = BlockMetadata(
            num_rows=stop - start,
            size_bytes=int(self._sizes[start:stop].sum()),
            exec_stats=None,
            input_files=tuple(one.name for one in part.manifest.parts),
        )
        return ReadTask(read, metadata, per_task_row_limit=limit)

    def _decoded_sizes(self) -> "np.ndarray[Any, Any]":
        index = self._archive.index
        width = pc.fill_null(index["width"], 1).to_numpy().astype(np.float64)
        height = pc.fill_null(index["height"], 1).to_numpy().astype(np.float64)
        if self._region is not None:
            width[:], height[:] = self._region[2], self._region[3]
        if self._max_size is not None:
            scale = np.maximum(1, np.maximum(width, height) / self._max_size)
            width, height = width / scale, height / scale
        sizes: np.ndarray[Any, Any] = np.ceil(width * height * _BYTES_A_PIXEL)
        return sizes


class _Read:
    """Reads some rows in a worker of Ray's."""

    def __init__(
        self,
        archive: Archive,
        columns: Sequence[str],
        decode: bool,
        region: Region | None,
        max_size: int | None,
    ) -> None:
        self._archive, self._columns = archive, columns
        self._decode, self._region, self._max_size = decode, region, max_size

    def __call__(self) -> Iterable[Block]:
        keys = self._archive.keys()
        rows: dict[str, Any] = {"key": keys}
        for name in self._columns:
            rows[name] = [getattr(self._archive.row(key), name) for key in keys]
        if self._decode:
            pictures = self._archive.read(keys, region=self._region, max_size=self._max_size)
            rows["image"] = _picture_column(pictures)
        else:
            rows["image"] = _column(self._archive.blobs(keys))
        yield BlockAccessor.batch_to_block(rows)


def _column(values: list[Any]) -> "np.ndarray[Any, Any]":
    """A column as Ray takes it: pictures of different sizes stay pictures."""
    column = np.empty(len(values), object)
    column[:] = values
    return column


def _picture_column(pictures: Iterable["np.ndarray[Any, Any]"]) -> "np.ndarray[Any, Any]":
    """Likewise of pictures. Ray joins blocks only where all have equally many dimensions, so gray
    ones get a third here, which `_squeezed` takes off."""
    return _column([np.atleast_3d(picture) for picture in pictures])


def _squeezed(picture: Any) -> "np.ndarray[Any, Any]":
    """A picture as the codec takes it: (H, W, 1) as (H, W)."""
    pixels = np.asarray(picture)
    return pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


class Decode:
    """For `map_batches` on actors: a column of bitstreams becomes one of pictures.

    source: an archive, whose model is taken; or None for the shipped weights. region, max_size: see
    `Codec.decode`. What is no bitstream (a kept source) is decoded by Pillow, to RGB or gray.
    Pictures are uint8, (H, W, 3), or (H, W, 1) where they are gray. Raises ArchiveError for a
    source that gives none, else as `Codec.decode` does.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        column: str = "image",
        device: str = "auto",
        region: Region | None = None,
        max_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if source is None:
            self._codec = Codec.load(device=device)
        else:
            options = options_for(source, storage_options)
            self._codec = open_archive(source, device=device, storage_options=options).codec
        self._column, self._region, self._max_size = column, region, max_size

    def __call__(self, batch: Batch) -> Batch:
        pictures = [self._picture(bytes(data)) for data in batch[self._column]]
        return {**batch, self._column: _picture_column(pictures)}

    def _picture(self, data: bytes) -> "np.ndarray[Any, Any]":
        if not data.startswith(MAGIC):
            pixels = images.decode_kept(data)
            return see(pixels, region=self._region, max_size=self._max_size)
        (decoded,) = self._codec.decode(
            [data], region=self._region, max_size=self._max_size, max_pixels=None
        )
        return decoded


class Encode:
    """For `map_batches` on actors: a column of uint8 pictures, (H, W, 3), (H, W, 1) or (H, W),
    becomes one of bitstreams.

    One of quality (default 50), target_bpp and target_psnr, as `Codec.compress` takes them.
    weights: path or URL of other weights than the shipped ones.
    """

    def __init__(
        self,
        *,
        quality: float | None = None,
        target_bpp: float | None = None,
        target_psnr: float | None = None,
        effort: int = 0,
        column: str = "image",
        device: str = "auto",
        weights: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        options = None if weights is None else options_for(weights, storage_options)
        self._codec = Codec.load(weights, device=device, storage_options=options)
        given = {"quality": quality, "target_bpp": target_bpp, "target_psnr": target_psnr}
        self._rate = {name: value for name, value in given.items() if value is not None}
        self._rate = self._rate or {"quality": 50.0}
        self._effort, self._column = effort, column

    def __call__(self, batch: Batch) -> Batch:
        blobs = [
            self._codec.compress(
                _squeezed(picture), **self._rate, effort=self._effort, measure=False
            ).data
            for picture in batch[self._column]
        ]
        return {**batch, self._column: _column(blobs)}


def write_archive(
    dataset: "ray.data.Dataset",
    url: str,
    *,
    quality: float | None = None,
    target_bpp: float | None = None,
    target_psnr: float | None = None,
    min_psnr: float | None = None,
    key: str = "key",
    image: str = "image",
    device: str = "cpu",
    weights: str | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    **ray_options: Any,
) -> None:
    """Write a dataset as an archive: a row for each of its rows, a part for each write task.

    key, image: columns. An image may be a uint8 array, (H, W, 3), (H, W, 1) or (H, W), which is
    compressed; a bitstream of the same model (see `Encode`, for GPUs), which is taken as it is; or
    the bytes of a file, which becomes what a compress job would make of it, min_psnr included.
    weights: other than the shipped ones. device: where tasks compress. ray_options: for
    `Dataset.write_datasink`.

    The manifest is written when all tasks have ended; before that there is no archive. The same
    rows in the same blocks give the same bytes. Errors: ArchiveError where an archive stands at
    `url` already, unless `overwrite`, where two rows have the same key, and where a row's image is
    none of the three.
    """
    settings = Settings.of(
        quality=quality, target_bpp=target_bpp, target_psnr=target_psnr, min_psnr=min_psnr
    )
    fs, root = store_of(url, storage_options)
    codec = Codec.load(
        weights,
        device="cpu",
        storage_options=None if weights is None else options_for(weights, storage_options),
    )
    place = Destination.open(
        fs,
        root.rstrip("/"),
        settings=settings.to_json(),
        model_id=codec.model_id,
        overwrite=overwrite,
    )
    if place.manifest is not None and not overwrite:
        raise ArchiveError(
            f"{public_url(url)}: an archive stands there already; overwrite it, or choose another"
        )
    place.begin(codec.weights)
    dataset.write_datasink(ArchiveDatasink(place, settings, key, image, device), **ray_options)


class ArchiveDatasink(Datasink[list[dict[str, Any]]]):
    """What `write_archive` writes with; the arguments are explained there.

    place: opened, and begun with the model.
    """

    def __init__(
        self, place: Destination, settings: Settings, key: str, image: str, device: str
    ) -> None:
        self._place, self._settings, self._device = place, settings, device
        self._key, self._image = key, image

    def get_name(self) -> str:
        """What Ray's progress calls it."""
        return "WriteArchive"

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[dict[str, Any]]:
        """One part of all rows of these blocks; its description, nothing where they are empty."""
        place = self._place
        codec = shared_codec(place.fs, place.root, place.model_id, self._device)
        encoder = _RowEncoder(codec, self._settings)
        rows = sorted(
            (encoder.row(str(key), image) for key, image in self._pairs(blocks)),
            key=lambda row: row.key,
        )
        if not rows:
            return []
        facts = [[r.key, r.source_sha256, r.width, r.height, r.channels] for r in rows]
        # Parts of the archive that it replaces keep their names to themselves until the commit.
        over = place.manifest.index_sha256 if place.manifest else None
        decisive = [place.model_id, place.settings, facts, over]
        part_id = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
        return [write_part(place.fs, place.root, part_id, rows).to_json()]

    def _pairs(self, blocks: Iterable[Block]) -> Iterator[tuple[Any, Any]]:
        """Key and image of each row."""
        for row in _rows_of(blocks):
            for name in (self._key, self._image):
                if name not in row:
                    raise ArchiveError(
                        f"the dataset has no column {name!r}: there are {', '.join(row)}"
                    )
            yield row[self._key], row[self._image]

    def on_write_complete(self, write_result: WriteResult[list[dict[str, Any]]]) -> None:
        """Commit: index and manifest."""
        parts = [PartInfo.from_json(one) for told in write_result.write_returns for one in told]
        # What an attempt that failed has left is no part of this one.
        if not self._place.commit(parts, dropped=self._place.names):
            raise ArchiveError(f"{self._place.root}: another job has written there meanwhile")
        self._place.clear()


def _rows_of(blocks: Iterable[Block]) -> Iterator[Mapping[str, Any]]:
    for block in blocks:
        yield from BlockAccessor.for_block(block).iter_rows(public_row_format=True)


class _RowEncoder:
    def __init__(self, codec: Codec, settings: Settings) -> None:
        self._codec, self._settings = codec, settings
        self._compressor = Compressor(codec, settings)

    def row(self, key: str, image: Any) -> Row:
        """The row of an array, a bitstream or a file. Raises ArchiveError for anything else."""
        if isinstance(image, bytes | bytearray | memoryview):
            data = bytes(image)
            return (
                self._of_bitstream(key, data)
                if data.startswith(MAGIC)
                else self._of_file(key, data)
            )
        try:
            return self._of_pixels(key, np.ascontiguousarray(_squeezed(image)))
        except ValueError as error:
            raise ArchiveError(f"{key}: {error}") from error

    def _of_file(self, key: str, data: bytes) -> Row:
        item = SourceObject(key, store=0, path=key, url=key, version=Version(size=len(data)))
        return self._compressor.row(item, data)

    def _of_bitstream(self, key: str, data: bytes) -> Row:
        try:
            header = check(data)
        except VaestreamError as error:
            raise ArchiveError(f"{key}: {error}") from error
        if not self._codec.model_id.startswith(header.model_id_prefix):
            raise ArchiveError(
                f"{key}: a bitstream of model {header.model_id_prefix}, not of this archive's"
            )
        return Row(
            key=key,
            data=data,
            codec="vae",
            width=header.width,
            height=header.height,
            channels=header.channels,
            quality=header.quality,
            source_size=len(data),
            source_url=key,
            source_sha256=hashlib.sha256(data).hexdigest(),
        )

    def _of_pixels(self, key: str, pixels: "np.ndarray[Any, Any]") -> Row:
        encoded = self._settings.encode(self._codec, pixels)
        return Row(
            key=key,
            data=encoded.data,
            codec="vae",
            width=pixels.shape[1],
            height=pixels.shape[0],
            channels=1 if pixels.ndim == 2 else 3,
            quality=encoded.quality,
            psnr=encoded.psnr,
            source_size=pixels.nbytes,
            source_url=key,
            source_sha256=hashlib.sha256(pixels.data).hexdigest(),
        )
