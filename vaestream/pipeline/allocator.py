"""What a process that codes photo after photo asks of the C library's memory allocator."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB of what it frees, for the next photo.

    Otherwise glibc returns large blocks to the system, which clears every page of the next ones
    anew: up to a tenth of the codec's time. Does nothing with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
