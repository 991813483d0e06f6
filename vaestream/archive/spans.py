"""Byte ranges of parts: neighbours share a read, all reads are one request."""

from bisect import bisect_right
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import fsspec
from fsspec.utils import merge_offset_ranges

from vaestream.archive.storage import read_ranges, shown, store_errors
from vaestream.errors import DamagedArchiveError

_BLOCK_BYTES = 32 << 20
"""Where merged ranges are split, so that a store can serve them side by side."""

_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file, from `start` up to `end`."""

    path: str
    start: int
    end: int


def read_spans(
    fs: fsspec.AbstractFileSystem, root: str, wanted: Mapping[_Name, Span], *, max_gap: int
) -> dict[_Name, bytes]:
    """The bytes of each span of parts in folder `root`; those that cannot be read are left out.

    max_gap: bytes worth reading in vain to save a request. Raises DamagedArchiveError for a part
    that is missing.
    """
    spans = list({span for span in wanted.values() if span.end > span.start})
    found = {name: b"" for name, span in wanted.items() if span.end == span.start}
    if not spans:
        return found
    paths, starts, ends = merge_offset_ranges(
        [span.path for span in spans],
        [span.start for span in spans],
        [span.end for span in spans],
        max_gap=max_gap,
        max_block=_BLOCK_BYTES,
    )
    with store_errors(fs, root):
        answers = read_ranges(fs, paths, starts, ends)
    blocks: dict[str, list[tuple[int, bytes]]] = {}
    for path, start, answer in zip(paths, starts, answers, strict=True):
        if isinstance(answer, FileNotFoundError):
            raise missing_part(fs, path) from answer
        # A range past the end of a shorter file is an error in some stores: whether it is one, the
        # part's footer tells, or what keeps the store from reading it.
        if not isinstance(answer, Exception):
            blocks.setdefault(path, []).append((start, answer))
    for read in blocks.values():
        read.sort(key=_start)
    for name, span in wanted.items():
        read = blocks.get(span.path, [])
        block = bisect_right(read, span.start, key=_start) - 1
        if span.end > span.start and block >= 0:
            begun, data = read[block]
            found[name] = data[span.start - begun : span.end - begun]
    return found


def missing_part(fs: fsspec.AbstractFileSystem, path: str) -> DamagedArchiveError:
    """What to raise for a part that is not there."""
    return DamagedArchiveError(f"{shown(fs, path)}: the part is missing")


def _start(block: tuple[int, bytes]) -> int:
    return block[0]
