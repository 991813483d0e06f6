"""Two jobs on one destination at a time: one whole archive comes of it."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from photos import files, fill, png
from without_ray import without_ray

import vaestream
from vaestream.archive.verify import verify
from vaestream.errors import SettingsMismatchError
from vaestream.pipeline.job import Progress, Summary
from vaestream.pipeline.lease import FRESH_SECONDS, Lease

Run = Callable[..., Summary]


@pytest.fixture
def small(weights: Path) -> Run:
    """A job with the small model, one worker and shards of two."""

    def compress(source: Path, archive: Path, **options: Any) -> Summary:
        defaults: dict[str, Any] = {"min_psnr": 0.0, "shard_images": 2, "weights": weights}
        return vaestream.compress(source, archive, **{**defaults, "workers": 1, **options})

    return compress


@pytest.fixture
def run(local_ray: Path, small: Run) -> Run:
    """`small` on the tests' Ray."""
    return small


@pytest.fixture
def run_here(small: Run) -> Run:
    """`small` in this process."""
    return without_ray()(small)


def once(act: Callable[[], Any]) -> Callable[[Progress], None]:
    """Does something in mid job: when its first shard has ended, and never again."""
    left = [act]

    def progress(now: Progress) -> None:
        if left and now.done_shards == 1:
            left.pop()()

    return progress


