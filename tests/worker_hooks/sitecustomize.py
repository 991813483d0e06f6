"""Runs in each Python process of the tests' Ray: photos that kill or stop who reads them.

A source that holds the bytes KILL ME kills the process that loads it. One that holds WAIT HERE
leaves a file with the process's id in the hook folder and waits there for a file named "go".
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


class Finder:
    """Puts the hook in when vaestream.images is imported, and costs other processes nothing."""

    def find_spec(self, name, path=None, target=None):
        if name != "vaestream.images":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module
        return spec


if "VAESTREAM_HOOK_FOLDER" in os.environ:
    sys.meta_path.insert(0, Finder())
