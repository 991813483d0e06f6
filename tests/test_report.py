"""The page beside the archive: its numbers, that it stands alone, and that nothing can break it."""

import base64
import hashlib
import io
import logging
import shutil
import subprocess
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import commit, row, stand_in
from archive_samples import png as png_of
from fsspec.implementations.local import LocalFileSystem
from photos import fill, pixels, png
from PIL import Image
from without_ray import without_ray

import vaestream
from vaestream import cli
from vaestream.archive.reader import open_archive
from vaestream.archive.schema import Row
from vaestream.archive.verify import verify
from vaestream.pipeline import job, report
from vaestream.pipeline.report import Moment, Run, sources, write_report
from vaestream.pipeline.report.facts import Histogram
from vaestream.pipeline.report.page import render
from vaestream.pipeline.report.tally import gather

__all__ = ["stand_in"]

HOSTILE = '<script>alert(1)</script> & "q" %FF\x1b[31m\u202e.jpg'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """All tags with their attributes, and all text outside styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.styles = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.styles += data
        else:
            self.text += f" {' '.join(data.split())} "

    def pictures(self) -> list[Image.Image]:
        prefix = "data:image/jpeg;base64,"
        sources = [values["src"] for tag, values in self.tags if tag == "img"]
        assert all(source.startswith(prefix) for source in sources)
        return [
            Image.open(io.BytesIO(base64.b64decode(source.removeprefix(prefix))))
            for source in sources
        ]


def stands_alone(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert "url(" not in page.styles and "@import" not in page.styles
    for _, values in page.tags:
        assert not [name for name in values if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert values.get(name, "data:").startswith("data:")
    assert ("html", {"lang": "en"}) in page.tags
    assert any(values.get("name") == "viewport" for _, values in page.tags)
    assert all(values["alt"] for tag, values in page.tags if tag == "img")
    assert all(values["aria-label"] for tag, values in page.tags if tag == "svg")


def photo(folder: Path, key: str, seed: int, psnr: float, *, name: str | None = None) -> Row:
    """A row whose source lies in `folder`."""
    source = folder / (name or f"{seed}.png")
    source.write_bytes(png(seed))
    return row(
        key,
        png_of(pixels(seed)),
        codec="vae",
        width=96,
        height=72,
        channels=3,
        quality=50.0,
        psnr=psnr,
        source_size=source.stat().st_size,
        source_url=str(source),
        source_sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
    )


@pytest.fixture
def archive(stand_in: None, tmp_path: Path) -> Path:
    """Two parts: 15 photos of 30 to 44 dB, one without loss; three kept sources, five errors."""
    folder = tmp_path / "sources"
    folder.mkdir()
    photos = [photo(folder, f"p{i:02}.png", i, 30.0 + i) for i in range(14)]
    photos.append(photo(folder, "same.png", 20, float("inf")))
    photos.append(photo(folder, HOSTILE, 21, 29.5))
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(png(3))
    (folder / "3.png").write_bytes(png(3)[:-1] + b"?")
    rest = [row(f"x{i}", b"kept", reason="<b>no photo</b>") for i in range(3)]
    rest += [row(f"y{i}", b"", error=f"cannot be read: '/a/{i}' at {i}") for i in range(4)]
    rest.append(row("z" + "long" * 200, b"", error="<img src=x onerror=alert(1)>"))
    rows = sorted(photos + rest, key=lambda one: one.key)
    commit(str(tmp_path / "archive"), {"a": rows[::2], "b": rows[1::2]})
    return tmp_path / "archive"


def test_totals_are_the_manifests_and_the_worst_are_the_worst(archive: Path) -> None:
    opened = open_archive(str(archive))
    found = gather(opened)
    assert found.totals == opened.manifest.totals
    assert found.archive_bytes == sum(path.stat().st_size for path in archive.glob("part-*"))
    assert (found.bpp.total, found.psnr.total, found.equal) == (16, 15, 1)
    assert (found.psnr.low, found.psnr.high) == (29.5, 43.0)
    assert [one.key for one in found.worst] == [HOSTILE, *(f"p{i:02}.png" for i in range(11))]
    assert (found.errors[0].text, found.errors[0].count, found.errors[0].keys) == (
        "cannot be read: … at …",
        4,
        ["y0", "y1", "y2", "y3"],
    )
    page = Page(render(found))
    totals = opened.manifest.totals
    for number in (totals.rows, totals.source_bytes, totals.vae_coded_bytes, found.archive_bytes):
        assert f" {number:,} " in page.text


def test_sources_are_shown_only_while_they_are_what_they_were(archive: Path) -> None:
    worst = {one.key: one for one in gather(open_archive(str(archive))).worst}
    assert worst["p00.png"].source is not None and worst["p00.png"].source_note is None
    assert worst["p01.png"].source_note == "source is no longer there"
    assert worst["p02.png"].source_note == "source has changed since"
    assert worst["p03.png"].source_note == "source has changed since"
    for one in worst.values():
        assert one.decoded is not None and (one.source is None) == (one.source_note is not None)


def test_a_store_that_cannot_be_reached_is_asked_once(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def store_of(url: str, options: object) -> Any:
        asked.append(url)
        raise OSError("secret=1")

    monkeypatch.setattr(sources, "store_of", store_of)
    monkeypatch.setattr(sources, "protocol_of", lambda url: "s3")
    found = gather(open_archive(str(archive)))
    assert len(asked) == 1 and "secret" not in render(found)
    assert all("source" in (one.source_note or "") for one in found.worst)


def test_the_page_stands_alone_and_escapes_what_it_shows(archive: Path) -> None:
    moments = [Moment(0.1 * i, i, 2 * i, 0.1 * i) for i in range(1, 2000)]
    page = render(gather(open_archive(str(archive)), run=Run(200.0, moments)))
    parsed = Page(page)
    stands_alone(parsed)
    assert "<script" not in page and "<img src=x" not in page and "<b>no" not in page
    assert "\x1b" not in page and "\u202e" not in page
    assert '<script>alert(1)</script> & "q" %FF\\x1b[31m\\u202e.jpg' in parsed.text
    assert len(page) < 2_000_000
    pictures = parsed.pictures()
    assert len(pictures) == 12 + 9
    assert all(picture.size == (96, 72) for picture in pictures)
    assert "1,999 parts with 3,998 objects in 3:20" in parsed.text


def test_large_photos_are_shown_small_with_their_worst_detail(
    stand_in: None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (900, 1300, 3), dtype=np.uint8)
    decoded = source.copy()
    decoded[600:660, 1000:1060] ^= 255
    data = png_of(source)
    (tmp_path / "s.png").write_bytes(data)
    rows = [
        row(
            f"{i:02}{'k' * 3000}",
            png_of(decoded),
            codec="vae",
            width=1300,
            height=900,
            channels=3,
            quality=1.0,
            psnr=20.0,
            source_size=len(data),
            source_url=str(tmp_path / "s.png"),
            source_sha256=hashlib.sha256(data).hexdigest(),
        )
        for i in range(13)
    ]
    commit(str(tmp_path / "archive"), {"a": rows})
    found = gather(open_archive(str(tmp_path / "archive")))
    assert len(found.worst) == 12
    one = found.worst[0]
    assert one.decoded is not None and (one.decoded.width, one.decoded.height) == (320, 222)
    assert one.source_crop is not None and one.decoded_crop is not None
    crops = [Image.open(io.BytesIO(crop.data)) for crop in (one.source_crop, one.decoded_crop)]
    apart = [np.asarray(crop.convert("L"), np.float32) for crop in crops]
    assert np.abs(apart[0] - apart[1]).mean() > 2
    assert len(render(found)) < 2_000_000  # noise, of which no codec makes less


def test_what_is_compared_is_shown_at_one_quality(stand_in: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (720, 960, 3), dtype=np.uint8)
    flat = np.full_like(noise, 128)  # of which a JPEG of any quality is small
    (tmp_path / "s.png").write_bytes(png_of(noise))
    data = (tmp_path / "s.png").read_bytes()
    one = row(
        "noise",
        png_of(flat),
        codec="vae",
        width=960,
        height=720,
        channels=3,
        quality=1.0,
        psnr=9.0,
        source_size=len(data),
        source_url=str(tmp_path / "s.png"),
        source_sha256=hashlib.sha256(data).hexdigest(),
    )
    commit(str(tmp_path / "archive"), {"a": [one]})
    pictures = Page(render(gather(open_archive(str(tmp_path / "archive"))))).pictures()
    tables = [picture.quantization for picture in pictures]  # type: ignore[attr-defined]
    assert len(tables) == 4 and tables[0] == tables[1] and tables[2] == tables[3]


def test_what_cannot_be_decoded_or_is_not_there_is_told(stand_in: None, tmp_path: Path) -> None:
    commit(str(tmp_path / "empty"), {})
    page = Page(render(gather(open_archive(str(tmp_path / "empty")))))
    stands_alone(page)
    assert "No object has an error." in page.text and not page.pictures()
    commit(str(tmp_path / "archive"), {"a": [photo(tmp_path, "p", 1, 33.0)]})
    next((tmp_path / "archive" / "models").iterdir()).unlink()
    found = gather(open_archive(str(tmp_path / "archive")))
    assert "the model is missing" in (found.worst[0].decoded_note or "")
    assert found.model_bytes is None and "cannot be decoded" in render(found)


def test_a_histogram_keeps_counts_and_tells_quantiles() -> None:
    histogram = Histogram.of(0.05, 2000)
    assert histogram.quantile(0.5) is None
    for start in range(0, 1000, 100):
        histogram.add(30 + np.arange(start, start + 100) / 100)
    histogram.add(np.array([1e9]))
    assert histogram.total == 1001 and (histogram.low, histogram.high) == (30.0, 1e9)
    assert histogram.quantile(0.5) == pytest.approx(35, abs=0.1)
    assert histogram.counts[-1] == 1


def test_the_command_makes_it_again(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in archive.iterdir()}
    assert cli.main(["report", str(archive), "--out", str(tmp_path / "r.html")]) == cli.OK
    assert {path.name for path in archive.iterdir()} == before
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}\n"
    for _ in range(2):
        assert cli.main(["report", str(archive)]) == cli.OK
    assert {path.name for path in archive.iterdir()} == before | {"report.html"}
    assert "Made from the archive alone" in Page((archive / "report.html").read_text()).text
    assert cli.main(["report", str(tmp_path / "nowhere")]) == cli.ERROR
    assert verify(str(archive)) == []


def test_a_store_that_lets_nothing_be_removed_is_named(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(fs: LocalFileSystem, path: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(LocalFileSystem, "rm_file", refuse)
    assert cli.main(["report", str(archive)]) == cli.ERROR
    assert "report.html: cannot be removed: NotImplementedError" in capsys.readouterr().err


def test_a_report_that_fails_leaves_no_old_one(
    archive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (archive / "report.html").write_text("of another archive")
    monkeypatch.setattr(report, "gather", lambda *args, **kwargs: 1 / 0)
    with caplog.at_level(logging.WARNING):
        job._report(str(archive), Run(1.0, []), None)
    assert "report.html was not written: ZeroDivisionError" in caplog.text
    assert not (archive / "report.html").exists()


@without_ray()
def test_the_job_writes_it_once(weights: Path, tmp_path: Path) -> None:
    source = fill(tmp_path / "photos", ["a.png", "b.png"])
    (source / "<i>cut.png").write_bytes(png(9)[:2000])
    archive = tmp_path / "archive"
    options: dict[str, Any] = {"weights": weights, "min_psnr": 0.0, "shard_images": 2}
    summary = vaestream.compress(source, archive, **options)
    written = (archive / "report.html").read_text()
    page = Page(written)
    stands_alone(page)
    assert f" {summary.source_bytes:,} " in page.text and "2 parts with 3 objects" in page.text
    assert "<i>cut.png" in page.text and len(page.pictures()) == 4
    again = vaestream.compress(source, archive, **options)
    assert again.up_to_date and (archive / "report.html").read_text() == written
    (archive / "report.html").unlink()  # as if killed just before
    assert vaestream.compress(source, archive, **options).up_to_date
    assert "Made from the archive alone" in Page((archive / "report.html").read_text()).text
    vaestream.compress(source, archive, quality=20, overwrite=True, **options)
    assert (archive / "report.html").read_text() != written
    assert verify(str(archive)) == []


@pytest.mark.parametrize("name", ["p.tar", "p.tar.gz", "p.zip", "p.parquet"])
@without_ray()
def test_members_of_containers_are_shown_beside_their_photos(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files = {f"sub/{seed}#::x.png": png(seed) for seed in (1, 2)}
    container = tmp_path / name
    if name.endswith(".parquet"):
        images = [{"bytes": data, "path": key} for key, data in files.items()]
        pq.write_table(pa.table({"image": images}), container)
    elif name.endswith(".zip"):
        with zipfile.ZipFile(container, "w") as archive:
            for key, data in files.items():
                archive.writestr(key, data)
    else:
        with tarfile.open(container, "w:gz" if name.endswith("gz") else "w") as tar:
            for key, data in files.items():
                info = tarfile.TarInfo(key)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    out = tmp_path / "archive"
    vaestream.compress(container, out, weights=weights, min_psnr=0.0)
    worst = gather(open_archive(str(out))).worst
    assert sorted(one.key for one in worst) == sorted(files)
    assert all(one.source is not None and one.source_note is None for one in worst)
    monkeypatch.setattr(sources, "_SEARCH_SECONDS", 0.0)
    notes = [one.source_note for one in gather(open_archive(str(out))).worst]
    assert "source not read: to find it in what holds it takes too long" in notes
    container.unlink()
    assert {one.source_note for one in gather(open_archive(str(out))).worst} == {
        "source is no longer there"
    }


def test_a_browser_shows_it(archive: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    out = tmp_path / "r.html"
    write_report(open_archive(str(archive)), out=out)
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,2000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    done = subprocess.run([browser, *options, out.as_uri()], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        # Something is drawn all the way down.
        assert image.size == (390, 2000)
        assert len(image.crop((0, 1500, 390, 2000)).convert("RGB").getcolors(1 << 20) or []) > 10
