"""Sources to objects to shards: nothing is lost, nothing is there twice, names stay the same."""

import functools
import http.server
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from vaestream.errors import SourceError
from vaestream.pipeline.fetch import fetch_all
from vaestream.pipeline.listing import Listing
from vaestream.pipeline.listing import list_sources as find_sources
from vaestream.pipeline.members import MemberReader
from vaestream.pipeline.plan import Cutter, Shard, SourceObject, safe_key
from vaestream.pipeline.stores import options_for
from vaestream.urls import public_url


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


class Listed:
    """A listing that has come to its end."""

    def __init__(self, listing: Listing) -> None:
        self.objects: list[SourceObject] = list(listing)
        self.stores, self.left_out = listing.stores, listing.left_out


def list_sources(*args: Any, **options: Any) -> Listed:
    return Listed(find_sources(*args, **options))


def keys(listing: Listed) -> list[str]:
    return [item.key for item in listing.objects]


def cut(listing: Listed, images: int = 2, max_bytes: int = 1 << 30) -> list[Shard]:
    cutter = Cutter({"quality": 50.0}, "m", images=images, max_bytes=max_bytes)
    return list(cutter.shards(listing.objects))


def test_every_file_below_a_folder_is_listed_once_in_order(tmp_path: Path) -> None:
    write(tmp_path, "b.jpg", "a/x.png", "a/.hidden", ".dot/y", "a/b/c/deep.tif", "empty")
    listing = list_sources([str(tmp_path)])
    assert keys(listing) == [".dot/y", "a/.hidden", "a/b/c/deep.tif", "a/x.png", "b.jpg", "empty"]
    assert [item.version.size for item in listing.objects] == [
        len(item.key) for item in listing.objects
    ]
    assert all(item.version.mtime is not None for item in listing.objects)


@pytest.mark.parametrize("name", ["a::b.jpg", "s3:odd.jpg", "x [1]?*#.jpg", "ü ä.jpg", "a\nb"])
def test_odd_names_stay_as_they_are_and_can_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"12")
    for source in (tmp_path, tmp_path / name):
        (item,) = (listing := list_sources([str(source)])).objects
        assert item.key == name
        assert listing.stores[item.store].cat_file(item.path) == b"12"


def test_names_that_are_not_utf8_get_an_escaped_key_and_can_be_read(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"1")
    (item,) = (listing := list_sources([str(tmp_path)])).objects
    assert item.key == "caf%E9.jpg"
    assert item.url.encode().endswith(b"caf%E9.jpg")
    assert listing.stores[0].cat_file(item.path) == b"1"
    assert cut(listing)


@pytest.mark.parametrize(
    ("relative", "key"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("../up.jpg", "%2E%2E/up.jpg"),
        ("/etc/passwd", "%2F/etc/passwd"),
        ("a//b", "a/%2F/b"),
        ("./a..b", "%2E/a..b"),
        ("%2E%2E/a", "%252E%252E/a"),
        ("100%2F/a", "100%2F/a"),
    ],
)
def test_a_key_cannot_lead_out_of_a_folder(relative: str, key: str) -> None:
    assert safe_key(relative) == key


def test_links_to_files_count_links_to_folders_and_pipes_do_not(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "real.jpg")
    other = write(tmp_path / "other", "elsewhere.jpg")
    (source / "link.jpg").symlink_to(other / "elsewhere.jpg")
    (source / "dead.jpg").symlink_to(tmp_path / "gone.jpg")
    (source / "circle").symlink_to(source)
    os.mkfifo(source / "pipe")
    listing = list_sources([str(source)])
    assert keys(listing) == ["dead.jpg", "link.jpg", "real.jpg"]
    assert listing.objects[1].version.size == len("elsewhere.jpg")
    assert (listing.objects[0].problem or "").startswith("FileNotFoundError")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a/x.jpg")
    (tmp_path / "a").chmod(0)
    with pytest.raises(SourceError, match="cannot be listed"):
        list_sources([str(tmp_path)])


def test_a_folder_that_is_gone_when_its_turn_comes_is_empty(tmp_path: Path) -> None:
    write(tmp_path, "a/x.jpg", "b/x.jpg", "c/x.jpg")
    for source in (str(tmp_path), f"local://{tmp_path}"):
        objects = iter(find_sources([source]))
        assert next(objects).key == "a/x.jpg"
        (tmp_path / "b").rename(tmp_path / "d")
        assert [item.key for item in objects] == ["c/x.jpg"]
        (tmp_path / "d").rename(tmp_path / "b")
    with pytest.raises(SourceError, match="no such"):
        find_sources([str(tmp_path / "gone")])


