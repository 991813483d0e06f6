"""Runs in each Python process of the tests' Ray: photos that kill or stop who reads them.

A source that holds the bytes KILL ME kills the process that loads it. One that holds WAIT HERE
leaves a file with the process's id in the hook folder and waits there for a file named "go".
Where the folder has a file named "fake-gpus", a worker for a GPU notes so there ("cuda-" and its
id) and computes on the CPU.
"""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path


def hook(images):
    load = images.load
    folder = Path(os.environ["VAESTREAM_HOOK_FOLDER"])

    def hooked(data, **options):
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


def hook_worker(worker):
    load_codec = worker.load_codec
    folder = Path(os.environ["VAESTREAM_HOOK_FOLDER"])

    def hooked(fs, root, model_id, *, device):
        if (folder / "fake-gpus").exists():
            (folder / f"{device}-{os.getpid()}").touch()
            device = "cpu"
        return load_codec(fs, root, model_id, device=device)

    worker.load_codec = hooked


class Finder:
    """Puts hooks in when their modules are imported, and costs other processes nothing."""

    hooks = {"vaestream.images": hook, "vaestream.pipeline.worker": hook_worker}  # noqa: RUF012

    def find_spec(self, name, path=None, target=None):
        hook = self.hooks.pop(name, None)
        if hook is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module
        return spec


if "VAESTREAM_HOOK_FOLDER" in os.environ:
    sys.meta_path.insert(0, Finder())
