"""What an archive's owner trusts on Monday: faults all the time, drivers killed at any moment."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from photos import files, fill, stored
from waiting import parent_of, wait_for

import vaestream
from vaestream.archive.verify import verify
from vaestream.pipeline.job import Summary

if TYPE_CHECKING:
    from s3_server import S3Server

pytestmark = pytest.mark.slow

_SECONDS_BETWEEN_KILLS = 30.0
_DRIVERS = 20


def test_a_store_that_fails_and_workers_that_are_killed_change_nothing(
    s3: "S3Server", local_ray: Path, weights: Path, tmp_path: Path
) -> None:
    import s3fs
    from s3_faults import FaultyProxy, share
    from s3_server import options_for

    source = fill(tmp_path / "photos", [f"{i // 50}/{i:04}.png" for i in range(800)])
    fs = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True, use_listings_cache=False)
    fs.mkdir("endurance")
    fs.put(f"{source}/", "endurance/photos", recursive=True)

    def compress(archive: str, options: dict[str, Any]) -> Summary:
        return vaestream.compress(
            "s3://endurance/photos",
            f"s3://endurance/{archive}",
            weights=weights,
            min_psnr=0.0,
            shard_images=8,
            storage_options=options,
        )

    with (
        FaultyProxy(s3.url, share(7, busy=2, drop=1, cut=1, forget=1, hang=1)) as proxy,
        killing(workers_of(local_ray), every=_SECONDS_BETWEEN_KILLS) as killed,
    ):
        # botocore itself neither waits long nor retries: all that is met reaches the job.
        hasty = options_for(
            proxy.url, connect_timeout=5, read_timeout=5, retries={"max_attempts": 0}
        )
        disturbed = compress("disturbed", hasty)
    print(
        f"{disturbed.seconds:.0f} s, {proxy.calls} calls, faults {dict(proxy.met)}, "
        f"{len(killed)} workers killed"
    )
    assert len(killed) >= 2 and len(proxy.met) == 5
    assert (disturbed.objects, disturbed.failed) == (800, [])
    assert verify("s3://endurance/disturbed", storage_options=s3.options) == []
    archive = vaestream.open("s3://endurance/disturbed", storage_options=s3.options)
    keys = [row.key for row in archive.rows()]
    assert len(keys) == len(set(keys)) == 800

    compress("peaceful", s3.options)
    assert stored(fs, "endurance/disturbed") == stored(fs, "endurance/peaceful")


def test_a_driver_killed_at_any_moment_is_continued(
    local_ray: Path, weights: Path, tmp_path: Path
) -> None:
    source = fill(tmp_path / "photos", [f"{i:03}.png" for i in range(60)])
    options: dict[str, Any] = {"weights": weights, "min_psnr": 0.0, "shard_images": 2}

    def driver(archive: Path) -> subprocess.Popen[bytes]:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "vaestream", "compress", str(source), str(archive)]
        command += ["--weights", str(weights), "--min-psnr", "0", "--shard-images", "2"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, "--address", address], **quiet)

    peaceful = tmp_path / "peaceful"
    undisturbed = driver(peaceful)
    wait_for(lambda: peaceful.exists())
    begin = time.monotonic()
    wait_for(lambda: next(peaceful.glob("part-*"), None))
    started = time.monotonic() - begin
    wait_for(lambda: undisturbed.poll() is not None)
    assert undisturbed.returncode == 0
    lasted = time.monotonic() - begin

    rng = random.Random(7)
    told = []
    for number in range(_DRIVERS):
        archive = tmp_path / f"disturbed-{number}"
        # One time in four before the first part, else while parts are made and it is committed.
        moment = rng.uniform(0, started) if number % 4 == 0 else rng.uniform(started, lasted)
        killed = driver(archive)
        wait_for(lambda a=archive: a.exists())  # type: ignore[misc]
        time.sleep(moment)
        killed.kill()
        killed.wait()
        wait_for(lambda: not list(workers_of(local_ray)()))
        parts, manifest = len(list(archive.glob("part-*"))), (archive / "manifest.json").exists()
        told.append(f"{parts}{'+' if manifest else ''}")
        if manifest:
            assert verify(str(archive)) == []
        vaestream.compress(source, archive, **options)
        assert files(archive) == files(peaceful)
        shutil.rmtree(archive)
    print(f"parts at the kill, + with a manifest: {' '.join(told)}")


@contextmanager
def killing(workers: Callable[[], list[int]], *, every: float) -> Iterator[list[int]]:
    """Within the block a worker is killed from time to time; gives the ids of those that were."""
    killed: list[int] = []
    over = threading.Event()
    rng = random.Random(7)

    def kill() -> None:
        while not over.wait(every):
            if alive := workers():
                killed.append(rng.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


def workers_of(session: Path) -> Callable[[], list[int]]:
    """Tells the process ids of the actors that work on shards in the Ray with that folder."""

    def find() -> list[int]:
        raylets, workers = set(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
                parent = parent_of(int(folder.name))
            except OSError:  # it has just ended
                continue
            if b"raylet" in command.split(b"\0")[0] and os.fsencode(session) in command:
                raylets.add(int(folder.name))
            if command.startswith(b"ray::") and b"ShardWorker" in command:
                workers.append((int(folder.name), parent))
        return [pid for pid, parent in workers if parent in raylets]

    return find
