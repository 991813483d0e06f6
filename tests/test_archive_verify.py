"""Verify: whatever byte is hit, it says where; the photos beside it still read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from archive_samples import byte_rows, commit, photo_rows, row, stand_in

from vaestream.archive.index import load_index
from vaestream.archive.layout import column_indices, parse_footer, read_footer
from vaestream.archive.reader import open_archive
from vaestream.archive.storage import open_store
from vaestream.archive.verify import verify
from vaestream.errors import ArchiveError, DamagedArchiveError

__all__ = ["stand_in"]

Region = tuple[int, int, str, str | None]


@pytest.fixture
def archive(tmp_path: Path, stand_in: None) -> Path:
    rows = [*photo_rows(40), *byte_rows(20, size=600)]
    commit(str(tmp_path), {"a": rows}, row_group_bytes=12_000)
    return tmp_path


def whats(root: Path) -> list[tuple[str, str, str | None]]:
    return [(problem.part, problem.what, problem.row_key) for problem in verify(str(root))]


def test_a_whole_archive_has_no_problem(archive: Path) -> None:
    assert verify(str(archive)) == []
    assert verify(open_archive(str(archive))) == []


def regions(root: Path) -> tuple[int, list[Region]]:
    """The size of part-a, and what verify must name for its bytes: (start, end, what, which)."""
    fs, folder = open_store(str(root), None)
    path = f"{folder}/part-a.parquet"
    size = (root / "part-a.parquet").stat().st_size
    footer = read_footer(fs, path, size, "part-a.parquet")
    found: list[Region] = [(0, 4, "footer", None), (footer.offset, size, "footer", None)]
    for group in range(footer.metadata.num_row_groups):
        for name, column in column_indices(footer.metadata).items():
            chunk = footer.metadata.row_group(group).column(column)
            start = chunk.data_page_offset
            if chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            found.append((start, start + chunk.total_compressed_size, "column", name))
    manifest = open_archive(str(root)).manifest
    for entry in load_index(fs, folder, manifest.index_sha256).to_pylist():
        start = entry["offset"]
        found.append((start, start + entry["length"], "photo", entry["key"]))
    return size, found


def test_each_flipped_bit_is_named_and_the_other_photos_read(archive: Path) -> None:
    size, found = regions(archive)
    path = archive / "part-a.parquet"
    whole = path.read_bytes()
    blobs = dict(zip((a := open_archive(str(archive))).keys(), a.blobs(a.keys()), strict=True))
    seen = set()
    # Each byte of headers and small columns somewhere, the large ones by a stride.
    for at in [*range(0, size, 211), *range(size - 40, size)]:
        what, name = [(what, name) for start, end, what, name in found if start <= at < end][-1]
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        problems = verify(str(archive))
        assert problems, f"byte {at} of {what} {name}"
        assert {(problem.part, problem.what) for problem in problems} == {("part-a.parquet", what)}
        if what == "photo":
            assert [problem.row_key for problem in problems] == [name]
        if what == "column":
            assert problems[0].detail.startswith(f"{name}: row group ")
        reader = open_archive(str(archive))
        for key, blob in blobs.items():
            if what == "photo" and key == name:
                with pytest.raises(DamagedArchiveError, match=key):
                    reader.blob(key)
            else:
                assert reader.blob(key) == blob
        seen.add(what)
    assert seen == {"photo", "column", "footer"}


def test_each_bit_of_a_page_header_is_noticed(archive: Path) -> None:
    _, found = regions(archive)
    path = archive / "part-a.parquet"
    whole = path.read_bytes()
    for name in ("image.bytes", "exif", "icc", "psnr"):
        start = next(start for start, _, _, column in found if column == name)
        for bit in range(8 * 20):
            damaged = bytearray(whole)
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            (problem,) = verify(str(archive))
            assert problem.what == "column" and problem.detail.startswith(f"{name}: ")


def test_damage_is_never_read_as_metadata(archive: Path) -> None:
    path = archive / "part-a.parquet"
    whole = path.read_bytes()
    fs, folder = open_store(str(archive), None)
    index = load_index(fs, folder, open_archive(str(archive)).manifest.index_sha256)
    entry = next(entry for entry in index.to_pylist() if entry["exif_length"])
    damaged = bytearray(whole)
    damaged[entry["exif_offset"] + 7] ^= 16
    path.write_bytes(damaged)
    reader = open_archive(str(archive))
    with pytest.raises(DamagedArchiveError, match=entry["key"]):
        reader[entry["key"]]
    assert reader.blob(entry["key"])


def test_truncated_and_missing_parts(archive: Path) -> None:
    path = archive / "part-a.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    problems = verify(str(archive))
    assert problems[0].what == "footer"
    assert f"{len(whole) // 2} bytes instead of {len(whole)}" in problems[0].detail
    lost = {problem.row_key for problem in problems[1:]}
    reader = open_archive(str(archive))
    assert 0 < len(lost) < len(reader)
    for key in reader:
        if key in lost:
            with pytest.raises(DamagedArchiveError):
                reader.blob(key)
        else:
            assert reader.blob(key)
    path.unlink()
    assert whats(archive) == [("part-a.parquet", "missing", None)]


def test_a_bad_bitstream_with_a_right_hash_is_named(tmp_path: Path, stand_in: None) -> None:
    commit(str(tmp_path), {"a": [row("bad", b"no bitstream", codec="vae"), row("good", b"1")]})
    assert whats(tmp_path) == [("part-a.parquet", "photo", "bad")]


@pytest.mark.parametrize(
    ("name", "what"),
    [("index.parquet", "index"), ("manifest.json", "manifest"), ("models", "model")],
)
def test_index_manifest_and_model(archive: Path, name: str, what: str) -> None:
    path = archive / name
    if path.is_dir():
        (path,) = path.iterdir()
        name = f"models/{path.name}"
    whole = path.read_bytes()
    for at in range(0, len(whole), 97 if what != "model" else 7):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        assert whats(archive) == [(name, what, None)]
    path.unlink()
    if what == "manifest":
        with pytest.raises(ArchiveError, match="no finished archive"):
            verify(str(archive))
    else:
        assert whats(archive) == [(name, "missing", None)]


def test_photos_are_checked_without_index_and_manifest(archive: Path) -> None:
    (archive / "index.parquet").unlink()
    path = archive / "part-a.parquet"
    whole = bytearray(path.read_bytes())
    start, _, _, key = next(region for region in regions_of_photos(archive))
    whole[start + 5] ^= 1
    path.write_bytes(whole)
    assert ("part-a.parquet", "photo", key) in whats(archive)
    (archive / "manifest.json").write_text("{")
    assert whats(archive)[1:] == [("part-a.parquet", "photo", key)]


def regions_of_photos(root: Path) -> Iterator[tuple[int, int, str, str]]:
    reader = open_archive(str(root))
    for entry in reader.index.to_pylist():
        yield entry["offset"], entry["length"], "photo", entry["key"]


def test_no_flipped_bit_of_a_footer_is_more_than_damage(archive: Path) -> None:
    """Whatever the Parquet library makes of it, it comes out as damage or as a readable footer."""
    path = next(iter(sorted(archive.glob("part-*.parquet"))))
    data = path.read_bytes()
    tail = data[-int.from_bytes(data[-8:-4], "little") - 8 :]
    for at in range(len(tail)):
        damaged = bytearray(tail)
        damaged[at] ^= 1 << (at % 8)
        try:
            parse_footer(bytes(damaged), len(data), path.name)
        except DamagedArchiveError as error:
            assert path.name in str(error)
