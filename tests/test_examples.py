"""Each example runs as its first line says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY
from photos import fill, pixels, png
from PIL import ExifTags, Image
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


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def sources(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same photos for each of the training loops' sources, some of them on their side."""
    wds = pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("loops")
    (folder / "files").mkdir()
    shards = str(folder / "shard-%06d.tar")
    with wds.ShardWriter(shards, maxcount=3, verbose=0) as writer:
        for seed in range(6):
            path = folder / "files" / f"{seed}.jpg"
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 1 + seed
            Image.fromarray(pixels(seed, 224, 224)).save(path, quality=95, exif=exif)
            writer.write({"__key__": path.stem, "jpg": path.read_bytes()})
    with without_ray():
        vaestream.compress(folder / "files", folder / "archive", weights=weights, min_psnr=0.0)
    return {
        "files": str(folder / "files"),
        "archive": str(folder / "archive"),
        "webdataset": shards.replace("%06d", "{000000..000001}"),
    }


@pytest.mark.parametrize("source", ["files", "archive", "webdataset"])
def test_a_training_loop_sees_every_photo_in_every_epoch(
    sources: dict[str, str], source: str
) -> None:
    told = run("training_loops.py", source, sources[source], "--workers", 1, "--batch-size", 4)
    assert [line.split(",")[0] for line in told.splitlines()] == [
        "epoch 0: 6 photos",
        "epoch 1: 6 photos",
    ]


@pytest.mark.parametrize(
    ("source", "levels"), [("files", 0.0), ("archive", 8.0), ("webdataset", 0.0)]
)
def test_training_loops_get_the_same_photos_from_each_source(
    sources: dict[str, str], source: str, levels: float
) -> None:
    loops = module("training_loops")

    def epochs(count: int) -> list[torch.Tensor]:
        batches = getattr(loops, source)(sources[source], batch_size=4, workers=0, seed=0)
        return [torch.cat(list(batches)).float() for _ in range(count)]

    # As large as the crop, which is therefore the whole.
    upright = [loops.upright(Image.open(path)) for path in Path(sources["files"]).iterdir()]
    first, *later = epochs(4)
    apart = torch.stack([(first - photo).abs().mean((1, 2, 3)) for photo in upright])
    assert len(first) == len(upright) == len(set(apart.argmin(0).tolist()))
    assert apart.amin(0).max() <= levels
    assert torch.equal(first, epochs(1)[0]), "the seed makes the order"
    assert any(not torch.equal(first, other) for other in later), "epochs have orders of their own"


def test_the_page_shows_the_training_loops_as_they_are() -> None:
    page = (REPOSITORY / "docs" / "training-loops.md").read_text()
    program = (EXAMPLES / "training_loops.py").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(shown) == 3 and all(code in program for code in shown)


@pytest.fixture
def demo() -> ModuleType:
    return module("demo")


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
