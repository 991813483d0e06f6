"""Archives back into folders: in parallel, and on after an interruption."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from archive_samples import commit, row
from photos import fill
from PIL import Image
from without_ray import without_ray

import vaestream
from vaestream.errors import VaestreamError
from vaestream.pipeline import cluster
from vaestream.pipeline import extract as module
from vaestream.pipeline.cluster import Pool
from vaestream.pipeline.extract import Extracted, extract

NAMES = [f"{i:02}.png" for i in range(10)]


@pytest.fixture(scope="module")
def archive(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> vaestream.Archive:
    folder = tmp_path_factory.mktemp("extract")
    source = fill(folder / "source", NAMES)
    for name in ("notes.txt", "d/more.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(name.encode())
    for path in source.rglob("*.*"):
        os.utime(path, (1_500_000_000, 1_500_000_000))
    with without_ray():
        vaestream.compress(source, folder / "archive", weights=weights, min_psnr=0.0)
    return vaestream.open(str(folder / "archive"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)


def test_workers_write_what_one_process_writes(
    local_ray: Path, archive: vaestream.Archive, tmp_path: Path
) -> None:
    alone = extract(archive, str(tmp_path / "alone"), workers=0)
    seen: list[int] = []
    together = extract(
        archive,
        str(tmp_path / "together"),
        progress=lambda now: seen.append(now.decoded + now.verbatim),
    )
    assert together == alone == Extracted(decoded=10, verbatim=2)
    assert len(seen) == 3 and seen[-1] == 12
    written = files(tmp_path / "alone")
    assert written == files(tmp_path / "together")
    assert sorted(written) == sorted([*NAMES, "notes.txt", "d/more.txt"])
    assert written["d/more.txt"] == b"d/more.txt"
    with Image.open(tmp_path / "together" / "03.png") as image:
        assert image.size == (96, 72)
    assert {p.stat().st_mtime for p in (tmp_path / "together").rglob("*.*")} == {1_500_000_000}


def test_no_two_photos_get_one_name(weights: Path, tmp_path: Path) -> None:
    names = ["p.jpg", "p.png", "p.jpg.webp", "q.gif", "q.tif", "r", "r.bmp", "s.jpg.png", "s.jpg"]
    source = fill(tmp_path / "source", names)
    for number, name in enumerate(["q.gif.png", "p.txt"]):
        (source / name).write_bytes(f"kept {number}".encode())
    with without_ray():
        vaestream.compress(source, tmp_path / "archive", weights=weights, min_psnr=0.0)
    archive = vaestream.open(str(tmp_path / "archive"))
    result = extract(archive, str(tmp_path / "out"), format="png")
    assert (result.decoded, result.verbatim, result.failures) == (9, 2, {})
    assert len(found := files(tmp_path / "out")) == 11
    assert found["q.gif.png"] == b"kept 0" and found["p.txt"] == b"kept 1"


def test_workers_are_on_the_device_that_is_asked_for(
    archive: vaestream.Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def plan(*_: object, device: str, **__: object) -> list[Pool]:
        asked.append(device)
        raise VaestreamError("enough")

    monkeypatch.setattr(cluster, "ray_session", lambda address: nullcontext(False))
    monkeypatch.setattr(cluster, "cluster_nodes", lambda: [{"CPU": 1.0, "GPU": 1.0}])
    monkeypatch.setattr(cluster, "plan_pools", plan)
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        with pytest.raises(VaestreamError, match="enough"):
            extract(archive.to(device), str(tmp_path), workers=1)
    assert asked == ["auto", "cpu", "cuda", "cuda"]


def test_what_was_never_read_is_not_written(tmp_path: Path) -> None:
    # A store that told no size, and a file that has none.
    gone = row("gone.jpg", b"", error="cannot be read: 404")
    empty = row("empty.jpg", b"", error="empty file")
    commit(str(tmp_path / "archive"), {"a": [empty, gone]})
    result = extract(vaestream.open(tmp_path / "archive"), str(tmp_path / "out"), workers=0)
    assert (result.verbatim, result.failures) == (1, {"gone.jpg": "cannot be read: 404"})
    assert files(tmp_path / "out") == {"empty.jpg": b""}


def test_it_goes_on_where_it_was_interrupted(archive: vaestream.Archive, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(now: Extracted) -> None:
        if now.decoded + now.verbatim == 8:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        extract(archive, str(out), workers=0, progress=stop)
    before = {path: path.stat().st_ino for path in out.glob("*.*") if path.is_file()}
    assert len(before) == 8
    result = extract(archive, str(out), workers=0)
    assert (result.earlier, result.decoded + result.verbatim) == (8, 4)
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert sorted(files(out)) == sorted(archive)
    assert extract(archive, str(out), workers=0).earlier == 0


@pytest.mark.parametrize("view", [{"region": (0, 0, 0, 9)}, {"max_size": 0}])
def test_a_view_that_no_picture_has_is_told_at_once(
    archive: vaestream.Archive, tmp_path: Path, view: dict[str, Any]
) -> None:
    with pytest.raises(VaestreamError, match="picture"):
        extract(archive, str(tmp_path / "out"), **view)
    assert not (tmp_path / "out").exists()


def test_another_format_is_another_extraction(archive: vaestream.Archive, tmp_path: Path) -> None:
    def stop(now: Extracted) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        extract(archive, str(out), workers=0, progress=stop)
    result = extract(archive, str(out), workers=0, format="jpeg")
    assert (result.earlier, result.decoded, result.verbatim) == (0, 10, 2)
    assert len(list(out.glob("*.jpg"))) == 10


def test_a_part_that_is_cut_keeps_back_only_its_own_rows(weights: Path, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", NAMES[:4])
    with without_ray():
        vaestream.compress(
            source, tmp_path / "archive", weights=weights, min_psnr=0.0, shard_images=2
        )
    opened = vaestream.open(str(tmp_path / "archive"))
    home = opened.index.to_pylist()[0]["part"]
    part = tmp_path / "archive" / home
    part.write_bytes(part.read_bytes()[:500])
    result = extract(vaestream.open(str(tmp_path / "archive")), str(tmp_path / "out"), workers=0)
    assert result.decoded == 2 and sorted(files(tmp_path / "out")) == NAMES[2:4]
    assert sorted(result.failures) == NAMES[:2]
    assert all(home in told for told in result.failures.values())
