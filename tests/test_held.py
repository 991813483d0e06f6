"""What stands in a destination is found by key, and what stands there twice is noticed."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from vaestream.archive.manifest import PartInfo
from vaestream.archive.schema import Row
from vaestream.archive.writer import write_part
from vaestream.errors import SourceError
from vaestream.pipeline import held
from vaestream.pipeline.held import HeldRows
from vaestream.pipeline.plan import Cutter, SourceObject, Version
from vaestream.pipeline.work import Growth

TIME = datetime(2020, 1, 2, tzinfo=UTC)


def write(root: Path, name: str, keys: list[str], url: str = "file:///x") -> PartInfo:
    rows = [
        Row(
            key=key,
            data=b"x",
            codec="source",
            source_size=len(key),
            source_mtime=TIME,
            source_url=url,
            source_etag=f"e{key}",
            source_sha256=hashlib.sha256(b"x").hexdigest(),
        )
        for key in sorted(keys)
    ]
    return write_part(LocalFileSystem(), str(root), name * 32, rows)


def held_rows(root: Path, *parts: PartInfo) -> HeldRows:
    return HeldRows(LocalFileSystem(), str(root), parts)


def test_every_key_is_found_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_CHUNK", 3)
    keys = [f"{i:03}" for i in range(0, 40, 2)] + ["ü", "a/b"]
    parts = [write(tmp_path, "a", keys[::2]), write(tmp_path, "b", keys[1::2])]
    rows = held_rows(tmp_path, *parts)
    assert len(rows) == len(keys)
    for order in (sorted(keys), keys[::-1]):
        for key in order:
            found = rows.find(key)
            assert found is not None and found.part is parts[keys.index(key) % 2]
            version = found.version
            assert not found.unread
            assert (version.size, version.mtime, version.etag) == (len(key), TIME, f"e{key}")
    assert [rows.find(key) for key in ("", "001", "zz", "\U0001f600")] == [None] * 4
    assert held_rows(tmp_path).find("000") is None


@pytest.mark.parametrize(
    ("url", "same", "other"),
    [
        ("file:///in/a.jpg", "file:///in/b/..//a.jpg", "file:///in/b/a.jpg"),
        ("s3://in/a.jpg", "s3://in/a.jpg", "s3://in//a.jpg"),
        ("tar://a.jpg::file:///in/x.tar", "tar://a.jpg::file:///in//x.tar", "file:///in/y.tar"),
        ("https://h/x?at=1", "https://h/x?at=2", "https://h/y?at=1"),
    ],
)
def test_a_place_is_the_same_however_it_is_spelled(
    tmp_path: Path, url: str, same: str, other: str
) -> None:
    rows = held_rows(tmp_path, write(tmp_path, "a", ["k"], url))
    found = rows.find("k")
    assert found is not None and rows.url_of("k", found.part) == url
    assert found.was_at(url) and found.was_at(same) and not found.was_at(other)


def test_what_has_the_same_size_elsewhere_is_another_object(tmp_path: Path) -> None:
    """Where its store tells neither a time nor an ETag."""
    part = write(tmp_path, "a", ["k"], "smb://host/one/k")

    def work(folder: str, version: Version, *, moved: bool = False) -> Growth:
        item = SourceObject("k", 0, "k", f"smb://host/{folder}/k", version)
        cutter = Cutter({}, "model")
        growth = Growth(LocalFileSystem(), str(tmp_path), [item], cutter, [part], [], moved=moved)
        assert list(growth) == []
        return growth

    for unchanged in (
        work("one", Version(size=1)),
        work("two", Version(size=1, mtime=TIME)),
        work("two", Version(size=1), moved=True),
    ):
        assert (unchanged.counts.unchanged, unchanged.parts) == (1, [part])
    with pytest.raises(SourceError, match=r"two/k: .*another object as 'k', that was smb.*one/k"):
        work("two", Version(size=1))


def test_parts_that_share_a_key_are_named(tmp_path: Path) -> None:
    one = write(tmp_path, "a", ["1", "2"])
    others = [
        write(tmp_path, "b", ["3", "4"]),
        write(tmp_path, "c", ["4", "5"]),
        write(tmp_path, "d", ["2", "9"]),
        write(tmp_path, "e", ["7"]),
    ]
    rows, empty = held_rows(tmp_path, *others), held_rows(tmp_path)
    assert rows.sharing(held_rows(tmp_path, one)) == [others[2]]
    assert rows.sharing(empty) == empty.sharing(rows) == []
    assert rows.surplus(held_rows(tmp_path, one)) == others[1:3]
    assert rows.surplus(empty) == [others[1]]
    assert empty.surplus(rows) == []


def test_what_makes_way_holds_up_nothing_else(tmp_path: Path) -> None:
    """The second part goes for the first's sake, so the third may stay."""
    chain = [write(tmp_path, "a", ["1", "2"]), write(tmp_path, "b", ["2", "3"])]
    chain.append(write(tmp_path, "c", ["3", "4"]))
    assert held_rows(tmp_path, *chain).surplus(held_rows(tmp_path)) == [chain[1]]
