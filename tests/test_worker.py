"""One object -> one row, and one shard -> one part, without Ray."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from photos import fill, pixels, png

from vaestream import Codec, images
from vaestream.archive import retries
from vaestream.archive.models import write_model
from vaestream.archive.schema import Row, to_table
from vaestream.archive.writer import find_part, write_part
from vaestream.errors import SourceError, VaestreamError
from vaestream.pipeline import worker
from vaestream.pipeline.attempts import (
    GIVE_UP_AFTER,
    JOB_FOLDER,
    begin_attempt,
    end_attempts,
)
from vaestream.pipeline.compressor import Compressor, Settings, kept
from vaestream.pipeline.fetch import Fetched, Witnesses, fetch_all
from vaestream.pipeline.isolate import IsolatedCompressor
from vaestream.pipeline.listing import list_sources
from vaestream.pipeline.members import MemberReader
from vaestream.pipeline.plan import Cutter, SourceObject, Version
from vaestream.pipeline.worker import ShardWorker, WorkerSpec


def item(key: str, size: int | None = None) -> SourceObject:
    return SourceObject(key, 0, f"/nowhere/{key}", f"file:///nowhere/{key}", Version(size))


# --- rows --------------------------------------------------------------------------------------


def test_a_photo_becomes_a_bitstream(codec: Codec) -> None:
    data = png(1)
    row = Compressor(codec, Settings.of(min_psnr=0), "all").row(item("a", len(data)), data)
    assert (row.codec, row.width, row.height, row.channels) == ("vae", 96, 72, 3)
    assert (row.quality, row.reason, row.error) == (50.0, None, None)
    assert row.psnr is not None and len(row.data) < len(data)
    assert codec.decode([row.data])[0].shape == (72, 96, 3)


def test_below_the_floor_or_no_smaller_the_source_is_kept(codec: Codec) -> None:
    data = png(1)
    row = Compressor(codec, Settings.of(min_psnr=99)).row(item("a"), data)
    assert (row.codec, row.data, row.reason) == ("source", data, "below the PSNR floor")
    assert (row.width, row.height, row.source_format) == (96, 72, "PNG")

    coded = codec.compress(pixels(1), quality=100).data
    small = Compressor(codec, Settings.of(quality=100, min_psnr=0))
    padding = b"\0" * max(0, len(coded) + 1 - len(data))
    assert small.row(item("a"), data + padding).codec == "vae"
    if len(data) <= len(coded):
        assert small.row(item("a"), data).reason == "no smaller than the source"


def test_a_bitstream_that_does_not_decode_to_the_photo_is_not_kept(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = png(1)
    monkeypatch.setattr(codec, "decode", lambda blobs, **_: [pixels(2)])
    row = Compressor(codec, Settings.of(min_psnr=0), "all").row(item("a"), data)
    assert (row.codec, row.data, row.reason) == ("source", data, "failed verification")
    assert Compressor(codec, Settings.of(min_psnr=0), "none").row(item("a"), data).codec == "vae"


def test_a_surprise_in_one_photo_is_that_photos_error(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(data: bytes, **options: Any) -> None:
        raise RuntimeError("a bug\nin a decoder")

    monkeypatch.setattr(images, "load", load)
    row = Compressor(codec, Settings.of()).row(item("a"), b"bytes")
    assert (row.codec, row.data) == ("source", b"bytes")
    assert row.error == "cannot be compressed: RuntimeError: a bug in a decoder"


def test_a_device_that_fails_for_all_photos_is_no_photos_error(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(codec, "compress", fail)
    with pytest.raises(VaestreamError, match=r"device cpu: nothing .* illegal memory access"):
        Compressor(codec, Settings.of()).row(item("a"), png(1))


def test_memory_that_others_had_for_a_moment_is_asked_for_again(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, tries = codec.compress, list[int]()

    def short(*args: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return compress(*args, **options)

    monkeypatch.setattr(codec, "compress", short)
    row = Compressor(codec, Settings.of(min_psnr=0)).row(item("a"), png(1))
    assert (row.codec, row.error) == ("vae", None)


def test_an_object_that_has_changed_since_it_was_listed_has_no_known_state() -> None:
    listed = SourceObject("a", 0, "/a", "file:///a", Version(3, None, '"etag"'))
    assert kept(listed, b"123").source_etag == '"etag"'
    assert kept(listed, b"1234").source_etag is None


@pytest.mark.parametrize("claim", [2**31 + 96, 2**32 - 1])
def test_a_size_that_no_picture_has_is_not_believed(codec: Codec, claim: int) -> None:
    data = png(1)[:16] + claim.to_bytes(4) + png(1)[20:]
    row = Compressor(codec, Settings.of(min_psnr=0)).row(item("a.png"), data)
    assert (row.codec, row.data, row.width) == ("source", data, None)
    assert row.error or row.reason
    assert len(to_table([row])) == 1
    ppm = b"P6 4294967296 1 255\n" + bytes(99)
    assert len(to_table([Compressor(codec, Settings.of()).row(item("a.ppm"), ppm)])) == 1


def test_the_default_floor_follows_what_was_asked_for() -> None:
    assert Settings.of().floor(50) == 28
    assert Settings.of(quality=0).floor(0) == 18
    assert Settings.of(quality=90).floor(90) == 28
    assert Settings.of(target_psnr=28).floor(70) == 27
    assert Settings.of(target_bpp=0.5).floor(10) == 20
    assert Settings.of(min_psnr=0).floor(50) == 0


# --- bytes -------------------------------------------------------------------------------------


class Flaky(LocalFileSystem):  # type: ignore[misc]
    """Fails the first `failures` reads of each path in `names`, by default of all."""

    cachable = False

    def __init__(
        self, failures: int, *names: str, error: Exception | None = None, cut: int | None = None
    ) -> None:
        super().__init__()
        self.failures, self.names, self.tries = failures, names, dict[str, int]()
        self.error, self.cut = error or TimeoutError("no answer"), cut

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        data: bytes = super().cat_file(path, *args, **options)
        if self.names and not path.endswith(self.names):
            return data
        self.tries[path] = self.tries.get(path, 0) + 1
        if self.tries[path] > self.failures:
            return data
        if self.cut is not None:
            return data[: self.cut * self.tries[path]]
        raise self.error


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.0)


def fetch(objects: list[SourceObject], fs: LocalFileSystem, **options: Any) -> list[Fetched]:
    limits = {"max_object_bytes": 1 << 30, **options}
    return list(fetch_all(objects, [fs], members=MemberReader(), **limits))


def test_objects_come_in_order_whatever_memory_is_allowed(tmp_path: Path) -> None:
    source = fill(tmp_path, [f"{i:02}.png" for i in range(40)])
    (source / "07.png").unlink()
    objects = list(listing := list_sources([str(source)]))
    (source / "11.png").unlink()
    for ahead in (1, 20_000, 1 << 30):
        got = fetch(objects, listing.stores[0], ahead_bytes=ahead)
        assert [one.item for one in got] == objects
        assert [one.item.key for one in got if one.data is None] == ["11.png"]
        assert all(
            one.data == (source / one.item.key).read_bytes() for one in got if one.data is not None
        )


@pytest.mark.usefixtures("hurried")
def test_errors_that_pass_are_tried_again_and_others_told(tmp_path: Path) -> None:
    objects = list(list_sources([str(fill(tmp_path, ["a.png", "b.png", "c.png"]))]))
    patient = fetch(objects, Flaky(5))
    assert all(one.error is None for one in patient)
    for name in ("a.png", "b.png", "c.png"):
        refused = fetch(objects, Flaky(99, name))
        told = {one.item.key: one.error for one in refused if one.error is not None}
        assert told == {name: "cannot be read: TimeoutError: no answer"}
    closed = Flaky(99, "b.png", error=PermissionError("closed"))
    assert [one.error is None for one in fetch(objects, closed)] == [True, False, True]
    assert list(closed.tries.values()) == [1]


def test_what_arrives_cut_short_is_asked_for_again(tmp_path: Path) -> None:
    objects = list(list_sources([str(fill(tmp_path, ["a.png", "b.png"]))]))
    got = fetch(objects, Flaky(2, "a.png", cut=100))
    assert [one.data for one in got] == [png(0), png(1)]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("kind", [TimeoutError, PermissionError, FileNotFoundError])
def test_a_store_that_is_down_is_no_error_of_its_photos(
    tmp_path: Path, kind: type[OSError]
) -> None:
    error = kind("no answer")
    objects = list(list_sources([str(fill(tmp_path, [f"{i}.png" for i in range(9)]))]))
    with pytest.raises(SourceError, match=r"0\.png: cannot be read: .*no answer; nor can the next"):
        fetch(objects, Flaky(99, error=error))
    # What could be read in an earlier shard no longer can.
    for gone in (error, FileNotFoundError("gone")):
        witnesses: Witnesses = {}
        fetch(objects[:2], LocalFileSystem(), witnesses=witnesses)
        with pytest.raises(SourceError, match=r"2\.png: .*; nor can .*1\.png any longer"):
            fetch(objects[2:3], Flaky(99, error=gone), witnesses=witnesses)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("error", [TimeoutError("no answer"), PermissionError("closed")])
def test_of_the_webs_hosts_one_may_fail_but_not_all(tmp_path: Path, error: OSError) -> None:
    class Web(Flaky):
        """Its URLs are files below `tmp_path`."""

        def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
            return super().cat_file(f"{tmp_path}/{path.removeprefix('http://')}", *args, **options)

        def info(self, path: str, **options: Any) -> dict[str, Any]:
            return {"size": None}

    names = [f"{host}/{n}.png" for host in "vwxyz" for n in range(4)]
    fill(tmp_path, names)
    objects = [SourceObject(n, 0, f"http://{n}", f"http://{n}", Version()) for n in names]
    dead = names[:8]
    # Two hosts that nothing comes from, and one that has had enough after a few.
    for failing in (dead, dead[2:4]):
        got = fetch(objects, Web(99, *failing, error=error))
        assert [one.item.key for one in got if one.data is None] == failing
    alone = fetch(objects[:4], Web(99, error=error))
    assert [one.data for one in alone] == [None] * 4
    with pytest.raises(SourceError, match="nor can"):
        fetch(objects[::3], Web(99, error=error))
    witnesses: Witnesses = {}
    fetch(objects[:16], Web(0), witnesses=witnesses)
    with pytest.raises(SourceError, match=r"z/0\.png: .*; nor can .* any longer"):
        fetch(objects[16:], Web(99, error=error), witnesses=witnesses)


def test_an_object_over_the_cap_is_told_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1001))
    objects = list(listing := list_sources([str(tmp_path)]))
    (got,) = fetch(objects, listing.stores[0], max_object_bytes=1000)
    assert got.data is None and "1001 bytes" in (got.error or "")


def test_an_object_over_the_cap_is_not_read_where_only_the_store_knows_its_size(
    tmp_path: Path,
) -> None:
    (tmp_path / "large").write_bytes(bytes(1001))
    url = f"file://{tmp_path}/large"
    (got,) = fetch([SourceObject("large", 0, url[7:], url, Version())], Flaky(0, cut=0))
    assert got.data == bytes(1001)
    refusing = Flaky(99, error=AssertionError("is read"))
    unknown = SourceObject("large", 0, url[7:], url, Version())
    (got,) = fetch([unknown], refusing, max_object_bytes=1000)
    assert "1001 bytes" in (got.error or "")


# --- processes ---------------------------------------------------------------------------------


class Deadly:
    """Stands in for a compressor with a photo that no process survives."""

    def row(self, item: SourceObject, data: bytes) -> Row:
        if data == b"exit":
            os._exit(7)
        if data == b"segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        return kept(item, data, reason=str(os.getpid()))


def never() -> Deadly:
    """Dies before any photo."""
    os._exit(9)


def test_only_the_photo_that_kills_is_an_error() -> None:
    with IsolatedCompressor(Deadly) as isolated:
        rows = [isolated.row(item(text), text.encode()) for text in ("a", "exit", "b", "segfault")]
        again = isolated.row(item("c"), b"c")
    assert [row.data for row in rows] == [b"a", b"exit", b"b", b"segfault"]
    assert rows[0].error is None and rows[2].error is None and again.error is None
    assert "exit code 7" in (rows[1].error or "")
    assert "signal SIGSEGV" in (rows[3].error or "")
    assert rows[0].reason != str(os.getpid())


def test_a_process_that_never_begins_is_no_photos_fault() -> None:
    with (
        pytest.raises(VaestreamError, match="before the first photo: exit code 9"),
        IsolatedCompressor(never) as isolated,
    ):
        isolated.row(item("a"), b"a")


@pytest.fixture
def destination(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path)
    assert not list(tmp_path.glob(f"{JOB_FOLDER}/attempts/*"))


def test_attempts_count_over_runs_and_end(destination: str) -> None:
    fs = LocalFileSystem()
    counted = [begin_attempt(fs, destination, "p", run) for run in ("one", "one", "two")]
    assert counted == [0, 1, 2]
    for expected in range(3, 2 + GIVE_UP_AFTER):
        assert begin_attempt(fs, destination, "p", "two") == expected
    with pytest.raises(VaestreamError, match="has killed its worker 5 times"):
        begin_attempt(fs, destination, "p", "two")
    assert begin_attempt(fs, destination, "p", "three") > 2
    end_attempts(fs, destination, "p")
    assert begin_attempt(fs, destination, "p", "four") == 0
    end_attempts(fs, destination, "p")


# --- two at one shard --------------------------------------------------------------------------


@pytest.mark.parametrize("looks", [True, False])
def test_the_part_that_stands_first_stays(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    fs, root = LocalFileSystem(), str(tmp_path / "archive")
    listing = list_sources([str(fill(tmp_path / "source", [f"{i}.png" for i in range(6)]))])
    objects = list(listing)
    settings = Settings.of(min_psnr=0)
    spec = WorkerSpec(
        stores=tuple(listing.stores),
        fs=fs,
        root=root,
        model_id=write_model(fs, root, codec.weights),
        settings=settings,
        verify="none",
        device="cpu",
        threads=1,
        max_object_bytes=1 << 20,
        run_id="run",
    )
    (shard,) = Cutter(settings.to_json(), spec.model_id).shards(objects)
    # The slower worker looks after each photo, or never; the other one has other bytes.
    monkeypatch.setattr(worker, "_LOOK_SECONDS", -1.0 if looks else 1e9)
    load, loaded = images.load, list[bytes]()

    def slow(data: bytes, **options: Any) -> Any:
        loaded.append(data)
        if len(loaded) == 1:
            rows = [kept(item, b"as the other has it") for item in shard.objects]
            write_part(fs, root, shard.part_id, rows)
        return load(data, **options)

    monkeypatch.setattr(images, "load", slow)
    info = ShardWorker(spec).run(shard).part
    # One is loaded ahead.
    assert len(loaded) <= 2 if looks else len(loaded) == 6
    assert info == find_part(fs, root, shard.part_id) and info.stats.photos_vae == 0
    assert [path.name for path in (tmp_path / "archive").glob("*part*")] == [info.name]
