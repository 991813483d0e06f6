"""The job from S3 to S3, on a real server: alike in peace, under faults, and after a failure."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs
from photos import png
from s3_faults import Fault, FaultyProxy, after, share
from s3_server import KEY, SECRET, S3Server, options_for

import vaestream
from vaestream.archive.verify import verify
from vaestream.cli import main
from vaestream.errors import ArchiveError, SourceError, VaestreamError
from vaestream.pipeline.job import Summary

OBJECTS = {
    **{f"2019/{name}.png": png(seed) for seed, name in enumerate("abcdefg")},
    "notes.txt": b"not a photo",
    "empty": b"",
    "cut.png": png(9)[:2000],
}

Run = Callable[..., Summary]


@pytest.fixture
def fs(s3: S3Server) -> s3fs.S3FileSystem:
    """The store, seen without any listing of before."""
    return s3fs.S3FileSystem(**s3.options, skip_instance_cache=True, use_listings_cache=False)


@pytest.fixture
def bucket(fs: s3fs.S3FileSystem) -> str:
    """A bucket with the objects in photos/."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    fs.mkdir(name)
    for key, data in OBJECTS.items():
        fs.pipe_file(f"{name}/photos/{key}", data)
    return name


@pytest.fixture
def run(local_ray: Path, weights: Path, s3: S3Server, bucket: str) -> Run:
    """Compress photos/ of the bucket to a prefix in it, with the small model, in shards of two."""

    def compress(prefix: str, **options: Any) -> Summary:
        defaults: dict[str, Any] = {
            "min_psnr": 0.0,
            "shard_images": 2,
            "weights": weights,
            "storage_options": s3.options,
        }
        source, destination = f"s3://{bucket}/photos", f"s3://{bucket}/{prefix}"
        return vaestream.compress(source, destination, **{**defaults, **options})

    return compress


def files(fs: s3fs.S3FileSystem, root: str) -> dict[str, bytes]:
    """Every object below `root`, the manifest included."""
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def hasty(proxy: FaultyProxy) -> dict[str, Any]:
    """Options for s3fs to go through the proxy: botocore itself neither waits long nor retries."""
    return options_for(proxy.url, connect_timeout=2, read_timeout=2, retries={"max_attempts": 0})