@pytest.mark.parametrize(("owner", "method"), [(LocalFileSystem, "info"), (os, "scandir")])
def test_any_error_of_a_store_is_told_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, method: str
) -> None:
    class EndpointConnectionError(Exception):
        """As botocore has it: no OSError."""

    def fail(*args: object, **options: object) -> None:
        raise EndpointConnectionError("no\nanswer")

    write(tmp_path, "a/x.jpg")
    monkeypatch.setattr(owner, method, fail)
    told = "cannot be listed: EndpointConnectionError: no answer"
    with pytest.raises(SourceError, match=told):
        list_sources([str(tmp_path)])


def test_globs_and_files(tmp_path: Path) -> None:
    write(tmp_path, "2019/a.jpg", "2020/b.jpg", "2020/c.png", "2021/sub/d.jpg")
    assert keys(list_sources([str(tmp_path / "20*/*.jpg")])) == ["2019/a.jpg", "2020/b.jpg"]
    assert keys(list_sources([str(tmp_path / "202*")])) == [
        "2020/b.jpg",
        "2020/c.png",
        "2021/sub/d.jpg",
    ]
    assert keys(list_sources([str(tmp_path / "20*" / "**")])) == [
        "2019/a.jpg",
        "2020/b.jpg",
        "2020/c.png",
        "2021/sub/d.jpg",
    ]
    files = [str(tmp_path / name) for name in ("2020/c.png", "2019/a.jpg")]
    assert keys(list_sources(files)) == ["c.png", "a.jpg"]


def test_several_sources_cannot_share_a_key(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "x.jpg", "y.jpg")
    two = write(tmp_path / "two", "x.jpg")
    three = write(tmp_path / "three", "z.jpg")
    listing = list_sources([str(one), str(two), str(three)])
    assert keys(listing) == ["one/x.jpg", "one/y.jpg", "two/x.jpg", "three/z.jpg"]
    again = write(tmp_path / "deep" / "one", "x.jpg")
    names = [f"{tmp_path.name}/one/x.jpg", f"{tmp_path.name}/one/y.jpg", "deep/one/x.jpg"]
    assert keys(list_sources([str(one), str(again)])) == names
    assert keys(list_sources([str(one / "x.jpg"), str(two / "x.jpg"), str(three / "z.jpg")])) == [
        "one/x.jpg",
        "two/x.jpg",
        "z.jpg",
    ]
    with pytest.raises(SourceError, match=r"both be kept as 'z\.jpg'"):
        list_sources([str(write(tmp_path / "four", "z.jpg")), str(three / "z.jpg")])


def test_the_same_object_given_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, "x.jpg", "sub/y.jpg")
    sources = [str(tmp_path), str(tmp_path / "x.jpg"), f"file://{tmp_path}/sub"]
    root = tmp_path.name
    assert keys(list_sources(sources)) == [f"{root}/sub/y.jpg", f"{root}/x.jpg"]


def test_include_and_exclude(tmp_path: Path) -> None:
    write(tmp_path, "2019/a.jpg", "2019/a.xmp", ".cache/t.jpg", "2020/b.JPG", "2020/raw/c.jpg")

    def left(**patterns: list[str]) -> tuple[list[str], int]:
        listing = list_sources([str(tmp_path)], **patterns)
        return keys(listing), listing.left_out

    assert left(include=["*.jpg"], exclude=[".*"]) == (["2019/a.jpg", "2020/raw/c.jpg"], 2)
    assert left(include=["2020/*"]) == (["2020/b.JPG", "2020/raw/c.jpg"], 3)
    assert left(exclude=["raw", "*.xmp", ".*"]) == (["2019/a.jpg", "2020/b.JPG"], 1)
    with pytest.raises(SourceError, match="5 objects, all of them left out"):
        left(include=["*.gif"])


