"""Photos inside tars, zips and Parquet files, and those that lists name."""

import errno
import functools
import io
import random
import re
import tarfile
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from photos import png
from without_ray import without_ray

import vaestream
from vaestream.archive import retries, storage
from vaestream.errors import SourceError
from vaestream.pipeline import members
from vaestream.pipeline.fetch import Fetched, fetch_all
from vaestream.pipeline.job import Summary
from vaestream.pipeline.listing import list_sources
from vaestream.pipeline.members import MemberReader

FILES = {"a.png": png(1), "sub/b.png": png(2), "sub/b.json": b"{}", "empty.txt": b""}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is damaged is read again as often as ever, and at once."""
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.0)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path: Path, mode: str = "w", files: dict[str, bytes] = FILES) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        add(tar, "sub", type=tarfile.DIRTYPE)
        for name, data in files.items():
            add(tar, name, data, mtime=1_500_000_000)
    return path


def make_zip(path: Path, method: int) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("sub")
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


def read(*sources: Path, **options: Any) -> dict[str, Fetched]:
    """What a job would read, by key."""
    objects = list(listing := list_sources([str(source) for source in sources], **options))
    limits: dict[str, Any] = {"max_object_bytes": 1 << 30}
    found = {
        got.item.key: got
        for got in fetch_all(objects, listing.stores, members=MemberReader(), **limits)
    }
    assert len(found) == len(objects)
    return found


def contents(found: dict[str, Fetched]) -> dict[str, bytes | None]:
    return {key: got.data for key, got in found.items()}


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_a_tar_stands_for_its_members(tmp_path: Path, ending: str) -> None:
    mode = {"tar": "w", "tgz": "w:gz"}.get(ending, f"w:{ending[4:]}")
    found = read(make_tar(tmp_path / f"photos.{ending}", mode))
    assert contents(found) == FILES
    item = found["a.png"].item
    assert item.url.startswith("tar://a.png::file://") and item.version.size == len(FILES["a.png"])
    assert item.version.mtime is not None and item.version.mtime.year == 2017


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_stands_for_its_members(tmp_path: Path, method: int) -> None:
    assert contents(read(make_zip(tmp_path / "photos.ZIP", method))) == FILES


def test_a_compressed_tar_gives_all_of_its_last_member(tmp_path: Path) -> None:
    for seed, size in enumerate((8296, 8402, 28598)):
        data = random.Random(seed).randbytes(size)
        path = make_tar(tmp_path / "x.tar.gz", "w:gz", {"a.bin": data[::-1], "b.bin": data})
        assert contents(read(path)) == {"a.bin": data[::-1], "b.bin": data}


def test_each_compressed_tar_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        make_tar(tmp_path / f"{name}.tgz", "w:gz", {f"{i:02d}.png": png(i) for i in range(12)})
    unpacked: list[str] = []

    def unpack(fs: Any, item: Any, file: Any, original: Any = members._unpack) -> None:
        unpacked.append(Path(item.path).name)
        original(fs, item, file)

    monkeypatch.setattr(members, "_unpack", unpack)
    assert len(read(tmp_path / "*.tgz")) == 36
    assert unpacked == ["a.tgz", "b.tgz", "c.tgz"]


def test_members_of_one_name_come_out_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr("a.png", png(number))
        archive.writestr("a~2.png", png(3))
    found = contents(read(path))
    assert found == {"a.png": png(0), "a~2.png": png(1), "a~3.png": png(2), "a~2~2.png": png(3)}


class Hanging(LocalFileSystem):  # type: ignore[misc]
    """Its first ranged read gives no answer, however long one waits."""

    protocol = "hanging"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.never, self.hung = threading.Event(), False

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        if not self.hung:
            self.hung = True
            self.never.wait()
        data: bytes = super().cat_file(path, *args, **options)
        return data


@pytest.mark.parametrize("kind", ["zip", "parquet"])
def test_a_read_without_an_answer_costs_no_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # A store with a limit: local files have none.
    for module in (retries, storage):
        monkeypatch.setattr(module, "LocalFileSystem", MemoryFileSystem)
    monkeypatch.setattr(retries, "_ANSWER_SECONDS", 1.0)
    path = tmp_path / f"photos.{kind}"
    if kind == "zip":
        make_zip(path, zipfile.ZIP_DEFLATED)
    else:
        pq.write_table(pa.table({"image": list(FILES.values())}), path)
    objects = list(list_sources([str(path)]))
    fs = Hanging()
    got = list(fetch_all(objects, [fs], members=MemberReader(), max_object_bytes=1 << 30))
    fs.never.set()
    assert fs.hung and [one.error for one in got] == [None] * 4
    assert [one.data for one in got] == list(FILES.values())


@pytest.mark.parametrize("error", [TimeoutError("no answer"), OSError(errno.EIO, "bad cable")])
@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_a_store_that_fails_for_a_moment_damages_no_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, error: OSError
) -> None:
    path = tmp_path / f"photos.{ending}"
    if ending == "zip":
        make_zip(path, zipfile.ZIP_DEFLATED)
    else:
        make_tar(path, "w:gz" if ending == "tar.gz" else "w")
    cat_file, failures = LocalFileSystem.cat_file, 2

    def fail(self: LocalFileSystem, *args: Any, **options: Any) -> bytes:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise error
        data: bytes = cat_file(self, *args, **options)
        return data

    monkeypatch.setattr(LocalFileSystem, "cat_file", fail)
    objects = list(listing := list_sources([str(path)]))
    failures = 2
    got = fetch_all(objects, listing.stores, members=MemberReader(), max_object_bytes=1 << 30)
    assert {one.item.key: one.data for one in got} == FILES
    # One that fails for good is no empty container either.
    failures = 1000
    with pytest.raises(SourceError, match="cannot be listed"):
        list(list_sources([str(path)]))


def test_a_zip_that_has_changed_since_gives_no_member_for_another(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", zipfile.ZIP_STORED)
    objects = list(listing := list_sources([str(path)]))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in reversed(FILES.items()):
            archive.writestr(name, data)
    limits: dict[str, Any] = {"max_object_bytes": 1 << 30}
    for got in fetch_all(objects, listing.stores, members=MemberReader(), **limits):
        assert got.data in (None, FILES[got.item.key])
        assert (got.data is None) == ("not where it was" in (got.error or ""))


def test_shards_of_a_glob_keep_their_names_and_in_a_folder_they_are_objects(
    tmp_path: Path,
) -> None:
    for name in ("000.tar", "001.tar"):
        make_tar(tmp_path / name)
    found = contents(read(tmp_path / "*.tar"))
    assert found == {f"{n}.tar/{key}": data for n in ("000", "001") for key, data in FILES.items()}
    whole = contents(read(tmp_path))
    assert whole == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert list(read(tmp_path / "*.tar", include=["*.json"])) == [
        "000.tar/sub/b.json",
        "001.tar/sub/b.json",
    ]


def test_odd_members_are_renamed_or_told_of_by_rule(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../../x.png", b"up")
        add(tar, "/abs.png", b"absolute")
        add(tar, "twice.png", b"one")
        add(tar, "twice.png", b"two")
        add(tar, "d/link.png", type=tarfile.SYMTYPE, linkname="../twice.png")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="twice.png")
        add(tar, "away.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "latin.png", type=tarfile.SYMTYPE, linkname="caf\udce9.png")
        add(tar, "pipe", type=tarfile.FIFOTYPE)
        add(tar, "late.png", b"late", mtime=10**15)
    found = read(path)
    assert contents(found) == {
        "%2E%2E/%2E%2E/x.png": b"up",
        "%2F/abs.png": b"absolute",
        "twice.png": b"one",
        "twice~2.png": b"two",
        "d/link.png": b"two",
        "hard.png": b"two",
        "away.png": None,
        "latin.png": None,
        "pipe": None,
        "late.png": b"late",
    }
    assert "link to /etc/passwd" in (found["away.png"].error or "")
    assert "link to caf%E9.png" in (found["latin.png"].error or "")
    assert "neither a file nor a link" in (found["pipe"].error or "")
    assert found["late.png"].item.version.mtime is None


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_odd_files_come_out_of_a_tar_as_they_went_in(
    shared: Path, tmp_path: Path, mode: str
) -> None:
    odd = shared / "photos" / "odd"
    with tarfile.open(tmp_path / "odd.tar", mode) as tar:  # type: ignore[call-overload]
        tar.add(odd, arcname=".")
    found = contents(read(tmp_path / "odd.tar"))
    assert found == contents(read(odd))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_tar_gives_what_it_has_and_says_so(tmp_path: Path, mode: str) -> None:
    files = {f"{i}.png": png(i) for i in range(4)}
    path = make_tar(tmp_path / "cut.tar", mode, files)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 5 // 8])
    found = read(path)
    whole = [key for key, got in found.items() if got.data is not None]
    assert whole and all(found[key].data == files[key] for key in whole)
    assert set(found) < {*files, "cut.tar"} and "cut.tar" in found
    assert "damaged" in (found["cut.tar"].error or "")


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_no_damage_in_a_compressed_tar_passes_unnoticed(tmp_path: Path, packing: str) -> None:
    """A bit that flips may change a member that can be read all the same."""
    files = {f"{i}.png": png(i) for i in range(4)}
    path = make_tar(tmp_path / f"x.tar.{packing}", f"w:{packing}", files)
    data = path.read_bytes()
    for at in range(12, len(data), len(data) // 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        found = read(path)
        told = found.get(path.name)
        if told is None:  # what nothing depends on, a time in the header, say
            assert contents(found) == files
        elif told.error is not None:
            assert "the tar is damaged after" in told.error


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmember("sub/b.png").offset
    data[at : at + 100] = b"\xff" * 100
    path.write_bytes(data)
    found = read(path)
    assert found["a.png"].data == FILES["a.png"]
    assert "damaged after 1 members" in (found["x.tar"].error or "")


def test_an_encrypted_or_damaged_zip_member_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(FILES["a.png"]) + 50] ^= 1
    at = data.index(b"sub/b.json", data.index(b"PK\x01\x02")) - 46
    data[at + 8] |= 1  # the flag in the directory: encrypted
    path.write_bytes(data)
    found = read(path)
    assert found["sub/b.png"].data == FILES["sub/b.png"]
    assert "Bad CRC-32" in (found["a.png"].error or "")
    assert "encrypted" in (found["sub/b.json"].error or "")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_compressed_zip_member_is_an_error_of_its_own(
    tmp_path: Path, method: int
) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", FILES["a.png"])
    data = bytearray(path.read_bytes())
    data[60:120] = bytes(60)
    path.write_bytes(data)
    assert "cannot be read" in (read(path)["a.png"].error or "")


def test_an_odd_zip_is_kept_as_it_is(tmp_path: Path) -> None:
    """Of a version to come, or with a name that is no UTF-8, though it says so."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\u00fc.png", FILES["a.png"])
    data = path.read_bytes()
    entry = data.rindex(b"PK\x01\x02")
    for at, value in ((entry + 6, 99), (entry + 46, 0xFF)):
        odd = data[:at] + bytes([value]) + data[at + 1 :]
        path.write_bytes(odd)
        assert contents(read(path)) == {"x.zip": odd}


