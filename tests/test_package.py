"""The built wheel, away from the checkout: all that a user needs is in it."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

SMOKE = """
import importlib.metadata, importlib.util, pathlib, sys
import numpy as np
import vaestream
from vaestream.connectors import torch as connector

home = pathlib.Path(vaestream.__file__).parent
assert home.is_relative_to(sys.prefix), home
assert (home / "py.typed").is_file()
assert not (home / "connectors").is_symlink()
assert pathlib.Path(connector.__file__).parent == home / "connectors" / "torch"
assert importlib.metadata.version("vaestream") == vaestream.__version__
codec = vaestream.Codec.load(device="cpu")
image = np.full((40, 50, 3), 99, np.uint8)
assert codec.decode(codec.encode([image]))[0].shape == image.shape
print("smoke test passed")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_weights_connectors_templates_types_and_licences(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "vaestream/py.typed" in names
    assert "vaestream/connectors/torch/loader.py" in names
    assert "vaestream/pipeline/report/report.html.jinja" in names
    assert [name for name in names if name.startswith("vaestream/codec/weights/")]
    for licence in ("LICENSE", "LICENSE-WEIGHTS"):
        assert any(name.endswith(f"dist-info/licenses/{licence}") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "connectors/", "examples/"))]


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    # The dependencies are those of this environment; its own vaestream comes after the wheel's.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    (tmp_path / "elsewhere").mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(str(python), "-c", SMOKE) == "smoke test passed\n"
    assert run(str(home / "bin" / "vaestream"), "--version").startswith("vaestream ")


def test_mypy_sees_the_connectors(tmp_path: Path) -> None:
    use = tmp_path / "use.py"
    use.write_text("from vaestream.connectors.torch import ArchiveDataset, NoSuchThing\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(use)], cwd=REPOSITORY, capture_output=True, text=True
    )
    told = [line for line in done.stdout.splitlines() if "use.py" in line]
    assert len(told) == 1
    assert 'Module "vaestream.connectors.torch" has no attribute "NoSuchThing"' in told[0]
