"""Archives as sources and sinks of Ray Data."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import ray.data
from conftest import REPOSITORY
from photos import fill, pixels, png
from PIL import Image

import vaestream
from vaestream.archive.verify import verify
from vaestream.connectors.ray_data import (
    ArchiveDatasource,
    Decode,
    Encode,
    read_archive,
    write_archive,
)
from vaestream.errors import ArchiveError
from vaestream.pipeline.report import write_report

NAMES = [f"{i:02}.png" for i in range(12)]
GRAY = [f"gray-{i}.png" for i in range(3)]


@pytest.fixture(scope="module")
def archive(
    local_ray: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> vaestream.Archive:
    """Photos, one of another size, one kept as its source, and what is none."""
    folder = tmp_path_factory.mktemp("ray-data")
    source = fill(folder / "source", NAMES)
    Image.fromarray(pixels(40, 100, 140)).save(source / "large.png")
    alpha = np.dstack([pixels(5), np.full((72, 96), 255, np.uint8)])
    Image.fromarray(alpha).save(source / "kept.png")
    for number in range(3):
        Image.fromarray(pixels(number)[:, :, 0]).save(source / f"gray-{number}.png")
    (source / "notes.txt").write_bytes(b"notes")
    (source / "cut.png").write_bytes(png(3)[:1500])
    vaestream.compress(source, folder / "archive", weights=weights, min_psnr=0.0, shard_images=4)
    return vaestream.open(str(folder / "archive"))


def by_key(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {row["key"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_photo_is_read_once_as_the_archive_has_it(archive: vaestream.Archive) -> None:
    found = by_key(read_archive(archive.url, columns=["width", "codec"]).take_all())
    assert sorted(found) == sorted([*NAMES, *GRAY, "large.png", "kept.png"])
    for key, expected in zip(found, archive.read(list(found)), strict=True):
        assert np.array_equal(found[key]["image"], np.atleast_3d(expected))
        assert found[key]["width"] == archive.row(key).width
    assert found["kept.png"]["codec"] == "source"


def test_gray_and_colour_go_through_ray_together(
    archive: vaestream.Archive, weights: Path, tmp_path: Path
) -> None:
    keys = [*GRAY, *NAMES[:5]]
    read = read_archive(archive.url, keys=keys, override_num_blocks=len(keys))
    together = read.repartition(1)
    found = by_key(together.take_all())
    for key, expected in zip(keys, archive.read(keys), strict=True):
        assert np.array_equal(found[key]["image"], np.atleast_3d(expected))
    (batch,) = read.iter_batches(batch_size=len(keys))
    assert {picture.shape[2] for picture in batch["image"]} == {1, 3}
    write_archive(together, str(tmp_path / "copy"), weights=str(weights), min_psnr=0)
    copy = vaestream.open(str(tmp_path / "copy"))
    assert [copy.row(key).channels for key in keys] == [1] * 3 + [3] * 5


def test_rows_are_pruned_before_they_are_read(archive: vaestream.Archive) -> None:
    found = read_archive(archive.url, keys=["07.png", "02.png"]).take_all()
    assert sorted(row["key"] for row in found) == ["02.png", "07.png"]
    source = ArchiveDatasource(archive.url, filter=pc.field("width") > 100)
    (task,) = source.get_read_tasks(4)
    assert task.metadata.num_rows == 1
    assert task.metadata.size_bytes == source.estimate_inmemory_data_size() == 100 * 140 * 3
    assert [
        row["key"] for row in read_archive(archive.url, filter=pc.field("width") > 100).take_all()
    ] == ["large.png"]
    with pytest.raises(ArchiveError, match=r"no photo 'none\.png'"):
        read_archive(archive.url, keys=["none.png"])
    with pytest.raises(ValueError, match=r"no column 'nocol'"):
        read_archive(archive.url, columns=["nocol"])
    with pytest.raises(ValueError, match=r"the index has the columns key, "):
        read_archive(archive.url, filter=pc.field("psnr") > 30)


def test_blocks_are_cut_by_decoded_bytes(archive: vaestream.Archive) -> None:
    from ray.data.context import DataContext

    source = ArchiveDatasource(archive.url)
    context = DataContext()
    context.target_max_block_size = 3 * 96 * 72 * 3
    tasks = source.get_read_tasks(1, data_context=context)
    sizes = [task.metadata.size_bytes for task in tasks]
    assert sum(task.metadata.num_rows or 0 for task in tasks) == 17
    assert all(size <= context.target_max_block_size for size in sizes if size is not None)
    assert len(source.get_read_tasks(5)) >= 5


def test_ray_reads_the_parts_as_plain_parquet(archive: vaestream.Archive) -> None:
    parts = [f"{archive.url}/{part.name}" for part in archive.manifest.parts]
    found = by_key(ray.data.read_parquet(parts).take_all())
    assert sorted(found) == archive.keys()
    for key, blob in zip(found, archive.blobs(list(found)), strict=True):
        assert found[key]["image"] == {"bytes": blob, "path": key}


def test_views_are_read(archive: vaestream.Archive) -> None:
    for row in read_archive(archive.url, keys=NAMES[:2], max_size=24).take_all():
        assert row["image"].shape == (18, 24, 3)
    for row in read_archive(archive.url, keys=NAMES[:2], region=(1, 2, 30, 20)).take_all():
        assert row["image"].shape == (20, 30, 3)


def test_bytes_are_decoded_by_anybody(archive: vaestream.Archive) -> None:
    coded = read_archive(archive.url, decode=False, keys=["01.png", "kept.png"])
    rows = coded.map_batches(
        Decode,
        fn_constructor_args=[archive.url],
        fn_constructor_kwargs={"device": "cpu"},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).take_all()
    for row, expected in zip(rows, archive.read([row["key"] for row in rows]), strict=True):
        assert np.array_equal(row["image"], expected)


def test_a_kept_source_is_decoded_or_refused_as_by_the_archive() -> None:
    """EXIF that cannot be parsed costs no photo, and floating point gives no black one."""
    photo, depth = io.BytesIO(), io.BytesIO()
    with Image.open(REPOSITORY / "examples" / "photos" / "otters.jpg") as image:
        part = image.crop((500, 300, 596, 372))
    part.convert("RGBA").save(photo, "PNG", exif=b"Exif\0\0garbage")
    part.convert("F").save(depth, "TIFF")
    decode = Decode(device="cpu")
    (found,) = decode({"image": np.array([photo.getvalue()], object)})["image"]
    assert np.array_equal(found, np.asarray(part))
    with pytest.raises(ArchiveError, match="floating point has no 8-bit levels"):
        decode({"image": np.array([depth.getvalue()], object)})


def test_an_archive_of_arrays_files_and_bitstreams(
    local_ray: Path, weights: Path, tmp_path: Path
) -> None:
    photos = {f"{i}": pixels(i) for i in range(6)}
    arrays = ray.data.from_items([{"key": k, "image": v} for k, v in photos.items()])
    write_archive(arrays, str(tmp_path / "arrays"), quality=70, weights=str(weights), concurrency=1)
    archive = vaestream.open(str(tmp_path / "arrays"))
    assert verify(str(tmp_path / "arrays")) == []
    assert list(archive) == sorted(photos)
    for key, expected in photos.items():
        row = archive.row(key)
        error = np.mean((archive.read([key])[0].astype(float) - expected) ** 2)
        assert row.psnr == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
        assert row.quality == 70
    assert not list((tmp_path / "arrays").glob(".vaestream*"))

    coded = arrays.map_batches(
        Encode,
        fn_constructor_kwargs={"quality": 70, "weights": str(weights), "device": "cpu"},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    write_archive(coded, str(tmp_path / "coded"), weights=str(weights))
    again = vaestream.open(str(tmp_path / "coded"))
    assert again.blobs(list(again)) == archive.blobs(list(archive))

    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a note"
    Image.fromarray(pixels(9)).save(file, "PNG", exif=exif)
    files = ray.data.from_items(
        [{"name": "a", "bytes": file.getvalue()}, {"name": "b", "bytes": b"no picture"}]
    )
    write_archive(
        files, str(tmp_path / "files"), key="name", image="bytes", weights=str(weights), min_psnr=0
    )
    kept = vaestream.open(str(tmp_path / "files"))
    assert kept["a"].getexif()[0x010E] == "a note"
    assert (kept.row("b").codec, kept.blob("b")) == ("source", b"no picture")


def test_an_archive_is_not_written_over_unasked(
    archive: vaestream.Archive, weights: Path, tmp_path: Path
) -> None:
    rows = ray.data.from_items([{"key": "a", "image": pixels(1)}])
    url = str(tmp_path / "archive")
    write_archive(rows, url, weights=str(weights))
    with pytest.raises(ArchiveError, match="stands there already"):
        write_archive(rows, url, weights=str(weights))
    report = Path(write_report(vaestream.open(url)))
    turned = ray.data.from_items([{"key": "a", "image": pixels(1).reshape(96, 72, 3)}])
    write_archive(turned, url, weights=str(weights), overwrite=True)
    assert vaestream.open(url).row("a").width == 72
    assert not report.exists()  # it told of the other archive
    more = ray.data.from_items([{"key": "b", "image": pixels(2)}])
    write_archive(more, url, weights=str(weights), overwrite=True)
    assert list(vaestream.open(url)) == ["b"]


def test_an_attempt_that_failed_leaves_no_parts(
    local_ray: Path, weights: Path, tmp_path: Path
) -> None:
    """Readers of all of `part-*.parquet` would see them."""
    url = str(tmp_path / "archive")
    twice = ray.data.from_items([{"key": "a", "image": pixels(i)} for i in (1, 2)]).repartition(2)
    with pytest.raises(Exception, match=r"'a'|key a|a.* twice"):
        write_archive(twice, url, weights=str(weights))
    assert list((tmp_path / "archive").glob("part-*"))
    write_archive(
        ray.data.from_items([{"key": "b", "image": pixels(2)}]), url, weights=str(weights)
    )
    names = [path.name for path in (tmp_path / "archive").glob("part-*")]
    assert names == [part.name for part in vaestream.open(url).manifest.parts]


def test_no_manifest_over_rows_that_cannot_be_written(
    local_ray: Path, weights: Path, tmp_path: Path
) -> None:
    twice = ray.data.from_items([{"key": "a", "image": pixels(i)} for i in range(2)])
    with pytest.raises(Exception, match=r"key.* a|a.* twice"):
        write_archive(twice, str(tmp_path / "archive"), weights=str(weights))
    assert not (tmp_path / "archive" / "manifest.json").exists()
