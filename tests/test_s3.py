"""The job from S3 to S3, on a real server: alike in peace, under faults, and after a failure."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs
from archive_samples import byte_rows, commit
from photos import png, stored
from s3_faults import Fault, FaultyProxy, after, share
from s3_server import KEY, SECRET, S3Server, options_for
from without_ray import without_ray

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


@pytest.fixture(scope="module")
def fs(s3: S3Server) -> s3fs.S3FileSystem:
    """The store, seen without any listing of before."""
    return s3fs.S3FileSystem(**s3.options, skip_instance_cache=True, use_listings_cache=False)


@pytest.fixture(scope="module")
def bucket(fs: s3fs.S3FileSystem) -> str:
    """A bucket with the objects in photos/."""
    name = "test-photos"
    fs.mkdir(name)
    for key, data in OBJECTS.items():
        fs.pipe_file(f"{name}/photos/{key}", data)
    return name


@pytest.fixture(scope="module")
def small(weights: Path, s3: S3Server, bucket: str) -> Run:
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


@pytest.fixture(scope="module")
def run(local_ray: Path, small: Run) -> Run:
    """`small` on the tests' Ray."""
    return small


@pytest.fixture(scope="module")
def run_here(small: Run) -> Run:
    """`small` in this process."""
    return without_ray()(small)


@pytest.fixture(scope="module")
def peaceful(run_here: Run, fs: s3fs.S3FileSystem, bucket: str) -> dict[str, bytes]:
    """The files of the archive peaceful/, made while nothing failed."""
    summary = run_here("peaceful")
    assert (summary.objects, summary.photos) == (len(OBJECTS), 7)
    assert summary.failed == ["cut.png"]
    return stored(fs, f"{bucket}/peaceful")


def hasty(proxy: FaultyProxy) -> dict[str, Any]:
    """Options for s3fs to go through the proxy: botocore itself neither waits long nor retries."""
    return options_for(proxy.url, connect_timeout=2, read_timeout=2, retries={"max_attempts": 0})


def test_every_object_has_its_row(
    peaceful: dict[str, bytes], fs: s3fs.S3FileSystem, s3: S3Server, bucket: str
) -> None:
    url = f"s3://{bucket}/peaceful"
    assert verify(url, storage_options=s3.options) == []
    archive = vaestream.open(url, storage_options=s3.options)
    assert list(archive) == sorted(OBJECTS)
    arrays = archive.read(["2019/a.png", "2019/g.png"])
    assert [array.shape for array in arrays] == [(72, 96, 3)] * 2
    assert archive["2019/b.png"].size == (96, 72)
    for key in ("notes.txt", "empty", "cut.png"):
        assert archive.blob(key) == OBJECTS[key]
    for row in archive.rows():
        path = f"{bucket}/photos/{row.key}"
        assert (row.source_url, row.source_etag) == (f"s3://{path}", fs.info(path)["ETag"])
    assert not any(name.startswith(".vaestream-job") for name in peaceful)


def test_a_photo_is_one_request_for_its_bytes_alone(s3: S3Server, bucket: str) -> None:
    rows = list(byte_rows(100, size=40_000))
    url = f"s3://{bucket}/hundred"
    commit(url, {"a": rows}, storage_options=s3.options)
    with FaultyProxy(s3.url) as proxy:
        archive = vaestream.open(url, storage_options=options_for(proxy.url))
        for wanted in (rows[0], rows[51], rows[99]):
            proxy.sent.clear()
            assert archive.blob(wanted.key) == wanted.data
            assert proxy.sent == [len(wanted.data)]
        neighbours, apart = rows[20:52], rows[::25]
        for some in (neighbours, apart):
            proxy.sent.clear()
            assert archive.blobs([row.key for row in some]) == [row.data for row in some]
            asked = sum(len(row.data) for row in some)
            assert asked <= sum(proxy.sent) <= 1.02 * asked
            assert len(proxy.sent) == (1 if some is neighbours else len(some))


@pytest.mark.usefixtures("peaceful")
def test_a_decoded_photo_is_one_request_too(s3: S3Server, bucket: str) -> None:
    with FaultyProxy(s3.url) as proxy:
        url = f"s3://{bucket}/peaceful"
        archive = vaestream.open(url, storage_options=options_for(proxy.url))
        assert archive.codec  # the model, once for all photos
        for name in ("2019/a.png", "2019/f.png"):
            blob = archive.blob(name)
            proxy.sent.clear()
            assert archive.read([name])[0].shape == (72, 96, 3)
            assert archive[name].size == (96, 72)
            assert proxy.sent == [len(blob)] * 2


def test_the_same_sources_give_the_same_bytes_elsewhere(
    run: Run, peaceful: dict[str, bytes], fs: s3fs.S3FileSystem, bucket: str
) -> None:
    run("elsewhere")
    assert stored(fs, f"{bucket}/elsewhere") == peaceful