def test_a_second_job_warns_and_both_make_one_archive(
    run: Run, run_here: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = fill(tmp_path / "source", [f"{i}.png" for i in range(6)])
    archive = tmp_path / "archive"
    inner: list[Summary] = []
    with caplog.at_level(logging.WARNING, "vaestream"):
        outer = run(source, archive, progress=once(lambda: inner.append(run(source, archive))))
    (record,) = caplog.records
    assert f"process {os.getpid()} on {socket.gethostname()}" in record.getMessage()
    assert outer.objects == inner[0].objects == 6
    assert verify(str(archive)) == []
    run_here(source, tmp_path / "peaceful")
    assert files(archive) == files(tmp_path / "peaceful")
    assert not (archive / ".vaestream-job").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_job_that_finds_more_photos_loses_none(
    run: Run, run_here: Run, tmp_path: Path, overwrite: bool
) -> None:
    source = fill(tmp_path / "source", ["b.png", "d.png", "f.png", "h.png", "j.png"])
    archive = tmp_path / "archive"

    def second() -> None:
        fill(source, ["a.png", "e.png"], first=20)
        run_here(source, archive)

    run(source, archive, overwrite=overwrite, progress=once(second))
    assert verify(str(archive)) == []
    assert len(vaestream.open(str(archive))) == 7
    # What the two had cut differently is there once, for those too that read the bare parts.
    manifest = json.loads((archive / "manifest.json").read_text())
    assert {part["name"] for part in manifest["parts"]} == {p.name for p in archive.glob("part-*")}
    assert run_here(source, archive).objects == 7
    assert len(vaestream.open(str(archive))) == 7


def test_a_second_job_with_other_settings_is_refused(run_here: Run, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", ["a.png", "b.png", "c.png"])

    def second() -> None:
        with pytest.raises(SettingsMismatchError):
            run_here(source, tmp_path / "archive", quality=20)

    assert run_here(source, tmp_path / "archive", progress=once(second)).objects == 3
    assert verify(str(tmp_path / "archive")) == []


class Stopped(Exception):
    """What ends a job in its midst."""


def interrupted(run: Run, source: Path, archive: Path, **options: Any) -> None:
    """A job that ends after its first shard."""

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(source, archive, progress=once(stop), **options)


def test_two_interrupted_jobs_over_different_listings_end_as_one_archive(
    run_here: Run, tmp_path: Path
) -> None:
    source, archive = tmp_path / "source", tmp_path / "archive"
    fill(source, ["b.png", "d.png", "f.png", "h.png"])
    interrupted(run_here, source, tmp_path / "first")
    fill(source, ["a.png"], first=20)
    interrupted(run_here, source, archive)
    for part in (tmp_path / "first").glob("part-*"):  # as if both had been at work there
        part.rename(archive / part.name)
    assert run_here(source, archive).objects == 5
    assert verify(str(archive)) == []
    assert vaestream.open(str(archive)).keys() == [f"{name}.png" for name in "abdfh"]


def test_an_interrupted_replacement_mixes_with_nothing(run_here: Run, tmp_path: Path) -> None:
    source, archive = tmp_path / "source", tmp_path / "archive"
    fill(source, ["a.png", "b.png", "c.png", "d.png"])
    interrupted(run_here, source, archive, quality=50)
    interrupted(run_here, source, archive, quality=80, overwrite=True)
    with pytest.raises(SettingsMismatchError, match="overwrite, to go on"):
        run_here(source, archive, quality=80)
    run_here(source, archive, quality=80, overwrite=True)
    assert verify(str(archive)) == []
    assert {row.quality for row in vaestream.open(str(archive)).rows()} <= {80.0, None}
    # Where nothing was replaced, it makes no difference.
    fresh = tmp_path / "fresh"
    interrupted(run_here, source, fresh, quality=80, overwrite=True)
    run_here(source, fresh, quality=80)
    assert files(fresh) == files(archive)


def test_two_drivers_at_the_same_time(local_ray: Path, weights: Path, tmp_path: Path) -> None:
    import ray

    source = fill(tmp_path / "source", [f"{i}.png" for i in range(5)])
    (source / "0.png").write_bytes(png(0, "WAIT HERE"))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "vaestream", "compress", str(source), str(tmp_path / "out")]
    small = ["--weights", str(weights), "--min-psnr", "0", "--shard-images", "1", "--workers", "1"]
    drivers: list[subprocess.Popen[str]] = []
    try:
        for count in (1, 2):
            drivers.append(
                subprocess.Popen(
                    [*command, *small, "--address", address], stderr=subprocess.PIPE, text=True
                )
            )
            end = time.monotonic() + 300  # a busy machine takes long to start a job
            while len(list(local_ray.glob("waiting-*"))) < count:
                assert time.monotonic() < end and drivers[-1].poll() is None
                time.sleep(0.05)
        (local_ray / "go").touch()
        told = [driver.communicate(timeout=300)[1] for driver in drivers]
    finally:
        (local_ray / "go").touch()
        for driver in drivers:
            driver.kill()
            driver.wait()
        for mark in [*local_ray.glob("waiting-*"), local_ray / "go"]:
            mark.unlink()
    assert [driver.returncode for driver in drivers] == [0, 0], told
    warnings = [[line for line in one.splitlines() if "warning" in line] for one in told]
    assert warnings[0] == [] and len(warnings[1]) == 1
    assert warnings[1][0].startswith("vaestream: warning: another job is at work on ")
    assert verify(str(tmp_path / "out")) == []
    assert len(vaestream.open(str(tmp_path / "out"))) == 5
    assert not (tmp_path / "out" / ".vaestream-job").exists()


def test_a_note_counts_while_its_driver_lives(tmp_path: Path) -> None:
    fs, root = LocalFileSystem(), str(tmp_path)
    notes = tmp_path / ".vaestream-job" / "drivers"
    with Lease(fs, root, "one") as one, Lease(fs, root, "two") as two:
        assert [driver.pid for driver in one.others()] == [os.getpid()]
        assert not two.others()[0].commits
        with one.turn():
            assert two.others()[0].commits
        note = json.loads((notes / "two").read_text())
        with subprocess.Popen(["true"]) as gone:
            pass
        changes: list[tuple[dict[str, Any], int]] = [
            ({"host": "elsewhere"}, 1),
            ({"host": "elsewhere", "time": time.time() - 2 * FRESH_SECONDS}, 0),
            ({"pid": gone.pid}, 0),
            ({"pid": "none"}, 0),
        ]
        for changed, count in changes:
            (notes / "two").write_text(json.dumps({**note, **changed}))
            assert len(one.others()) == count, changed
        (notes / "two").write_text("[]")
        assert one.others() == []
    assert not list(notes.iterdir())


def test_commits_take_turns(tmp_path: Path) -> None:
    fs, root = LocalFileSystem(), str(tmp_path)
    inside: list[str] = []

    def commit(name: str) -> None:
        with Lease(fs, root, name) as lease:
            for _ in range(5):
                with lease.turn():
                    inside.append(name)
                    time.sleep(0.01)
                    assert inside.pop() == name and not inside

    failed: list[BaseException] = []

    def noted(name: str) -> None:
        try:
            commit(name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=noted, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
