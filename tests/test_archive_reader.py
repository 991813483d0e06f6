"""Reading: one photo is one ranged read; what comes back is what went in."""

import functools
import http.server
import io
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import byte_rows, commit, photo_rows, pixels, png, row, stand_in
from conftest import REPOSITORY
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from vaestream.archive import parts
from vaestream.archive.reader import open_archive
from vaestream.archive.storage import RangeFile
from vaestream.archive.verify import verify
from vaestream.errors import ArchiveError, DamagedArchiveError, WeightsError

__all__ = ["stand_in"]

PHOTOS = REPOSITORY / "examples" / "photos"
Reads = list[tuple[str, int]]  # path and length of each


class CountingFile:
    """A file that tells its file system of each read."""

    def __init__(self, file: Any, reads: Reads, path: str) -> None:
        self.file, self.reads, self.path = file, reads, path

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.reads.append((self.path, len(data)))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "CountingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class CountingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Local files, each read counted, whichever of fsspec's ways it takes."""

    protocol = "counting"
    reads: Reads = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("counting://")))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super()._open(path, mode, **kwargs)
        return CountingFile(file, self.reads, path) if mode == "rb" else file


@pytest.fixture
def reads() -> Reads:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.reads.clear()
    return CountingFileSystem.reads


def test_one_photo_of_a_thousand_is_one_ranged_read(tmp_path: Path, reads: Reads) -> None:
    rows = list(byte_rows(1000, size=6000))
    commit(str(tmp_path), {"a": rows}, row_group_bytes=1 << 20)
    archive = open_archive(f"counting://{tmp_path}")
    opened = {os.path.basename(path) for path, _ in reads}
    assert opened == {"manifest.json", "index.parquet"}
    for wanted in (rows[0], rows[517], rows[999]):
        reads.clear()
        assert archive.blob(wanted.key) == wanted.data
        assert [length for _, length in reads] == [len(wanted.data)]


def test_a_photo_costs_its_bytes_and_its_metadata(
    tmp_path: Path, reads: Reads, stand_in: None
) -> None:
    rows = list(photo_rows(200))
    commit(str(tmp_path), {"a": rows})
    archive = open_archive(f"counting://{tmp_path}")
    assert archive.codec
    for wanted in rows[:16]:
        reads.clear()
        archive[wanted.key]
        values = [v for v in (wanted.data, wanted.exif, wanted.xmp, wanted.icc) if v]
        assert sum(length for _, length in reads) == sum(map(len, values))
        assert len(reads) == len(values)


def test_neighbours_share_a_read(tmp_path: Path, reads: Reads) -> None:
    rows = list(byte_rows(300))
    commit(str(tmp_path), {"a": rows})
    archive = open_archive(f"counting://{tmp_path}")
    reads.clear()
    assert archive.blobs([row.key for row in rows]) == [row.data for row in rows]
    assert len(reads) == 1


def test_keys_are_a_set_in_order(tmp_path: Path) -> None:
    first, second = list(byte_rows(20, prefix="b")), list(byte_rows(20, prefix="a"))
    commit(str(tmp_path), {"a": first, "b": [*second, row("é", b"1"), row("日本", b"2")]})
    archive = open_archive(str(tmp_path))
    assert len(archive) == 42
    assert list(archive) == archive.keys() == sorted(archive.keys())
    assert "é" in archive and "日本" in archive
    assert "a" not in archive and "" not in archive and 3 not in archive
    with pytest.raises(ArchiveError, match="no photo 'nowhere'"):
        archive.blob("nowhere")


def test_some_rows_of_many_parts_are_small_where_they_are_pickled(tmp_path: Path) -> None:
    parts = {f"{at:03}": list(byte_rows(2, prefix=f"{at:03}-")) for at in range(200)}
    commit(str(tmp_path), parts)
    archive = open_archive(str(tmp_path))
    some = archive.select(pa.array([5, 6, 7], pa.int64()))
    assert some.keys() == archive.keys()[5:8]
    assert some.blobs(some.keys()) == archive.blobs(some.keys())
    assert [part.name for part in some.manifest.parts] == sorted(
        set(some.index["part"].to_pylist())
    )
    assert len(pickle.dumps(some)) < 20_000 < len(pickle.dumps(archive))


def test_blobs_come_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = list(byte_rows(50))
    commit(str(tmp_path), {"a": rows[::2], "b": rows[1::2]}, row_group_bytes=20_000)
    archive = open_archive(str(tmp_path))
    wanted = [rows[i] for i in (7, 3, 49, 3, 0, 8, 7)]
    assert archive.blobs([row.key for row in wanted]) == [row.data for row in wanted]
    assert archive.blobs([]) == []