def test_bytes_after_a_compressed_tar_are_no_damage(tmp_path: Path) -> None:
    for packing in ("gz", "bz2", "xz"):
        path = make_tar(tmp_path / f"x.tar.{packing}", f"w:{packing}")
        path.write_bytes(path.read_bytes() + b"signed by nobody")
        assert contents(read(path)) == FILES


def test_damaged_names_in_parquet_are_told(tmp_path: Path) -> None:
    cells = [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": cells}), path, row_group_size=2, compression="gzip")
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    assert column.path_in_schema == "image.path"
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    found = read(path)
    assert found["0.png"].data == png(0) and found["1.png"].data == png(1)
    assert "damaged after 2 rows" in (found["x.parquet"].error or "")


def test_a_tar_cut_in_its_first_block_is_kept_as_it_is(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "cut.tar.gz", "w:gz")
    data = path.read_bytes()[:40]
    path.write_bytes(data)
    assert contents(read(path)) == {"cut.tar.gz": data}


def test_no_room_to_unpack_a_tar_in_is_no_fault_of_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tar(tmp_path / "x.tar.gz", "w:gz")
    (tmp_path / "plain.png").write_bytes(png(1))
    full = functools.partial(open, "/dev/full", "r+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full())
    with pytest.raises(SourceError, match="no room to unpack"):
        read(tmp_path / "plain.png", path)


@pytest.mark.parametrize("name", ["no.tar", "no.tar.gz", "no.zip"])
def test_what_only_has_the_name_of_a_container_is_kept_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else entirely" * 100)
    assert contents(read(tmp_path / name)) == {name: b"something else entirely" * 100}


def test_a_bomb_in_a_zip_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(50_000_000))
    objects = list(listing := list_sources([str(tmp_path / "x.zip")]))
    limits: dict[str, Any] = {"max_object_bytes": 1_000_000}
    (got,) = fetch_all(objects, listing.stores, members=MemberReader(), **limits)
    assert got.data is None and "50000000 bytes" in (got.error or "")


IMAGES = [png(i) for i in range(5)]


@pytest.mark.parametrize(
    ("column", "keys"),
    [
        (
            pa.array([{"bytes": data, "path": f"d/{i}.png"} for i, data in enumerate(IMAGES)]),
            [f"d/{i}.png" for i in range(5)],
        ),
        (pa.array([{"bytes": data} for data in IMAGES]), [f"row-{i:09d}" for i in range(5)]),
        (pa.array(IMAGES, pa.binary()), [f"row-{i:09d}" for i in range(5)]),
        (pa.array(IMAGES, pa.large_binary()), [f"row-{i:09d}" for i in range(5)]),
    ],
)
def test_parquet_with_pictures_stands_for_them(
    tmp_path: Path, column: pa.Array, keys: list[str]
) -> None:
    table = pa.table({"label": range(5), "image": column})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert contents(read(tmp_path / "x.parquet")) == dict(zip(keys, IMAGES, strict=True))


def test_pictures_of_a_large_row_group_come_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_BATCH_BYTES", 1)  # a picture at a time
    column = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(IMAGES)])
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    objects = list(listing := list_sources([str(tmp_path / "x.parquet")]))
    for order in (range(5), range(4, -1, -1), (2, 0, 3, 3)):
        reader = MemberReader()
        for i in order:
            data = reader.read(listing.stores[0], objects[i], max_bytes=1 << 30)
            assert data == IMAGES[i]