def test_a_folder_that_is_left_out_need_not_be_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jpg", "lost+found/b.jpg", "c/lost+found/d.jpg")
    scandir = os.scandir

    def closed(folder: str) -> Any:
        if folder.endswith("lost+found"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(SourceError, match="Permission denied"):
        list_sources([str(tmp_path)])
    assert keys(list_sources([str(tmp_path)], exclude=["lost+*"])) == ["a.jpg"]


def test_files_that_would_share_a_key_are_told_of_at_once(tmp_path: Path) -> None:
    write(tmp_path, "x/caf%E9.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/x/caf\xe9.jpg")).write_bytes(b"1")
    with pytest.raises(SourceError, match=r"'caf%E9.jpg' and 'caf\\udce9.jpg' .* rename one"):
        list_sources([str(tmp_path)])


def test_the_destination_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x.jpg", "archive/part-1.parquet", "archive-of-mine/y.jpg")
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    for destination in (tmp_path / "archive", link / "archive"):
        listing = list_sources([str(tmp_path)], destination=str(destination))
        assert keys(listing) == ["archive-of-mine/y.jpg", "x.jpg"]
    with pytest.raises(SourceError, match="lies in the destination"):
        list_sources([str(tmp_path)], destination=str(link))
    listing = list_sources(
        [str(path) for path in sorted(tmp_path.iterdir())], destination=str(tmp_path / "archive")
    )
    assert sorted(keys(listing)) == ["x.jpg", "y.jpg"]
    for source in ("archive-of-mine", "archive-of-mine/y.jpg", "archive-of-mine/*", "arch*"):
        place = str(tmp_path / source)
        with pytest.raises(SourceError, match=f"{re.escape(place)}: lies in the destination"):
            list_sources([__file__, place], destination=str(link))
    monkeypatch.chdir(tmp_path)
    (tmp_path.parent / "list.txt").write_text("https://host/a.jpg\n")
    assert keys(list_sources(["../list.txt"], destination=".")) == ["host/a.jpg"]
    (tmp_path.parent / "list.txt").write_text(f"{tmp_path}/x.jpg\n")
    with pytest.raises(SourceError, match=r"x.jpg: lies in the destination"):
        keys(list_sources([str(tmp_path.parent / "list.txt")], destination=str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("memory://photos", "belongs to one process"),
        ("nosuch://photos", "(?i)protocol not known"),
        ("zip://a.jpg::file:///x.zip", "chained"),
        ("/no/such/folder", "no such file"),
        ("/no/such/*.jpg", "no file or folder matches"),
    ],
)
def test_a_source_that_cannot_be_is_named_with_the_reason(source: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason) as caught:
        list_sources([source])
    assert source in str(caught.value)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no objects"):
        list_sources([str(tmp_path)])


def test_shards_are_bounded_by_number_and_bytes(tmp_path: Path) -> None:
    for i, size in enumerate([10, 10, 10, 50, 1, 1, 1, 1]):
        (tmp_path / f"{i}").write_bytes(bytes(size))
    shards = cut(list_sources([str(tmp_path)]), images=3, max_bytes=25)
    assert [[item.key for item in shard.objects] for shard in shards] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5", "6"],
        ["7"],
    ]


def test_a_shards_name_follows_from_its_objects_settings_and_model_alone(tmp_path: Path) -> None:
    write(tmp_path, "a", "b", "c")
    before = [shard.part_id for shard in cut(list_sources([str(tmp_path)]))]
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    listing = list_sources([str(moved)])
    assert [shard.part_id for shard in cut(listing)] == before
    objects = listing.objects
    others = [
        list(Cutter({"quality": 51.0}, "m", images=2).shards(objects)),
        list(Cutter({"quality": 50.0}, "n", images=2).shards(objects)),
    ]
    os.utime(moved / "a", (1, 1))
    changed = [shard.part_id for shard in cut(list_sources([str(moved)]))]
    assert changed[0] != before[0] and changed[1] == before[1]
    names = {*before, changed[0], *(shard.part_id for other in others for shard in other)}
    assert len(names) == 7