def test_memory_store(stand_in: None, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/archive"
    rows = list(photo_rows(10))
    commit(url, {"a": rows})
    archive = open_archive(url)
    assert archive.blobs([row.key for row in rows]) == [row.data for row in rows]
    assert archive[rows[1].key].info["icc_profile"] == rows[1].icc
    assert verify(url) == []


def test_photos_come_back_with_their_metadata(tmp_path: Path, stand_in: None) -> None:
    rows = list(photo_rows(12))
    commit(str(tmp_path), {"a": rows})
    archive = open_archive(str(tmp_path))
    for i, kept in enumerate(rows):
        image = archive[kept.key]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(kept.data))))
        assert image.mode == ("L" if i % 7 == 3 else "RGB")
        assert image.info.get("exif") == kept.exif
        assert image.info.get("icc_profile") == kept.icc
    extras = archive.payloads([row.key for row in rows])
    assert [(e.exif, e.xmp, e.icc) for e in extras] == [(r.exif, r.xmp, r.icc) for r in rows]


def test_read_gives_arrays_of_bitstreams_and_sources_alike(tmp_path: Path, stand_in: None) -> None:
    color, gray, seen = pixels(1), pixels(2, (5, 6)), pixels(3, (4, 4, 4))
    deep = Image.fromarray(np.full((3, 3), 40_000, np.uint16))
    deep_file = io.BytesIO()
    deep.save(deep_file, "PNG")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(color).save(turned, "PNG", exif=exif)
    commit(
        str(tmp_path),
        {
            "a": [
                row("1", png(color), codec="vae"),
                row("2", png(gray), codec="vae"),
                row("3", png(gray), reason="smaller than 32x32"),
                row("4", png(seen), reason="alpha channel"),
                row("5", deep_file.getvalue(), reason="16 bits per channel"),
                row("6", turned.getvalue(), reason="smaller than 32x32"),
            ]
        },
    )
    archive = open_archive(str(tmp_path))
    got = archive.read(["3", "1", "2", "4", "5", "6", "1"])
    assert all(array.dtype == np.uint8 for array in got)
    assert np.array_equal(got[0], gray) and np.array_equal(got[2], gray)
    assert np.array_equal(got[1], color) and np.array_equal(got[6], color)
    assert not np.shares_memory(got[1], got[6])
    alpha = seen[..., 3:].astype(float) / 255
    assert np.abs(got[3] - (seen[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (got[4] == 40_000 >> 8).all()
    assert np.array_equal(got[5], np.rot90(color, -1))


def test_sources_whose_exif_cannot_be_parsed_come_back_as_they_are(tmp_path: Path) -> None:
    file = io.BytesIO()
    with Image.open(PHOTOS / "otters.jpg") as photo:
        part = photo.crop((500, 300, 596, 372))
    part.convert("RGBA").save(file, "PNG", exif=b"Exif\0\0garbage")
    commit(str(tmp_path), {"a": [row("a.png", file.getvalue(), reason="alpha channel")]})
    (found,) = open_archive(str(tmp_path)).read(["a.png"])
    assert np.array_equal(found, np.asarray(part))


def test_what_read_gives_may_be_written_to(tmp_path: Path, stand_in: None) -> None:
    with Image.open(PHOTOS / "otters.jpg") as photo:
        part = photo.crop((500, 300, 596, 372))
    modes = sorted(("RGB", "L", "RGBA", "CMYK", "P", "1", "I;16"))
    rows = []
    for mode in modes:
        file = io.BytesIO()
        image = Image.fromarray(np.array(part.convert("L"), np.uint16) << 8)
        (image if mode == "I;16" else part.convert(mode)).save(file, "TIFF")
        rows.append(row(mode, file.getvalue(), reason=mode))
    commit(str(tmp_path), {"a": rows})
    archive = open_archive(str(tmp_path))
    views: list[dict[str, Any]] = [{}, {"max_size": 40}, {"region": (8, 4, 30, 20)}]
    for view in views:
        for array in archive.read(modes, **view):
            assert array.flags.c_contiguous
            array += 1


def test_rows_that_are_no_photo_say_why(tmp_path: Path, stand_in: None) -> None:
    commit(
        str(tmp_path),
        {
            "a": [
                row("broken.jpg", b"\xff\xd8", error="truncated after 2 bytes"),
                row("notes.txt", b"hello", reason="not a format this reader knows"),
            ]
        },
    )
    archive = open_archive(str(tmp_path))
    for get in (archive.__getitem__, lambda key: archive.read([key])):
        with pytest.raises(ArchiveError, match=r"broken.jpg: truncated after 2 bytes"):
            get("broken.jpg")
        with pytest.raises(ArchiveError, match=r"notes.txt.*not a format this reader knows"):
            get("notes.txt")
    assert archive.blob("notes.txt") == b"hello"


def test_row_and_rows_tell_all_but_the_bytes(tmp_path: Path) -> None:
    first, second = list(photo_rows(30)), list(byte_rows(9, prefix="1"))
    commit(str(tmp_path), {"a": first, "b": second}, row_group_bytes=4000)
    archive = open_archive(str(tmp_path))
    infos = list(archive.rows())
    assert [info.key for info in infos] == archive.keys()
    assert archive.row(first[4].key) in infos
    for kept in first + second:
        info = archive.row(kept.key)
        for name in ("codec", "width", "psnr", "source_mtime", "source_etag", "reason", "error"):
            assert getattr(info, name) == getattr(kept, name)
        assert info.num_bytes == len(kept.data)
        assert info.exif_num_bytes == (None if kept.exif is None else len(kept.exif))


def test_threads_pickles_and_forks(tmp_path: Path) -> None:
    rows = list(byte_rows(100))
    commit(str(tmp_path), {"a": rows}, row_group_bytes=50_000)
    archive = open_archive(str(tmp_path))
    keys = [row.key for row in rows]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(archive.blob, keys)) == [row.data for row in rows]
        assert len(set(pool.map(lambda key: archive.row(key).sha256, keys))) == 100
    assert pickle.loads(pickle.dumps(archive)).blobs(keys) == [row.data for row in rows]
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as processes:
        assert processes.map(archive.blob, keys[:3]) == [row.data for row in rows[:3]]


def test_a_relative_path_stays_the_same_archive_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    rows = list(byte_rows(3))
    commit(str(tmp_path / "archive"), {"a": rows})
    monkeypatch.chdir(tmp_path)
    archive = open_archive("archive")
    packed = pickle.dumps(archive)
    monkeypatch.chdir(tmp_path / "other")
    assert pickle.loads(packed).blob(rows[0].key) == rows[0].data
    assert verify(archive) == [] == verify(tmp_path / "archive")
    with multiprocessing.get_context("fork").Pool(1) as processes:
        assert processes.map(archive.blob, [rows[1].key]) == [rows[1].data]


def test_parts_that_take_turns_are_read_once(tmp_path: Path, reads: Reads) -> None:
    parts = {f"{n:02}": [row(f"{i:03}-{n:02}", b"x") for i in range(10)] for n in range(24)}
    commit(str(tmp_path), parts)
    archive = open_archive(f"counting://{tmp_path}")
    next(archive.rows())
    each = len([path for path, _ in reads if path.endswith("part-00.parquet")])
    list(archive.rows())
    assert len([path for path, _ in reads if "part-" in path]) == 24 * each


def test_archives_with_more_parts_than_are_remembered_read_the_same(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {f"{n:02}": [row(f"{i:03}-{n:02}", b"x") for i in range(4)] for n in range(8)}
    commit(str(tmp_path), rows)
    expected = list(open_archive(f"counting://{tmp_path}").rows())
    once = len(reads)
    monkeypatch.setattr(parts, "_CACHED_PARTS", 3)
    assert list(open_archive(f"counting://{tmp_path}").rows()) == expected
    assert len(reads) > 2 * once  # footers that had been dropped were read again


def test_keys_in_several_pieces_are_found_all_the_same(tmp_path: Path) -> None:
    """As they come where there are more than 2 GiB of them."""
    rows = list(byte_rows(20))
    commit(str(tmp_path), {"a": rows})
    archive = open_archive(str(tmp_path))
    pieces = archive._with(index=pa.concat_tables([archive.index[:7], archive.index[7:]]))
    assert pieces.index["key"].num_chunks == 2
    assert pieces.keys() == archive.keys()
    assert pieces.blobs(archive.keys()) == archive.blobs(archive.keys())
    assert pieces.positions(archive.keys()[5:9]).to_pylist() == [5, 6, 7, 8]
    assert "nowhere" not in pieces


def test_a_server_that_knows_no_ranges_is_told_of(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    rows = [row(f"{i}.bin", bytes([i]) * 1000) for i in range(5)]
    commit(str(tmp_path), {"a": rows})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        archive = open_archive(f"http://me:hidden@127.0.0.1:{server.server_port}")
        for call in (lambda: archive.blob("1.bin"), lambda: archive.row("1.bin")):
            with pytest.raises(ArchiveError, match="whole files where parts") as told:
                call()
            assert not isinstance(told.value, DamagedArchiveError)
            assert "hidden" not in str(told.value) + repr(archive)
        with pytest.raises(ArchiveError, match="no photo") as told:
            archive.blob("nothing")
        assert "hidden" not in str(told.value)
        server.shutdown()


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_part_that_another_tool_has_rewritten_still_reads(
    tmp_path: Path, stand_in: None, compression: str
) -> None:
    rows = list(photo_rows(40))
    commit(str(tmp_path), {"a": rows, "b": list(byte_rows(5))})
    path = tmp_path / "part-a.parquet"
    table = pq.read_table(path).sort_by([("key", "descending")])
    pq.write_table(table, path, compression=compression, row_group_size=7)
    archive = open_archive(str(tmp_path))
    assert archive.blobs([row.key for row in rows]) == [row.data for row in rows]
    assert archive[rows[1].key].info["exif"] == rows[1].exif
    assert archive.row(rows[2].key).psnr == rows[2].psnr
    problems = verify(str(tmp_path))
    assert [(p.part, p.what, p.row_key) for p in problems] == [("part-a.parquet", "footer", None)]
    assert "another tool" in problems[0].detail


def test_a_rewritten_part_with_other_photos_is_refused(tmp_path: Path) -> None:
    commit(str(tmp_path), {"a": list(byte_rows(5))})
    path = tmp_path / "part-a.parquet"
    table = pq.read_table(path)
    swapped = table.set_column(0, "key", table["key"].take([1, 0, 2, 3, 4]))
    pq.write_table(swapped, path)
    archive = open_archive(str(tmp_path))
    with pytest.raises(DamagedArchiveError, match=r"part-a.parquet: photo k/00000"):
        archive.blob("k/00000")
    assert archive.blob("k/00002")


def test_a_lost_index_is_made_from_the_parts(tmp_path: Path) -> None:
    rows = list(byte_rows(20))
    commit(str(tmp_path), {"a": rows[:9], "b": rows[9:]})
    (tmp_path / "index.parquet").unlink()
    archive = open_archive(str(tmp_path))
    assert archive.blobs([row.key for row in rows]) == [row.data for row in rows]


def test_a_model_needs_no_temporary_folder_and_is_named_where_it_cannot_be_used(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(str(tmp_path / "good"), {"a": []}, model=weights.read_bytes())
    later = weights.read_bytes().replace(b'"version":"6"', b'"version":"9"')
    commit(str(tmp_path / "later"), {"a": []}, model=later)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    archive = open_archive(str(tmp_path / "good"), device="cpu")
    assert archive.codec.model_id == archive.manifest.model_id
    archive = open_archive(str(tmp_path / "later"), device="cpu")
    with pytest.raises(WeightsError, match=rf"{archive.manifest.model_id}.*version 9"):
        _ = archive.codec


def test_what_is_not_there_is_named(tmp_path: Path, stand_in: None) -> None:
    with pytest.raises(ArchiveError, match="no archive there"):
        open_archive(str(tmp_path))
    with pytest.raises(ArchiveError, match="no archive there"):
        open_archive(str(tmp_path / "nowhere"))
    commit(str(tmp_path), {"a": list(photo_rows(3))})
    archive = open_archive(str(tmp_path))
    key = archive.keys()[0]
    (model,) = (tmp_path / "models").iterdir()
    model.write_bytes(b"other")
    with pytest.raises(DamagedArchiveError, match=model.name):
        archive[key]
    model.unlink()
    with pytest.raises(DamagedArchiveError, match="the model is missing"):
        archive[key]
    (tmp_path / "part-a.parquet").unlink()
    with pytest.raises(DamagedArchiveError, match=r"part-a.parquet: the part is missing"):
        archive.blob(key)


def test_no_message_shows_a_storage_option(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError) as caught:
        open_archive("nosuchstore://bucket/archive", storage_options={"secret": "hunter2"})
    assert "hunter2" not in str(caught.value) + repr(caught.value.__cause__)
    commit(str(tmp_path), {"a": []})
    archive = open_archive(str(tmp_path), storage_options={"auto_mkdir": True})
    assert "auto_mkdir" not in repr(archive)


def test_only_pythons_own_threads_read(
    tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of pyarrow's that holds a Python file when the interpreter ends aborts the process."""
    commit(str(tmp_path), {"a": list(photo_rows(40))}, row_group_bytes=12_000)
    threads: list[str] = []
    read = RangeFile.readinto

    def readinto(file: RangeFile, buffer: Any) -> int:
        threads.append(threading.current_thread().name)
        return read(file, buffer)

    monkeypatch.setattr(RangeFile, "readinto", readinto)
    (tmp_path / "index.parquet").unlink()
    assert len(list(open_archive(str(tmp_path)).rows())) == 40
    assert verify(str(tmp_path))
    assert threads and not [name for name in threads if name.startswith("Dummy")]


def test_what_is_no_store_is_told_and_options_are_not() -> None:
    with pytest.raises(ArchiveError, match="Protocol not known: foo"):
        open_archive("foo://a")
    with pytest.raises(ArchiveError) as caught:
        open_archive("zip://a::file://b", storage_options={"zip": {"secret": "hunter2"}})
    assert "hunter2" not in str(caught.value)
