"""The job on a real Ray: every object gets its row, whatever happens in between."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from photos import files, fill, png
from PIL import Image, ImageOps
from waiting import wait_for
from without_ray import without_ray

import vaestream
from vaestream.archive.manifest import read_manifest
from vaestream.archive.verify import verify
from vaestream.errors import (
    ArchiveError,
    DamagedArchiveError,
    SettingsMismatchError,
    SourceError,
    VaestreamError,
)
from vaestream.pipeline import cluster, destination, job
from vaestream.pipeline.cluster import cause_of, plan_pools, run_shards
from vaestream.pipeline.destination import Destination
from vaestream.pipeline.job import Progress, Summary

Run = Callable[..., Summary]


@pytest.fixture
def small(weights: Path) -> Run:
    """`vaestream.compress` with the small model, in shards of two."""

    def compress(source: Path, destination: Path, **options: Any) -> Summary:
        defaults: dict[str, Any] = {"min_psnr": 0.0, "shard_images": 2, "weights": weights}
        return vaestream.compress(source, destination, **{**defaults, **options})

    return compress


@pytest.fixture
def run(local_ray: Path, small: Run) -> Run:
    """`small` on the tests' Ray."""
    return small


@pytest.fixture
def run_here(small: Run) -> Run:
    """`small` in this process."""
    return without_ray()(small)


@pytest.fixture
def marks(local_ray: Path) -> Iterator[Path]:
    """The hook folder, empty before and after."""
    yield local_ray
    for mark in [*local_ray.glob("waiting-*"), local_ray / "go", local_ray / "deaths"]:
        mark.unlink(missing_ok=True)


