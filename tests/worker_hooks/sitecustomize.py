"""Runs in each Python process of the tests' Ray: photos that kill or stop who reads them.

A source that holds the bytes KILL ME kills the process that loads it. One that holds WAIT HERE
leaves a file with the process's id in the hook folder and waits there for a file named "go".
Where the folder has a file named "fake-gpus", a worker for a GPU notes so there ("cuda-" and its
id) and computes on the CPU.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any


def hook(images: Any) -> None:
    load = images.load
    folder = Path(os.environ["VAESTREAM_HOOK_FOLDER"])

    def hooked(data: bytes, **options: object) -> object:
        if b"KILL ME" in data:
            with (folder / "deaths").open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if b"WAIT HERE" in data and not (folder / "go").exists():
            (folder / f"waiting-{os.getpid()}").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)
        return load(data, **options)

    images.load = hooked


def hook_worker(worker: Any) -> None:
    load_codec = worker.load_codec
    folder = Path(os.environ["VAESTREAM_HOOK_FOLDER"])

    def hooked(fs: object, root: str, model_id: str, *, device: str) -> object:
        if (folder / "fake-gpus").exists():
            (folder / f"{device}-{os.getpid()}").touch()
            device = "cpu"
        return load_codec(fs, root, model_id, device=device)

    worker.load_codec = hooked


HOOKS = {"vaestream.images": hook, "vaestream.pipeline.worker": hook_worker}


class HookedLoader(SourceFileLoader):
    """Runs a module, then its hook."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        HOOKS[module.__name__](module)


class Finder:
    """Puts hooks in when their modules are imported, and costs other processes nothing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in HOOKS else None
        if spec is not None and spec.origin is not None:
            spec.loader = HookedLoader(name, spec.origin)
        return spec


if "VAESTREAM_HOOK_FOLDER" in os.environ:
    sys.meta_path.insert(0, Finder())
