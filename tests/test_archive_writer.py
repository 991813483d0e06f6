"""Parts: exact byte ranges, the same bytes each time, whole or not there."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, timezone
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from archive_samples import byte_rows, commit, photo_rows, row

from vaestream.archive import index, retries
from vaestream.archive.index import build_index, load_index
from vaestream.archive.manifest import PartInfo, PartStats, read_manifest, write_manifest
from vaestream.archive.schema import Row
from vaestream.archive.writer import find_part, write_part
from vaestream.errors import ArchiveError, DamagedArchiveError

LOCAL = fsspec.filesystem("file")

Root = tuple[fsspec.AbstractFileSystem, str]


@pytest.fixture(params=["file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "file":
        return LOCAL, str(tmp_path / "new" / "archive")
    return fsspec.filesystem("memory"), f"/{tmp_path.name}/archive"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_value_lies_where_the_index_says(root: Root) -> None:
    fs, folder = root
    rows = list(photo_rows(60))
    info = write_part(fs, folder, "a", rows, row_group_bytes=4000)
    sha256 = build_index(fs, folder, [info.name])
    raw = fs.cat_file(f"{folder}/{info.name}")
    assert pq.read_metadata(fs.open(f"{folder}/{info.name}")).num_row_groups > 3
    entries = load_index(fs, folder, sha256).to_pylist()
    assert [entry["key"] for entry in entries] == [row.key for row in rows]
    for entry, kept in zip(entries, rows, strict=True):
        for prefix, value in [
            ("", kept.data),
            ("exif_", kept.exif),
            ("xmp_", kept.xmp),
            ("icc_", kept.icc),
        ]:
            start, length = entry[f"{prefix}offset"], entry[f"{prefix}length"]
            assert (None if start is None else raw[start : start + length]) == value


def test_empty_part_and_empty_source(root: Root) -> None:
    fs, folder = root
    assert write_part(fs, folder, "none", []).num_rows == 0
    info = write_part(fs, folder, "a", [row("x", b"", error="no bytes")])
    assert info.stats.errors == 1
    build_index(fs, folder, ["part-none.parquet", info.name])


def test_same_rows_same_bytes_in_the_whole_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        commit(str(tmp_path / name), {"a": list(photo_rows(30)), "b": list(byte_rows(9))})
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_part_is_found_again_from_its_footer(root: Root) -> None:
    fs, folder = root
    info = write_part(fs, folder, "a", photo_rows(20))
    assert find_part(fs, folder, "a") == info
    assert find_part(fs, folder, "b") is None
    assert PartInfo.from_json(json.loads(json.dumps(info.to_json()))) == info
    fs.mv(f"{folder}/part-a.parquet", f"{folder}/part-b.parquet")
    with pytest.raises(DamagedArchiveError, match=r"part-b.parquet.*another part"):
        find_part(fs, folder, "b")


def test_stats_count_each_row_once(tmp_path: Path) -> None:
    rows = [
        *photo_rows(4),
        row("z/alpha.png", b"123", reason="alpha channel"),
        row("z/broken.jpg", b"12", error="truncated"),
        row("z/equal.jpg", b"1", codec="vae", width=3, height=2, psnr=float("inf")),
    ]
    stats = write_part(LOCAL, str(tmp_path), "a", rows).stats
    assert (stats.photos_vae, stats.kept, stats.errors, stats.rows) == (5, 1, 1, 7)
    assert stats.reasons == {"alpha channel": 1}
    assert stats.coded_bytes == sum(len(row.data) for row in rows)
    assert stats.source_bytes == 2 * stats.coded_bytes
    assert stats.vae_pixels == 4 * 9 * 13 + 6
    assert (stats.psnr_count, stats.psnr_sum) == (4, 30.0 + 31 + 32 + 33)
    both = stats + stats
    assert both.rows == 14 and both.reasons == {"alpha channel": 2}
    assert PartStats(**json.loads(json.dumps(asdict(both)))) == both


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([row("a", b"1"), row("a", b"2")], "'a' is there twice"),
        ([row("b", b"1"), row("a", b"2")], "'a' comes after 'b'"),
        ([row("caf\udce9.jpg", b"1")], "not UTF-8"),
        ([row("a", b"1", codec="zip")], "'zip' is neither"),
        ([row("a", b"1", source_mtime=datetime(2020, 1, 1))], "no time zone"),
    ],
)
def test_rows_that_cannot_be_kept_are_refused_and_nothing_stays(
    tmp_path: Path, rows: list[Row], fault: str
) -> None:
    with pytest.raises(ArchiveError, match=fault):
        write_part(LOCAL, str(tmp_path), "a", rows)
    assert files(tmp_path) == {}


def test_one_key_in_two_parts_is_refused(tmp_path: Path) -> None:
    for part_id in "ab":
        write_part(LOCAL, str(tmp_path), part_id, [row(part_id, b"2"), row("same", b"1")])
    with pytest.raises(ArchiveError, match=r"'same' is in part-a.parquet and in part-b.parquet"):
        build_index(LOCAL, str(tmp_path), ["part-b.parquet", "part-a.parquet"])


def test_an_index_ascends_over_parts_side_by_side_and_among_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_GROUP_ROWS", 8)
    keys = {
        "last": [f"z/{i}" for i in range(5)],
        "even": [f"m/{i:02}" for i in range(0, 20, 2)],
        "odd": [f"m/{i:02}" for i in range(1, 20, 2)],
        "first": ["a", "ä", "\U0001f4f7"],  # not in the order of UTF-16
        "none": [],
    }
    for part_id, names in keys.items():
        write_part(LOCAL, str(tmp_path), part_id, [row(name, b"1") for name in names])
    names = [f"part-{part_id}.parquet" for part_id in keys]
    sha256 = build_index(LOCAL, str(tmp_path), names)
    entries = load_index(LOCAL, str(tmp_path), sha256)
    assert entries["key"].to_pylist() == sorted(chain(*keys.values()))
    homes = {f"part-{part_id}.parquet": set(found) for part_id, found in keys.items()}
    for entry in entries.to_pylist():
        assert entry["key"] in homes[entry["part"]]
    assert pq.read_metadata(tmp_path / "index.parquet").num_row_groups == 4
    before = files(tmp_path)
    build_index(LOCAL, str(tmp_path), names[::-1])
    assert files(tmp_path) == before


def test_an_index_is_made_part_by_part_where_keys_ascend_from_part_to_part(tmp_path: Path) -> None:
    for part_id in "abcd":
        rows = [row(f"{part_id}/{i}", b"1") for i in range(3)]
        write_part(LOCAL, str(tmp_path), part_id, rows)
    write_part(LOCAL, str(tmp_path), "e", [row("c/1b", b"1")])
    names = [f"part-{part_id}.parquet" for part_id in "ecdab"]
    runs = [table["key"].to_pylist() for table in index._runs(LOCAL, str(tmp_path), names)]
    assert runs == [
        ["a/0", "a/1", "a/2"],
        ["b/0", "b/1", "b/2"],
        ["c/0", "c/1", "c/1b", "c/2"],
        ["d/0", "d/1", "d/2"],
    ]


def test_rows_that_break_off_leave_the_part_that_stood_there(tmp_path: Path) -> None:
    info = write_part(LOCAL, str(tmp_path), "a", byte_rows(3))
    before = files(tmp_path)

    def broken() -> Iterator[Row]:
        yield from byte_rows(5, seed=1)
        raise OSError("the source is gone")

    with pytest.raises(ArchiveError, match="rows to write broke off: the source is gone"):
        write_part(LOCAL, str(tmp_path), "a", broken())
    assert files(tmp_path) == before
    assert find_part(LOCAL, str(tmp_path), "a") == info


def run(code: str, folder: Path) -> subprocess.Popen[str]:
    tests = Path(__file__).parent
    head = f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_named_and_nothing_stays(tmp_path: Path) -> None:
    code = f"""
        import resource, fsspec
        from archive_samples import byte_rows
        from vaestream.archive.writer import write_part
        from vaestream.errors import ArchiveError
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, {resource.RLIM_INFINITY}))
        try:
            write_part(fsspec.filesystem("file"), sys.argv[1], "a", byte_rows(300))
        except ArchiveError as error:
            print(error)
    """
    with run(code, tmp_path) as process:
        told, _ = process.communicate(timeout=60)
    assert f"{tmp_path}/part-a.parquet: cannot be written" in told
    assert "File too large" in told
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_part_and_the_commit_clears_up(tmp_path: Path) -> None:
    code = """
        import time, fsspec
        from archive_samples import byte_rows
        from vaestream.archive.writer import write_part
        def rows():
            yield from byte_rows(20)
            print("in the middle", flush=True)
            time.sleep(60)
        write_part(fsspec.filesystem("file"), sys.argv[1], "a", rows(), row_group_bytes=10_000)
    """
    with run(code, tmp_path) as process:
        assert process.stdout and process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 1
    assert find_part(LOCAL, str(tmp_path), "a") is None
    with pytest.raises(ArchiveError, match="no archive there"):
        read_manifest(LOCAL, str(tmp_path))
    commit(str(tmp_path), {"a": list(byte_rows(20))})
    assert sorted(os.listdir(tmp_path)) == [
        "index.parquet", "manifest.json", "models", "part-a.parquet"
    ]  # fmt: skip


def test_an_upload_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.0)
    monkeypatch.setattr(
        type(fs), "put_file", lambda *_: (_ for _ in ()).throw(RuntimeError("connection lost"))
    )
    with pytest.raises(ArchiveError, match=r"part-a.parquet: cannot be written.*connection lost"):
        write_part(fs, f"/{tmp_path.name}", "a", byte_rows(3))
    assert not fs.exists(f"/{tmp_path.name}/part-a.parquet")


def test_the_manifest_comes_back_and_later_versions_are_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    info = write_part(LOCAL, root, "a", byte_rows(3))
    sha256 = build_index(LOCAL, root, [info.name])
    with pytest.raises(ArchiveError, match=r"no finished archive: 2 Parquet files"):
        read_manifest(LOCAL, root)
    written = write_manifest(
        LOCAL, root, settings={"q": [1]}, model_id=None, parts=[info], index_sha256=sha256
    )
    assert read_manifest(LOCAL, root) == written
    assert written.totals == info.stats
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(DamagedArchiveError, match="digest"):
        read_manifest(LOCAL, root)
    values = json.loads(path.read_text())
    del values["sha256"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**values, "sha256": digest}))
    with pytest.raises(ArchiveError, match=r"format version 2.*a newer one is needed"):
        read_manifest(LOCAL, root)


def test_a_row_comes_back_with_all_its_values(tmp_path: Path) -> None:
    rome = timezone(timedelta(hours=2))
    rows = [
        Row(
            key="ünï/日本.jpg",
            data=b"\0" * 10,
            codec="vae",
            width=3,
            height=4,
            channels=3,
            quality=12.5,
            psnr=33.25,
            source_size=99,
            source_mtime=datetime(2020, 2, 3, 4, 5, 6, 7, tzinfo=rome),
            source_url="file:///x",
            source_etag='"e"',
            source_format="JPEG",
            source_sha256="0" * 64,
            exif=b"e",
            xmp=b"",
            icc=b"i",
            reason=None,
            error=None,
        )
    ]
    info = write_part(LOCAL, str(tmp_path), "a", rows)
    (found,) = pq.read_table(tmp_path / info.name).to_pylist()
    assert found["image"] == {"bytes": b"\0" * 10, "path": "ünï/日本.jpg"}
    assert found["source_mtime"] == datetime(2020, 2, 3, 2, 5, 6, 7, tzinfo=UTC)
    for name in ("key", "quality", "psnr", "source_etag", "exif", "xmp", "icc", "error"):
        assert found[name] == getattr(rows[0], name)


def test_pandas_reads_a_part(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = list(photo_rows(20))
    path = tmp_path / write_part(LOCAL, str(tmp_path), "a", rows, row_group_bytes=4000).name
    frame = pandas.read_parquet(path)
    assert frame["key"].tolist() == [row.key for row in rows]
    assert [image["bytes"] for image in frame["image"]] == [row.data for row in rows]
    assert frame["icc"].tolist() == [row.icc for row in rows]


def test_polars_and_duckdb_read_a_part(tmp_path: Path) -> None:
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    rows = list(photo_rows(20))
    path = tmp_path / write_part(LOCAL, str(tmp_path), "a", rows, row_group_bytes=4000).name
    frame = polars.read_parquet(path)
    assert frame["image"].struct.field("bytes").to_list() == [row.data for row in rows]
    found = duckdb.sql(f"select key, image.bytes, exif, icc from '{path}' order by key").fetchall()
    assert found == [(row.key, row.data, row.exif, row.icc) for row in rows]


def test_hugging_face_knows_the_image_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = list(photo_rows(5))
    path = tmp_path / write_part(LOCAL, str(tmp_path), "a", rows).name
    data = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert isinstance(data.features["image"], datasets.Image)
    assert np.asarray(data[0]["image"]).shape == (9, 13, 3)