def test_storage_options_go_to_the_stores_they_are_meant_for() -> None:
    flat = {"client_kwargs": {"region_name": "x"}}
    assert options_for("s3://bucket/a", flat) == flat
    assert options_for("/local/a", flat) == {}
    named = {"s3": {"anon": True}, "https": {}}
    assert options_for("s3://bucket/a", named) == {"anon": True}
    assert options_for("gs://bucket/a", named) == {}
    assert options_for("https://host/a", named) == {}


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://h/a.jpg?X-Amz-Signature=abc&size=full", "https://h/a.jpg?size=full"),
        ("https://me:secret@h/a.jpg?sig=x", "https://h/a.jpg"),
        ("https://h/a?Key-Pair-Id=b&AWSAccessKeyId=c&apikey=d", "https://h/a"),
        ("https://h/a?design=b&keyword=c&X-Sig=d", "https://h/a?design=b&keyword=c"),
        ("https://secret@h/a@b", "https://h/a@b"),
        ("sftp://me:secret@h/a", "sftp://h/a"),
        ("sftp://me@h/a", "sftp://me@h/a"),
        ("simplecache::https://me:secret@h/a?sig=x", "simplecache::https://h/a"),
        ("zip://a::https://me:secret@h/b", "zip://a::https://h/b"),
        ("abfs://box@account/a", "abfs://box@account/a"),
        ("s3://bucket/a?key=b", "s3://bucket/a?key=b"),
        ("/a:b@c/d?token=1", "/a:b@c/d?token=1"),
    ],
)
def test_a_url_is_told_without_its_secrets(url: str, told: str) -> None:
    assert public_url(url) == told


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Gives parts of files too."""

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if self.path.startswith("/closed/"):
            self.send_error(403)
        elif wanted is None or not path.is_file():
            super().do_GET()
        else:
            begin, end = wanted.removeprefix("bytes=").split("-")
            data = path.read_bytes()[int(begin) : int(end) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {begin}-{end}/{path.stat().st_size}")
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A real HTTP server over `tmp_path`."""
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_files_over_http(tmp_path: Path, web: str) -> None:
    pytest.importorskip("aiohttp")
    write(tmp_path, "a/x.jpg", "y z.jpg")
    urls = [f"{web}/a/x.jpg?size=full", f"{web}/y%20z.jpg"]
    listing = list_sources(urls)
    assert keys(listing) == ["x.jpg", "y%20z.jpg"]
    data = [listing.stores[item.store].cat_file(item.path) for item in listing.objects]
    assert data == [b"a/x.jpg", b"y z.jpg"]
    with pytest.raises(SourceError, match="no such file"):
        list_sources([f"{web}/gone.jpg"])


def test_a_signed_url_of_what_holds_photos_stands_for_them(tmp_path: Path, web: str) -> None:
    pytest.importorskip("aiohttp")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", b"of the zip")
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        tar.add(write(tmp_path, "b.jpg") / "b.jpg", "b.jpg")
    pq.write_table(pa.table({"image": [b"of the table"]}), tmp_path / "photos.parquet")
    (tmp_path / "list.csv").write_text(f"url\n{web}/b.jpg\n")
    for name, data in (
        ("photos.zip", b"of the zip"),
        ("photos.tar.gz", b"b.jpg"),
        ("photos.parquet", b"of the table"),
        ("list.csv", b"b.jpg"),
    ):
        listing = list_sources([f"{web}/{name}?X-Amz-Signature=abcdef"])
        assert "abcdef" not in " ".join(item.key + item.url for item in listing.objects)
        limits: dict[str, Any] = {"max_object_bytes": 1 << 20}
        found = fetch_all(listing.objects, listing.stores, members=MemberReader(), **limits)
        assert [got.data for got in found] == [data]


def test_a_signed_url_leaves_no_signature(tmp_path: Path, web: str) -> None:
    pytest.importorskip("aiohttp")
    write(tmp_path, "x.jpg")
    signed = f"{web}/x.jpg?X-Amz-Signature=abcdef&size=full"
    # What is told of it later is quoted anew: not just the text that stands here.
    credential = "X-Amz-Credential=abcdef%2Fus&X-Amz-Security-Token=a%2Bbcdef"
    refused = [f"{web}/gone.jpg?sig=abcdef", f"{web}/closed/x.jpg?{credential}"]
    (tmp_path / "urls.txt").write_text("\n".join([signed, *refused]))
    objects = list(listing := find_sources([str(tmp_path / "urls.txt")]))
    assert "abcdef" not in " ".join(item.key + item.url for item in objects)
    limits: dict[str, Any] = {"max_object_bytes": 1 << 20}
    found = list(fetch_all(objects, listing.stores, members=MemberReader(), **limits))
    assert [got.data for got in found] == [b"x.jpg", None, None]
    for got in found[1:]:
        assert got.error and "bcdef" not in got.error
    with pytest.raises(SourceError) as caught:
        find_sources([f"{web}/gone.jpg?X-Amz-Signature=abcdef"])
    assert "abcdef" not in str(caught.value)