def test_every_object_gets_a_row_and_nothing_is_lost(run: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png", "sub/b.png", "sub/c.png"])
    plain = {"notes.txt": b"not a photo", "empty": b"", "cut.png": png(9)[:2000]}
    for name, data in plain.items():
        (source / name).write_bytes(data)
    (source / "dead.png").symlink_to(tmp_path / "gone.png")
    seen: list[Progress] = []
    summary = run(source, tmp_path / "archive", verify="all", progress=seen.append)

    archive = vaestream.open(str(tmp_path / "archive"))
    rows = {row.key: row for row in archive.rows()}
    names = ["a.png", "dead.png", "sub/b.png", "sub/c.png"]
    assert sorted(rows) == sorted([*names, *plain])
    for name, data in plain.items():
        assert rows[name].codec == "source"
        assert archive.blob(name) == data
    for name in ("a.png", "sub/b.png", "sub/c.png"):
        assert rows[name].codec == "vae"
        assert archive[name].size == (96, 72)
    assert "FileNotFoundError" in (rows["dead.png"].error or "")
    assert rows["cut.png"].error is not None and rows["notes.txt"].reason is not None
    assert (summary.objects, summary.photos) == (7, 3)
    assert sum(summary.kept.values()) == 2 and sum(summary.errors.values()) == 2
    assert sorted(summary.failed) == ["cut.png", "dead.png"]
    assert [(one.done_shards, one.shards) for one in seen] == [(i, 4) for i in range(5)]
    assert seen[-1].done_objects == seen[-1].objects == 7
    assert not (tmp_path / "archive" / ".vaestream-job").exists()
    assert verify(str(tmp_path / "archive")) == []


def test_a_finished_job_does_nothing_and_starts_no_ray(
    small: Run, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png"])
    first = run_here(source, tmp_path / "archive")
    before = files(tmp_path / "archive")
    monkeypatch.setattr(job, "ray_session", lambda address: pytest.fail("Ray was asked for"))
    second = small(source, tmp_path / "archive")
    assert second.up_to_date and not first.up_to_date
    assert (second.objects, second.source_bytes) == (first.objects, first.source_bytes)
    assert files(tmp_path / "archive") == before


def test_new_photos_make_new_parts_and_old_ones_stay(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["b.png", "d.png", "f.png"])
    run_here(source, tmp_path / "archive")
    before = {name: data for name, data in files(tmp_path / "archive").items() if "part-" in name}
    fill(source, ["a.png", "e.png"], first=7)
    (source / "b.png").unlink()
    summary = run_here(source, tmp_path / "archive")
    after = files(tmp_path / "archive")
    assert before.items() <= after.items()
    assert summary.objects == 5
    assert list(vaestream.open(str(tmp_path / "archive"))) == [
        f"{name}.png" for name in ("a", "b", "d", "e", "f")
    ]


def test_other_settings_are_refused_unless_asked_for(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png"])
    archive = tmp_path / "archive"
    run_here(source, archive, quality=20)
    before = files(archive)
    with pytest.raises(SettingsMismatchError, match=r"quality 20\.0 \(now 30\.0\)"):
        run_here(source, archive, quality=30)
    assert files(archive) == before

    run_here(source, archive, quality=30, overwrite=True)
    fresh = tmp_path / "fresh"
    run_here(source, fresh, quality=30)
    assert files(archive) == files(fresh)


def test_a_later_run_takes_in_what_is_new_or_has_changed_and_drops_nothing(
    run_here: Run, tmp_path: Path
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png", "d.png", "e.png"])
    archive = tmp_path / "archive"
    run_here(source, archive)
    before = {row.key: row for row in vaestream.open(str(archive)).rows()}
    blobs = {key: vaestream.open(str(archive)).blob(key) for key in before}
    (source / "b.png").write_bytes(png(99))
    (source / "d.png").write_bytes(b"no photo any more")
    (source / "e.png").unlink()
    fill(source, ["f.png"])
    os.utime(source / "a.png", (1, 1))

    summary = run_here(source, archive)
    assert (summary.objects, summary.changed, summary.unlisted) == (6, 3, 1)
    opened = vaestream.open(str(archive))
    after = {row.key: row for row in opened.rows()}
    assert sorted(after) == ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"]
    assert (after["c.png"], after["e.png"]) == (before["c.png"], before["e.png"])
    assert {key: opened.blob(key) for key in ("c.png", "e.png")} == {
        key: blobs[key] for key in ("c.png", "e.png")
    }
    assert after["a.png"].source_mtime != before["a.png"].source_mtime
    assert opened.blob("b.png") != blobs["b.png"]
    assert (after["d.png"].codec, opened.blob("d.png")) == ("source", b"no photo any more")
    assert verify(str(archive)) == []
    assert len(list(archive.glob("part-*.parquet"))) == len(opened.manifest.parts)

    again = run_here(source, archive)
    assert again.up_to_date and (again.changed, again.unlisted) == (0, 1)


def test_a_photo_of_another_folder_takes_no_ones_place(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cameras give the same names in every folder. What has moved must be said to have."""
    first = fill(tmp_path / "100CANON", ["1.png", "2.png", "3.png"])
    second = fill(tmp_path / "101CANON", ["0.png", "0a.png", "3.png", "4.png"], 5)
    archive = tmp_path / "archive"
    run_here(first, archive)
    before = files(archive)
    with pytest.raises(SourceError, match=r"101CANON/3.png: .*'3.png'.*100CANON/3.png: .*--moved"):
        run_here(second, archive)
    monkeypatch.setattr(job, "_WAVE", 1)  # so that it is found when some of it is done already
    with pytest.raises(SourceError, match="CANON"):
        run_here(second, archive, shard_images=1)
    run_here(first, archive)
    assert files(archive) == before

    again = tmp_path / ".." / tmp_path.name / "100CANON"
    os.utime(first / "1.png", (1, 1))
    assert run_here(again, archive).changed == 1

    moved = first.rename(tmp_path / "moved")
    assert run_here(moved, archive).up_to_date
    (moved / "2.png").write_bytes(png(9))
    with pytest.raises(SourceError, match="have moved"):
        run_here(moved, archive)
    summary = run_here(moved, archive, moved=True)
    assert (summary.objects, summary.changed, summary.unlisted) == (3, 1, 0)
    assert vaestream.open(str(archive)).row("2.png").source_url == f"file://{moved}/2.png"
    assert verify(str(archive)) == []


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that cannot be read."""
    names: set[str] = set()
    cat_file = LocalFileSystem.cat_file

    def cat(self: LocalFileSystem, path: str, *args: Any, **options: Any) -> bytes:
        if Path(path).name in names:
            raise PermissionError(13, "Permission denied", path)
        data: bytes = cat_file(self, path, *args, **options)
        return data

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat)
    return names


def test_what_has_changed_and_cannot_be_read_keeps_its_row(
    run_here: Run, tmp_path: Path, closed: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png"])
    archive = tmp_path / "archive"
    run_here(source, archive, shard_images=3)
    before, blob = files(archive), vaestream.open(str(archive)).blob("b.png")
    (source / "b.png").write_bytes(png(99))
    closed.add("b.png")
    summary = run_here(source, archive, shard_images=3)
    assert summary.failed == ["b.png"] and not summary.up_to_date
    assert "b.png: cannot be read: PermissionError" in caplog.text
    assert "the row of its earlier version stays" in caplog.text
    after = files(archive)
    assert {n: d for n, d in after.items() if n != "report.html"} == {
        n: d for n, d in before.items() if n != "report.html"
    }

    (source / "a.png").write_bytes(png(98))
    summary = run_here(source, archive, shard_images=3)
    opened = vaestream.open(str(archive))
    assert (summary.objects, summary.failed) == (3, ["b.png"])
    assert opened.blob("b.png") == blob and opened.row("b.png").error is None
    assert opened.row("a.png").source_sha256 == hashlib.sha256(png(98)).hexdigest()

    closed.clear()
    summary = run_here(source, archive, shard_images=3)
    row = vaestream.open(str(archive)).row("b.png")
    assert row.source_sha256 == hashlib.sha256(png(99)).hexdigest()
    assert summary.failed == [] and verify(str(archive)) == []
    assert run_here(source, archive, shard_images=3).up_to_date


def test_what_could_not_be_read_is_tried_again(
    run_here: Run, tmp_path: Path, closed: set[str]
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png"])
    (source / "dead.png").symlink_to(tmp_path / "gone.png")
    archive = tmp_path / "archive"
    closed.add("b.png")
    first = run_here(source, archive)
    assert first.failed == ["b.png", "dead.png"]
    before = files(archive)
    again = run_here(source, archive)
    assert (again.failed, again.changed, again.unlisted) == (["b.png", "dead.png"], 0, 0)
    after = files(archive)
    assert {n: d for n, d in after.items() if n != "report.html"} == {
        n: d for n, d in before.items() if n != "report.html"
    }
    closed.clear()
    assert run_here(source, archive).failed == ["dead.png"]
    assert vaestream.open(str(archive)).row("b.png").codec == "vae"
    assert run_here(source, archive).up_to_date


def test_what_was_too_large_is_read_where_more_is_allowed(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png"])
    (source / "large.bin").write_bytes(bytes(100_000))
    archive = tmp_path / "archive"
    assert run_here(source, archive, max_object_bytes=50_000).failed == ["large.bin"]
    assert run_here(source, archive, max_object_bytes=50_000).up_to_date
    assert run_here(source, archive, max_object_bytes=100_000).failed == []
    assert vaestream.open(str(archive)).blob("large.bin") == bytes(100_000)


def test_rows_beside_the_sources_are_counted_after_an_interruption(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "source", [f"{letter}.png" for letter in "bcdefg"])
    archive = tmp_path / "archive"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Destination, "commit", _die)
        run_here(source, archive)
    fill(source, ["a.png"], first=9)
    (source / "g.png").unlink()
    summary = run_here(source, archive)
    assert (summary.objects, summary.changed, summary.unlisted) == (7, 0, 1)


def test_a_change_while_a_run_is_interrupted_leaves_one_row_an_object(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png", "d.png"])
    archive = tmp_path / "archive"
    run_here(source, archive)

    def cut_short() -> None:
        """A run that dies before it can commit: its parts lie beside the archive."""
        with monkeypatch.context() as patch:
            patch.setattr(Destination, "commit", _die)
            with pytest.raises(KeyboardInterrupt):
                run_here(source, archive)

    (source / "b.png").write_bytes(png(99))
    fill(source, ["e.png", "f.png"])
    cut_short()
    (source / "b.png").write_bytes(png(98))
    (source / "e.png").write_bytes(png(97))
    cut_short()
    fill(source, ["dd.png"])
    (source / "b.png").write_bytes(png(96))
    summary = run_here(source, archive)
    assert summary.objects == 7
    opened = vaestream.open(str(archive))
    assert sorted(opened) == sorted(path.name for path in source.iterdir())
    for row in opened.rows():
        digest = hashlib.sha256((source / row.key).read_bytes()).hexdigest()
        assert row.source_sha256 == digest, row.key
    assert verify(str(archive)) == []
    assert len(list(archive.glob("part-*.parquet"))) == len(opened.manifest.parts)
    assert run_here(source, archive).up_to_date


def _die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_parts_without_a_word_of_their_settings_are_refused(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png"])
    archive = tmp_path / "archive"
    run_here(source, archive)
    before = files(archive)
    (archive / "manifest.json").unlink()
    with pytest.raises(SettingsMismatchError, match="neither"):
        run_here(source, archive)
    run_here(source, archive, overwrite=True)
    assert files(archive) == before


def test_a_damaged_part_that_was_removed_is_made_again(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png", "d.png"])
    archive = tmp_path / "archive"
    run_here(source, archive)
    before = files(archive)
    next(archive.glob("part-*")).unlink()
    assert not run_here(source, archive).up_to_date
    assert files(archive) == before


def test_what_a_run_killed_at_its_very_end_has_left_is_cleared_away(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png"])
    archive = tmp_path / "archive"
    with monkeypatch.context() as patch:
        patch.setattr(Destination, "clear", lambda self: None)
        run_here(source, archive)
    assert (archive / ".vaestream-job" / "job.json").exists()
    assert run_here(source, archive).up_to_date
    assert not (archive / ".vaestream-job").exists()


def test_a_replacement_that_is_done_but_for_its_clearing_up_replaces_nothing_more(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "archive"
    run_here(fill(tmp_path / "old", ["a.png", "b.png"]), archive)
    with monkeypatch.context() as patch:
        patch.setattr(destination, "remove", lambda *_: None)
        patch.setattr(Destination, "clear", lambda self: None)
        run_here(fill(tmp_path / "new", ["c.png", "d.png"], 2), archive, overwrite=True)
    assert len(list(archive.glob("part-*"))) == 2
    run_here(fill(tmp_path / "more", ["e.png"], 4), archive)
    assert list(vaestream.open(str(archive))) == ["c.png", "d.png", "e.png"]
    assert len(list(archive.glob("part-*"))) == 2
    assert not (archive / ".vaestream-job").exists()
    assert verify(str(archive)) == []


def test_a_replacement_that_was_interrupted_goes_on_if_asked_to_alone(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "archive"
    run_here(fill(tmp_path / "old", ["a.png", "b.png"]), archive)
    new = fill(tmp_path / "new", ["c.png", "d.png"], 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Destination, "commit", interrupt)
        run_here(new, archive, overwrite=True)
    with pytest.raises(SettingsMismatchError, match="replaces what is there"):
        run_here(new, archive)
    assert list(vaestream.open(str(archive))) == ["a.png", "b.png"]
    run_here(new, archive, overwrite=True)
    assert list(vaestream.open(str(archive))) == ["c.png", "d.png"]
    assert len(list(archive.glob("part-*"))) == 1


def interrupt(*_: object, **__: object) -> bool:
    raise KeyboardInterrupt


def test_a_part_that_is_missing_is_not_forgotten(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png", "d.png"])
    archive = tmp_path / "archive"
    run_here(source, archive, shard_images=2)
    manifest = (archive / "manifest.json").read_bytes()
    home = vaestream.open(str(archive)).index.to_pylist()[0]["part"]
    part = (archive / home).read_bytes()
    (archive / home).unlink()
    (source / "a.png").unlink()
    fill(source, ["e.png"])
    with pytest.raises(DamagedArchiveError, match=rf"{home}: .* 1 of the objects .* 'a.png'"):
        run_here(source, archive, shard_images=2)
    assert (archive / "manifest.json").read_bytes() == manifest
    (archive / home).write_bytes(part)
    run_here(source, archive, shard_images=2)
    assert list(vaestream.open(str(archive))) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert verify(str(archive)) == []


def test_a_worker_killed_in_mid_shard_changes_nothing(
    run: Run, run_here: Run, tmp_path: Path, marks: Path
) -> None:
    source = fill(tmp_path / "source", ["a.png", "c.png", "d.png", "e.png"])
    (source / "b.png").write_bytes(png(5, "WAIT HERE"))
    killed: list[int] = []

    def kill() -> None:
        mark = wait_for(lambda: next(marks.glob("waiting-*"), None), seconds=60)
        killed.append(int(mark.name.removeprefix("waiting-")))
        os.kill(killed[0], signal.SIGKILL)
        (marks / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    run(source, tmp_path / "disturbed", workers=1)
    killer.join()
    assert killed
    run_here(source, tmp_path / "peaceful")
    assert files(tmp_path / "disturbed") == files(tmp_path / "peaceful")
    assert len(vaestream.open(str(tmp_path / "disturbed"))) == 5


def test_a_driver_killed_in_mid_job_is_continued(
    run_here: Run, tmp_path: Path, weights: Path, marks: Path
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png", "e.png", "f.png"])
    (source / "d.png").write_bytes(png(6, "WAIT HERE"))
    archive = tmp_path / "disturbed"
    command = [sys.executable, "-m", "vaestream", "compress", str(source), str(archive)]
    options = ["--weights", str(weights), "--min-psnr", "0", "--shard-images", "2"]
    driver = subprocess.Popen([*command, *options, "--workers", "1"], stderr=subprocess.DEVNULL)
    try:
        mark = wait_for(lambda: next(marks.glob("waiting-*"), None), seconds=60)
        committed = {path.name for path in archive.glob("part-*")}
        assert committed
    finally:
        driver.kill()
        driver.wait()
    worker = int(mark.name.removeprefix("waiting-"))
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), seconds=60)
    (marks / "go").touch()
    assert not (archive / "manifest.json").exists()
    with pytest.raises(SettingsMismatchError):
        run_here(source, archive, quality=10)

    run_here(source, archive)
    run_here(source, tmp_path / "peaceful")
    assert committed <= set(files(archive))
    assert files(archive) == files(tmp_path / "peaceful")


def test_a_photo_that_kills_its_worker_ends_as_one_error_row(
    run: Run, tmp_path: Path, marks: Path
) -> None:
    source = fill(tmp_path / "source", ["a.png", "c.png", "d.png", "e.png"])
    poison = png(5, "KILL ME")
    (source / "b.png").write_bytes(poison)
    summary = run(source, tmp_path / "archive", shard_images=3, workers=1)
    archive = vaestream.open(str(tmp_path / "archive"))
    assert summary.failed == ["b.png"]
    assert "SIGKILL" in (archive.row("b.png").error or "")
    assert archive.blob("b.png") == poison
    assert [archive.row(key).codec for key in ("a.png", "c.png", "d.png", "e.png")] == ["vae"] * 4
    # Two workers and twice the process that had it alone: no more.
    assert len((marks / "deaths").read_text().split()) == 4


def test_what_stands_where_a_part_belongs_is_told_and_no_half_archive_is_left(
    run_here: Run, tmp_path: Path
) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png"])
    archive = tmp_path / "archive"
    archive.mkdir()
    # Where the second shard's part belongs stands a folder that holds something.
    run_here(source, tmp_path / "other")
    manifest = read_manifest(LocalFileSystem(), str(tmp_path / "other"))
    (archive / manifest.parts[1].name / "full").mkdir(parents=True)
    with pytest.raises(VaestreamError, match="part-"):
        run_here(source, archive, overwrite=True)
    assert not (archive / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quality": 101}, "quality must lie"),
        ({"min_psnr": float("nan")}, "min PSNR must be"),
        ({"quality": 10, "target_bpp": 1}, "exclude each other"),
        ({"target_psnr": -1}, "positive"),
        ({"shard_images": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    source = fill(tmp_path / "source", ["a.png"])
    with pytest.raises(VaestreamError, match=reason):
        vaestream.compress(source, tmp_path / "archive", **options)
    assert not (tmp_path / "archive").exists()


def test_workers_follow_from_what_the_cluster_has() -> None:
    cpus, gpus = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}

    def planned(*nodes: dict[str, float], shards: int = 100, **options: Any) -> dict[str, int]:
        pools = plan_pools(nodes, shards=shards, **options)
        assert all(pool.num_gpus == 0 for pool in pools if pool.device == "cpu")
        return {pool.device: pool.workers for pool in pools}

    assert planned(cpus) == {"cpu": 4}
    assert planned(cpus, shards=3) == {"cpu": 3}
    assert planned(cpus, workers=2) == {"cpu": 2}
    assert planned(gpus) == {"cuda": 8, "cpu": 8}
    assert planned(gpus, cpus, {"memory": 1.0}) == {"cuda": 8, "cpu": 12}
    assert planned(gpus, cpus, workers=9) == {"cuda": 8, "cpu": 1}
    assert planned(gpus, cpus, shards=5) == planned(gpus, workers=5) == {"cuda": 5}
    assert planned(gpus, cpus, device="cuda") == {"cuda": 8}
    assert planned(gpus, cpus, device="cpu") == {"cpu": 20}
    assert planned(gpus, gpus_per_worker=1.0) == {"cuda": 2, "cpu": 14}
    # A worker on a GPU needs a core of the same node.
    assert planned({"CPU": 2.0, "GPU": 4.0}, cpus) == {"cuda": 2, "cpu": 4}
    assert planned({"GPU": 1.0}, cpus) == {"cpu": 4}
    for nodes, reason in (((cpus,), "no GPU"), (({"GPU": 1.0}, cpus), "and a core")):
        with pytest.raises(VaestreamError, match=reason):
            plan_pools(nodes, shards=1, device="cuda")
    with pytest.raises(VaestreamError, match="at least 1"):
        plan_pools([cpus], shards=1, workers=0)


@pytest.mark.parametrize(("folder", "packed"), [("odd", False), ("odd", True), ("camera", False)])
def test_files_from_the_wild(
    run: Run, tmp_path: Path, shared: Path, folder: str, packed: bool
) -> None:
    source = shared / "photos" / folder
    paths = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
    if packed:
        with tarfile.open(tmp_path / "all.tar", "w") as tar:
            for name, path in paths.items():
                tar.add(path, name)
        summary = run(tmp_path / "all.tar", tmp_path / "archive", shard_images=64, verify="none")
    else:
        summary = run(source, tmp_path / "archive", shard_images=64, verify="none")
    archive = vaestream.open(str(tmp_path / "archive"))
    rows = list(archive.rows())
    assert {row.key for row in rows} == set(paths) and summary.objects == len(rows) == len(paths)
    assert summary.photos + sum(summary.kept.values()) + sum(summary.errors.values()) == len(paths)
    for row in rows:
        original = paths[row.key].read_bytes()
        if row.codec == "source":
            assert archive.blob(row.key) == original, row.key
            assert (row.reason is None) != (row.error is None), row.key
        else:
            with Image.open(io.BytesIO(original)) as image:
                upright = ImageOps.exif_transpose(image)
            assert (row.width, row.height) == upright.size, row.key
            assert archive.payloads([row.key])[0].icc == image.info.get("icc_profile"), row.key


def test_an_error_of_a_worker_is_told_in_its_own_words(run: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png"])
    archive = tmp_path / "archive"
    (archive / ".vaestream-job").mkdir(parents=True)
    (archive / ".vaestream-job" / "attempts").write_text("where a folder must be")
    with pytest.raises(ArchiveError, match=r"attempts/.*Not a directory"):
        run(source, archive)
    assert not (archive / "manifest.json").exists()


def test_of_rays_errors_the_line_is_told_that_says_why() -> None:
    text = """ray::MapWorker(MapBatches(ShardWorker)).submit() (pid=1, ip=192.0.2.2)
  File "worker.py", line 1, in __init__
ModuleNotFoundError: No module named 's3fs'

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, configure `DataContext` (`retried_io_errors` for I/O)."""
    told = str(cause_of(RuntimeError(text)))
    assert told == "the Ray job failed: ModuleNotFoundError: No module named 's3fs'"
    assert str(cause_of(RuntimeError("the node\nis gone"))) == "the Ray job failed: is gone"


def test_names_may_hold_what_fsspec_takes_for_a_chain(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "a::b", ["s3::c.png"])
    run("a::b", "s3::archive")
    assert verify("s3::archive") == []
    assert vaestream.open("s3::archive")["s3::c.png"].size == (96, 72)


def test_a_lost_index_or_model_is_made_again(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png"])
    archive = tmp_path / "archive"
    run_here(source, archive)
    before = files(archive)
    (archive / "index.parquet").unlink()
    assert not run_here(source, archive).up_to_date
    assert files(archive) == before
    next((archive / "models").iterdir()).unlink()
    run_here(source, archive)
    assert files(archive) == before


def test_an_archive_goes_on_with_its_own_model(run_here: Run, tmp_path: Path) -> None:
    """After an update that ships other weights, say."""
    source = fill(tmp_path / "source", ["a.png", "b.png"])
    archive = tmp_path / "archive"
    run_here(source, archive)
    before = vaestream.open(str(archive)).manifest.model_id
    assert run_here(source, archive, weights=None).up_to_date
    fill(source, ["c.png"], 3)
    assert run_here(source, archive, weights=None).objects == 3
    assert vaestream.open(str(archive)).manifest.model_id == before
    shipped = Path(vaestream.__file__).parent / "codec" / "weights" / "vaestream.safetensors"
    with pytest.raises(SettingsMismatchError, match="made with model"):
        run_here(source, archive, weights=shipped)
    run_here(source, archive, weights=None, overwrite=True)
    assert vaestream.open(str(archive)).manifest.model_id != before
    assert verify(str(archive)) == []


def test_two_pools_meet_and_each_part_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = plan_pools([{"CPU": 2.0, "GPU": 1.0}], shards=9, workers=2, gpus_per_worker=1.0)
    assert len(pools) == 2
    orders: dict[str, list[str]] = {}

    def run_pool(shards: Any, spec: Any, pool: Any, most: Any) -> Iterator[Any]:
        orders[pool.device] = list(shards)
        yield from (SimpleNamespace(part=SimpleNamespace(part_id=one)) for one in shards)

    monkeypatch.setattr(cluster, "_run_pool", run_pool)
    shards: Any = list("abcdefghi")
    spec: Any = None
    assert sorted(made.part.part_id for made in run_shards(shards, spec, pools, None)) == shards
    assert orders == {"cuda": shards, "cpu": shards[::-1]}

    def fail(*arguments: Any) -> Iterator[str]:
        raise VaestreamError("no more")

    monkeypatch.setattr(cluster, "_run_pool", fail)
    with pytest.raises(VaestreamError, match="no more"):
        list(run_shards(shards, spec, pools, None))
