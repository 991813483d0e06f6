"""Flip one bit in every 1,000th byte of a part in turn: does verify name what was hit?

    python benchmarks/bitflips.py ARCHIVE [--part NAME] [--stride 1000]

ARCHIVE is a local folder; it is copied (one part of it) and left as it is. Each flip is a whole
verify, and where only a blob was hit, a read of every other photo. Prints counts; exits 1 when
any flip was not named, was named wrongly, or cost another photo.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import fsspec

from vaestream.archive.index import build_index
from vaestream.archive.layout import column_indices, read_footer
from vaestream.archive.manifest import read_manifest, write_manifest
from vaestream.archive.reader import open_archive
from vaestream.archive.verify import verify
from vaestream.errors import DamagedArchiveError

Region = tuple[int, int, str, str | None]


def copy_one_part(archive: Path, name: str | None, copy: Path) -> str:
    """An archive of a single part of another one; returns the part's name."""
    fs = fsspec.filesystem("file")
    manifest = read_manifest(fs, str(archive))
    parts = [part for part in manifest.parts if name in (None, part.name)]
    if not parts:
        sys.exit(f"{archive}: no part {name}")
    part = min(parts, key=lambda part: part.size)
    shutil.copy(archive / part.name, copy)
    if manifest.model_id is not None:
        shutil.copytree(archive / "models", copy / "models")
    write_manifest(
        fs,
        str(copy),
        settings=manifest.settings,
        model_id=manifest.model_id,
        parts=[part],
        index_sha256=build_index(fs, str(copy), [part.name]),
    )
    return part.name


def regions(archive: Path, part: str) -> list[Region]:
    """(start, end, what, key or column) of the part's bytes; later ones lie inside earlier ones."""
    size = (archive / part).stat().st_size
    footer = read_footer(fsspec.filesystem("file"), str(archive / part), size, part)
    found: list[Region] = [(0, 4, "footer", None), (footer.offset, size, "footer", None)]
    for group in range(footer.metadata.num_row_groups):
        for name, column in column_indices(footer.metadata).items():
            chunk = footer.metadata.row_group(group).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            found.append((start, start + chunk.total_compressed_size, "column", name))
    for row in open_archive(str(archive)).index.to_pylist():
        found.append((row["offset"], row["offset"] + row["length"], "photo", row["key"]))
    return found


def fault_of(archive: Path, part: str, what: str, name: str | None) -> str | None:
    """What is wrong with the answers to one flip; None when they are right."""
    problems = verify(str(archive))
    if not problems:
        return "not noticed"
    if {(problem.part, problem.what) for problem in problems} != {(part, what)}:
        return f"named as {problems[0]}"
    if what == "column" and not problems[0].detail.startswith(f"{name}: "):
        return f"named as {problems[0]}"
    if what == "photo":
        if [problem.row_key for problem in problems] != [name]:
            return f"named as {problems[0]}"
        reader = open_archive(str(archive))
        try:
            reader.blobs([key for key in reader if key != name])
        except DamagedArchiveError as error:
            return f"another photo is lost: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--part", help="file name; the smallest part where it is left out")
    parser.add_argument("--stride", type=int, default=1000)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder)
        part = copy_one_part(options.archive, options.part, archive)
        places = regions(archive, part)
        path = archive / part
        whole = path.read_bytes()
        for at in range(0, len(whole), options.stride):
            what, name = [place[2:] for place in places if place[0] <= at < place[1]][-1]
            damaged = bytearray(whole)
            damaged[at] ^= 1 << (at // options.stride) % 8
            path.write_bytes(damaged)
            counts[what] += 1
            fault = fault_of(archive, part, what, name)
            if fault is not None:
                faults += 1
                print(f"byte {at} of {what} {name}: {fault}")
    hit = ", ".join(f"{count} in {what}s" for what, count in sorted(counts.items()))
    print(f"{part}: {len(whole)} bytes, {counts.total()} flips ({hit}), {faults} named wrongly")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
