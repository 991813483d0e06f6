"""Each example runs as its first line says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY
from photos import fill, png
from PIL import Image
from without_ray import without_ray

import vaestream

EXAMPLES = REPOSITORY / "examples"


def run(name: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archive(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    source = fill(folder / "photos", ["a.png", "b.png", "c.png"])
    (source / "notes.txt").write_bytes(b"no photo")
    (source / "cut.png").write_bytes(png(9)[:2000])
    with without_ray():
        vaestream.compress(source, folder / "archive", weights=weights, min_psnr=0.0)
    return folder / "archive"


def test_read_archive(archive: Path) -> None:
    told = run("read_archive.py", archive)
    assert "5 objects, 3 of them photos" in told and "a.png (72, 96, 3)" in told


def test_torch_dataloader(archive: Path) -> None:
    told = run("torch_dataloader.py", archive).splitlines()
    assert [line.split(")")[0] for line in told] == [
        "(2, 3, 224, 224",
        "going on in epoch 0 after 2 photos",
        "(1, 3, 224, 224",
    ]


@pytest.mark.parametrize(
    ("name", "package"), [("sql_duckdb.py", "duckdb"), ("table_polars.py", "polars")]
)
def test_the_archive_answers_as_a_table(archive: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    told = run(name, archive)
    rows = [row.codec for row in vaestream.open(str(archive)).rows()]
    coded = sum(row.num_bytes for row in vaestream.open(str(archive)).rows() if row.codec == "vae")
    assert (rows.count("vae"), rows.count("source")) == (3, 2)
    assert str(coded) in told and "cut.png" in told
    assert told.index("lowest PSNR") < told.index("a.png")


def test_compress_folder(local_ray: Path, tmp_path: Path) -> None:
    import ray

    source = fill(tmp_path / "photos", ["a.png"])
    address = ray.get_runtime_context().gcs_address
    told = run("compress_folder.py", source, tmp_path / "archive", RAY_ADDRESS=address)
    assert "of 1 compressed" in told
    assert list(vaestream.open(str(tmp_path / "archive"))) == ["a.png"]


def test_small_copies_through_ray_data(archive: Path, tmp_path: Path) -> None:
    told = run("ray_data.py", archive, tmp_path / "small")
    assert "3 photos" in told
    assert list(vaestream.open(str(tmp_path / "small"))) == ["a.png", "b.png", "c.png"]


def test_hugging_face_dataset(archive: Path) -> None:
    pytest.importorskip("datasets")
    told = run("huggingface_dataset.py", archive, HF_HUB_OFFLINE="1")
    assert [line.split()[0] for line in told.splitlines()] == ["a.png", "b.png", "c.png"]


def test_pillow_plugin(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    out = tmp_path / "a.vst"
    assert "(96, 72) 60.0" in run("pillow_plugin.py", tmp_path / "a.png", out)
    with Image.open(f"{out}.thumbnail.png") as image:
        assert image.size == (96, 72)


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_runs_twice(
    local_ray: Path,
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "PHOTOS", tmp_path / "photos")
    demo.PHOTOS.mkdir()
    for name in ("colosseum.jpg", "piazza-gray.jpg", "screenshot.png"):
        with Image.open(EXAMPLES / "photos" / name) as image:
            image.thumbnail((480, 480))  # the demo itself takes half a minute
            image.save(demo.PHOTOS / name)
    for _ in range(2):
        demo.main(tmp_path / "demo-out")
    told = capsys.readouterr().out
    assert told.count("every byte is as written") == 2
    assert told.count("nothing to do this time") == 1
    with Image.open(tmp_path / "demo-out" / "comparison.png") as picture:
        assert picture.width > 1000
    assert len(list((tmp_path / "demo-out" / "extracted").iterdir())) == 2