def test_photos_go_from_bucket_to_bucket(
    run: Run, fs: s3fs.S3FileSystem, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    summary = run("one")
    assert (summary.objects, summary.photos) == (len(OBJECTS), 7)
    assert summary.failed == ["cut.png"]
    url = f"s3://{bucket}/one"
    assert verify(url, storage_options=s3.options) == []
    archive = vaestream.open(url, storage_options=s3.options)
    assert list(archive) == sorted(OBJECTS)
    assert [array.shape for array in archive.read(["2019/a.png", "2019/g.png"])] == [
        (72, 96, 3)
    ] * 2
    assert archive["2019/b.png"].size == (96, 72)
    for key in ("notes.txt", "empty", "cut.png"):
        assert archive.blob(key) == OBJECTS[key]
    etags = {row.key: row.source_etag for row in archive.rows()}
    assert etags["notes.txt"] == fs.info(f"{bucket}/photos/notes.txt")["ETag"]
    assert not fs.exists(f"{bucket}/one/.vaestream-job")

    # The same again elsewhere: the same bytes.
    run("two")
    assert files(fs, f"{bucket}/two") == files(fs, f"{bucket}/one")


def test_a_finished_job_writes_nothing_and_new_objects_make_new_parts(
    run: Run, fs: s3fs.S3FileSystem, s3: S3Server, bucket: str
) -> None:
    with FaultyProxy(s3.url) as proxy:
        writes: list[str] = []

        def watch(method: str, path: str) -> None:
            if method in ("PUT", "POST", "DELETE"):
                writes.append(path)

        options = {"storage_options": options_for(proxy.url)}
        run("archive", **options)
        before = files(fs, f"{bucket}/archive")
        proxy.rule = watch
        assert run("archive", **options).up_to_date
        assert writes == []
    fs.pipe_file(f"{bucket}/photos/new.png", png(20))
    assert run("archive").objects == len(OBJECTS) + 1
    after = files(fs, f"{bucket}/archive")
    assert {name: data for name, data in before.items() if "part-" in name}.items() <= after.items()


def test_the_command_line_reads_its_credentials_from_the_environment(
    fs: s3fs.S3FileSystem, s3: S3Server, bucket: str, weights: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3.url,
    }
    archive = f"s3://{bucket}/archive"
    told = ""

    def command(*arguments: str) -> None:
        nonlocal told
        line = [sys.executable, "-m", "vaestream", *arguments]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        told += done.stdout + done.stderr
        assert done.returncode in (0, 3), done.stderr

    options = ["--weights", str(weights), "--min-psnr", "0"]
    command("compress", f"s3://{bucket}/photos", archive, *options)
    command("ls", archive)
    command("info", archive)
    command("verify", archive)
    command("extract", archive, str(tmp_path / "out"), "notes.txt", "2019/c.png")
    assert (tmp_path / "out" / "notes.txt").read_bytes() == OBJECTS["notes.txt"]
    assert (tmp_path / "out" / "2019").is_dir()
    assert SECRET not in told
    assert not any(SECRET.encode() in data for data in files(fs, f"{bucket}/archive").values())


@pytest.mark.parametrize("wrong", ["secret", "key", "source", "destination"])
def test_what_is_wrong_is_told_with_its_url_and_without_a_secret(
    s3: S3Server,
    bucket: str,
    weights: Path,
    wrong: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = dict(s3.options)
    secrets = [SECRET, "n0t-the-secret"]
    if wrong in ("secret", "key"):
        options[wrong] = secrets[1]
    source, destination = f"s3://{bucket}/photos", f"s3://{bucket}/archive"
    if wrong == "source":
        source = "s3://no-such-bucket/photos"
    if wrong == "destination":
        destination = "s3://no-such-bucket/archive"
    named = {"source": source, "destination": destination}.get(wrong, f"s3://{bucket}/")
    with pytest.raises(VaestreamError) as raised:
        vaestream.compress(source, destination, weights=weights, storage_options=options)
    arguments = ["--weights", str(weights), "--storage-options", json.dumps(options)]
    assert main(["compress", source, destination, *arguments]) == 1
    told = "".join(capfd.readouterr())
    for text in (str(raised.value), told):
        assert named in text
        assert not any(secret in text for secret in secrets)


def test_an_archive_made_under_faults_is_the_one_made_in_peace(
    run: Run, fs: s3fs.S3FileSystem, s3: S3Server, bucket: str
) -> None:
    run("peaceful")
    # Of a hundred calls five fail and one gives no answer.
    rule = share(7, busy=2, drop=1, cut=1, forget=1, hang=1)
    with FaultyProxy(s3.url, rule) as proxy:
        for prefix in ("disturbed", "again"):
            run(prefix, storage_options=hasty(proxy))
            assert files(fs, f"{bucket}/{prefix}") == files(fs, f"{bucket}/peaceful")
        url = f"s3://{bucket}/disturbed"
        archive = vaestream.open(url, storage_options=hasty(proxy))
        keys = [f"2019/{name}.png" for name in "abcdefg"]
        assert len(archive.read(keys)) == 7
        assert verify(url, storage_options=hasty(proxy)) == []
    assert proxy.calls > 100
    assert set(proxy.met) == {"busy", "drop", "cut", "forget", "hang"}


@pytest.mark.parametrize("fault", ["full", "refuse"])
def test_a_destination_that_takes_no_more_stops_the_job_and_a_later_one_goes_on(
    run: Run,
    fs: s3fs.S3FileSystem,
    s3: S3Server,
    bucket: str,
    local_ray: Path,
    fault: Fault,
) -> None:
    run("peaceful")
    peaceful = files(fs, f"{bucket}/peaceful")
    with FaultyProxy(s3.url, after(2, fault, "PUT", "/part-")) as proxy:
        options = {"storage_options": hasty(proxy), "workers": 1}
        with pytest.raises(
            ArchiveError, match=rf"s3://{bucket}/archive/part-\S*: .*written: .*told"
        ):
            run("archive", **options)
        left = files(fs, f"{bucket}/archive")
        parts = {name: data for name, data in left.items() if name.startswith("part-")}
        assert len(parts) == 2 and parts.items() <= peaceful.items()
        assert "manifest.json" not in left and ".vaestream-job/job.json" in left
        assert not any(SECRET.encode() in data for data in left.values())

        again: list[str] = []
        proxy.rule = lambda method, path: again.append(path) if method == "PUT" else None
        run("archive", **options)
        assert not any(name in path for name in parts for path in again)
    assert files(fs, f"{bucket}/archive") == peaceful
    # Nor does Ray write down what workers are given.
    logs = [path for path in (local_ray / "ray").rglob("*") if path.is_file()]
    assert logs and not [path for path in logs if SECRET.encode() in path.read_bytes()]


def test_a_source_that_gives_no_more_stops_the_job_and_a_later_one_goes_on(
    run: Run, fs: s3fs.S3FileSystem, s3: S3Server, bucket: str
) -> None:
    run("peaceful")
    with FaultyProxy(s3.url, after(5, "refuse", "GET", "/photos/")) as proxy:
        options = {"storage_options": hasty(proxy)}
        with pytest.raises(SourceError, match=rf"s3://{bucket}/photos/\S+: .*Permission.*nor can"):
            run("archive", **options)
        assert "manifest.json" not in files(fs, f"{bucket}/archive")
        proxy.rule = None
        run("archive", **options)
    assert files(fs, f"{bucket}/archive") == files(fs, f"{bucket}/peaceful")