@pytest.mark.usefixtures("peaceful")
def test_a_finished_job_writes_nothing(small: Run, s3: S3Server) -> None:
    writes: list[str] = []

    def watch(method: str, path: str) -> None:
        if method in ("PUT", "POST", "DELETE"):
            writes.append(path)

    with FaultyProxy(s3.url, watch) as proxy:
        assert small("peaceful", storage_options=options_for(proxy.url)).up_to_date
    assert proxy.calls and not writes


def test_the_command_line_takes_its_credentials_from_the_environment(
    fs: s3fs.S3FileSystem,
    s3: S3Server,
    bucket: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    archive = f"s3://{bucket}/archive-of-cli"
    # A process of its own, as it starts a Ray of its own, whose workers have the environment too.
    command = [sys.executable, "-m", "vaestream", "compress", f"s3://{bucket}/photos", archive]
    options = ["--weights", str(weights), "--min-psnr", "0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert main(["ls", archive]) == main(["info", archive]) == main(["verify", archive]) == 0
    assert main(["extract", archive, str(tmp_path / "out"), "notes.txt", "2019/c.png"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_bytes() == OBJECTS["notes.txt"]
    assert len(list((tmp_path / "out" / "2019").iterdir())) == 1
    told = done.stdout + done.stderr + "".join(capfd.readouterr())
    assert "notes.txt" in told and SECRET not in told
    made = stored(fs, f"{bucket}/archive-of-cli")
    assert made and not any(SECRET.encode() in data for data in made.values())


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
    run: Run,
    run_here: Run,
    peaceful: dict[str, bytes],
    fs: s3fs.S3FileSystem,
    s3: S3Server,
    bucket: str,
) -> None:
    # Of a hundred calls five fail and one gives no answer.
    rule = share(7, busy=2, drop=1, cut=1, forget=1, hang=1)
    with FaultyProxy(s3.url, rule) as proxy:
        for job, prefix in ((run, "disturbed"), (run_here, "again")):
            job(prefix, storage_options=hasty(proxy))
            assert stored(fs, f"{bucket}/{prefix}") == peaceful
        url = f"s3://{bucket}/disturbed"
        archive = vaestream.open(url, storage_options=hasty(proxy))
        keys = [f"2019/{name}.png" for name in "abcdefg"]
        assert len(archive.read(keys)) == 7
        assert verify(url, storage_options=hasty(proxy)) == []
    assert proxy.calls > 100
    assert set(proxy.met) == {"busy", "drop", "cut", "forget", "hang"}


@pytest.mark.parametrize(
    ("fault", "reason"), [("full", "XMinioStorageFull"), ("refuse", "AccessDenied")]
)
def test_a_destination_that_takes_no_more_stops_the_job_and_a_later_one_goes_on(
    run: Run,
    run_here: Run,
    peaceful: dict[str, bytes],
    fs: s3fs.S3FileSystem,
    s3: S3Server,
    bucket: str,
    local_ray: Path,
    fault: Fault,
    reason: str,
) -> None:
    with FaultyProxy(s3.url, after(2, fault, "PUT", "/part-")) as proxy:
        options = {"storage_options": hasty(proxy), "workers": 1}
        with pytest.raises(
            ArchiveError, match=rf"s3://{bucket}/{fault}/part-\S*: .*written: .*{reason}"
        ):
            run(fault, **options)
        left = stored(fs, f"{bucket}/{fault}")
        parts = {name: data for name, data in left.items() if name.startswith("part-")}
        assert len(parts) == 2 and parts.items() <= peaceful.items()
        assert "manifest.json" not in left and ".vaestream-job/job.json" in left
        assert not any(SECRET.encode() in data for data in left.values())

        again: list[str] = []
        proxy.rule = lambda method, path: again.append(path) if method == "PUT" else None
        run_here(fault, **options)
        assert not any(name in path for name in parts for path in again)
    assert stored(fs, f"{bucket}/{fault}") == peaceful
    # Nor does Ray write down what workers are given.
    logs = [path for path in (local_ray / "ray").rglob("*") if path.is_file()]
    assert logs and not [path for path in logs if SECRET.encode() in path.read_bytes()]


def test_a_source_that_gives_no_more_stops_the_job_and_a_later_one_goes_on(
    run: Run,
    run_here: Run,
    peaceful: dict[str, bytes],
    fs: s3fs.S3FileSystem,
    s3: S3Server,
    bucket: str,
) -> None:
    with FaultyProxy(s3.url, after(5, "refuse", "GET", "/photos/")) as proxy:
        options = {"storage_options": hasty(proxy), "workers": 1}
        with pytest.raises(SourceError, match=rf"s3://{bucket}/photos/\S+: .*Permission.*nor can"):
            run("forbidden", **options)
        assert "manifest.json" not in stored(fs, f"{bucket}/forbidden")
        proxy.rule = None
        run_here("forbidden", **options)
    assert stored(fs, f"{bucket}/forbidden") == peaceful