def test_a_missing_picture_is_an_error_of_its_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [IMAGES[0], None]}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert found["row-000000000"].data == IMAGES[0]
    assert "no image" in (found["row-000000001"].error or "")


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "parquet"])
def test_a_list_stands_for_what_it_names(tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    for root, name in ((folder, "a b.png"), (folder, "sub/c.png"), (other, "d.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    urls = ["sub/c.png", "a b.png", str(other / "d.png"), "sub/c.png", "gone.png"]
    path = folder / f"list.{kind}"
    if kind == "txt":
        path.write_text("\n ".join(urls) + "\n\n")
    elif kind == "parquet":
        pq.write_table(pa.table({"n": range(5), "url": [f" {url}" for url in urls]}), path)
    else:
        separator = "," if kind == "csv" else "\t"
        rows = zip("n0123", ["URL", *urls[:4]], strict=True)
        quoted = ([f'"{value}"' for value in row] for row in rows)
        path.write_text("\n".join(f"{separator} ".join(row) for row in quoted))
    found = contents(read(path))
    elsewhere = f"{other}/d.png".lstrip("/")
    expected = {"sub/c.png": b"sub/c.png", "a b.png": b"a b.png", elsewhere: b"d.png"}
    if kind in ("txt", "parquet"):
        expected["gone.png"] = None  # type: ignore[assignment]
    assert found == expected


def test_urls_of_a_list_that_share_a_key_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    path = tmp_path / "list.txt"

    def listed(*lines: str) -> dict[str, str]:
        path.write_text("\n".join(lines))
        return {item.path: item.key for item in list_sources([str(path)])}

    assert len(set(listed("http://h/get?design=1&key=1", "http://h/get?design=2&key=1"))) == 2
    urls = [f"http://h/get.jpg?key={n}" for n in (1, 2, 3)] + ["https://h/get.jpg"]
    keys = listed(*urls, urls[1])
    assert len(keys) == len(set(keys.values())) == 4
    assert keys[urls[0]] == "h/get.jpg"
    assert all(re.fullmatch(r"h/get~[0-9a-f]{12}\.jpg", keys[url]) for url in urls[1:])
    # A list that has grown in its midst leaves them their keys.
    assert listed(urls[0], "http://h/other.jpg", *urls[1:]).items() >= keys.items()


def test_a_text_beside_photos_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "notes.txt").write_text("not a path")
    pq.write_table(pa.table({"url": ["not a path"]}), tmp_path / "index.parquet")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert contents(read(tmp_path / "*")) == whole
    assert contents(read(*sorted(tmp_path.iterdir()))) == whole


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("x.parquet", lambda p: pq.write_table(pa.table({"n": [1]}), p), "its columns are n"),
        ("x.parquet", lambda p: p.write_bytes(b"junk"), "is no Parquet file"),
        ("x.csv", lambda p: p.write_text("n,m\n1,2\n"), "its first line is 'n,m'"),
    ],
)
def test_a_table_without_photos_is_refused_with_what_it_has(
    tmp_path: Path, name: str, make: Callable[[Path], Any], reason: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(SourceError, match=reason) as caught:
        list(list_sources([str(tmp_path / name)]))
    assert name in str(caught.value)


def test_the_job_takes_tars_and_goes_on_as_they_grow(weights: Path, tmp_path: Path) -> None:
    @without_ray()
    def run() -> Summary:
        options: dict[str, Any] = {"min_psnr": 0.0, "shard_images": 3, "weights": weights}
        return vaestream.compress(tmp_path / "*.tar", tmp_path / "archive", **options)

    make_tar(tmp_path / "0.tar")
    assert run().objects == 4
    make_tar(tmp_path / "1.tar.part")
    (tmp_path / "1.tar.part").rename(tmp_path / "1.tar")
    summary = run()
    assert (summary.objects, summary.changed, summary.photos) == (8, 0, 4)
    archive = vaestream.open(str(tmp_path / "archive"))
    assert sorted(archive) == sorted(f"{n}.tar/{key}" for n in (0, 1) for key in FILES)
    assert archive.blob("1.tar/sub/b.json") == b"{}"
    assert archive["0.tar/sub/b.png"].size == (96, 72)
    with pytest.raises(SourceError, match="part of a vaestream archive"):
        list(list_sources([str(next((tmp_path / "archive").glob("part-*")))]))
