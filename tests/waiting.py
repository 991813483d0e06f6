"""What tests of other processes share."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(
    condition: Callable[[], Any],
    process: subprocess.Popen[Any] | None = None,
    *,
    seconds: float = 300,  # a busy machine takes long to start a job
) -> Any:
    """What the condition gives once it is true; an error when `process` ends before that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it has ended: {process.communicate()}")
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
