"""What tests share: the folder of sample photos, one Ray, small photos."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import S3Server

    from vaestream import Codec

# Before torch or Ray are imported, and for every process that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of photos beside the repository; tests that want it are skipped where it is not."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder ../shared")
    return path


@contextmanager
def hooked_processes(**more: str) -> Iterator[Path]:
    """Within the block each Python process that is started runs tests/worker_hooks: the path given
    is the folder where these leave and look for their marks. more: of the environment."""
    # Short: Ray keeps sockets there, whose paths may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="vs-", dir="/tmp"))
    before = os.environ.get("PYTHONPATH")
    hooks = [str(REPOSITORY / "tests" / "worker_hooks"), str(REPOSITORY)]
    path = os.pathsep.join(hooks + ([before] if before else []))
    try:
        with pytest.MonkeyPatch.context() as patch:
            marked = {"VAESTREAM_HOOK_FOLDER": str(folder), "PYTHONPATH": path}
            for name, value in {**marked, **more}.items():
                patch.setenv(name, value)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Path]:
    """One Ray for all tests that need one. Its workers run tests/worker_hooks: the path given is
    the folder where these leave and look for their marks."""
    import ray

    with hooked_processes() as folder:
        try:
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100 << 20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "ray"),
            )
            yield folder
        finally:
            ray.shutdown()


@pytest.fixture(scope="session")
def weights(codec: "Codec", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's weights file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(codec.weights)
    return path


@pytest.fixture(scope="session")
def codec() -> "Codec":
    """A small untrained model: the DCT it starts from codes photos well enough for tests."""
    import torch
    from models import lively

    from vaestream.codec import Codec
    from vaestream.codec.config import ModelConfig
    from vaestream.codec.hyperprior import Hyperprior
    from vaestream.codec.weights_file import export_weights

    torch.manual_seed(0)
    config = ModelConfig(
        latent=128,
        hyper=8,
        width8=16,
        width16=16,
        analysis_blocks8=1,
        analysis_blocks16=1,
        synthesis_blocks8=1,
        synthesis_blocks16=1,
        mean_width=8,
        scale_width=8,
        groups=(8, 24, 96),
        steps=(3, 2, 1),
        mean_context_width=8,
        scale_context_width=8,
        mean_context_hidden=8,
        lattice_from=10,
        filter_width=8,
        filter_blocks=1,
    )
    model = lively(Hyperprior(config))
    return Codec(export_weights(model), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[S3Server]":
    """A real S3 server; tests that want one are skipped where it cannot be installed."""
    from s3_server import S3Server, UnavailableError

    try:
        server = S3Server(tmp_path_factory.mktemp("s3"))
    except UnavailableError as error:
        pytest.skip(f"no S3 server: {error}")
    with server:
        yield server
