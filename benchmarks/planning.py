"""What planning costs as a source grows: seconds and memory of the driver, by number of objects.

    python benchmarks/planning.py [--counts 1000,10000,100000] [--workers 2]

The objects are links to a few small files that are kept as they are, so that all that is measured
is the job around the codec. Three runs for every count, each in a process of its own: the job from
nothing, a second run that finds all done, and one after a hundred objects have been added.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_RUN = """
import json, resource, sys, time
begin = time.monotonic()
import vaestream
source, archive, workers = sys.argv[1:]
imported = time.monotonic() - begin
summary = vaestream.compress(source, archive, workers=int(workers))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"objects": summary.objects, "seconds": summary.seconds, "megabytes": peak}))
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", default="1000,10000,100000")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(f"{'objects':>8} {'run':>10} {'seconds':>8} {'ms/object':>10} {'driver MB':>10}")
    for count in map(int, args.counts.split(",")):
        with tempfile.TemporaryDirectory(prefix="planning-") as folder:
            _measure(Path(folder), count, args.workers)


def _measure(folder: Path, count: int, workers: int) -> None:
    source = folder / "source"
    texts = [folder / f"text-{i}" for i in range(4)]
    for i, text in enumerate(texts):
        text.write_bytes(b"not a photo %d" % i)

    def grow(start: int, stop: int) -> None:
        for i in range(start, stop):
            path = source / f"{i // 1000:04}" / f"{i:08}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(texts[i % len(texts)])

    grow(0, count)
    for name in ("first", "again", "100 more"):
        if name == "100 more":
            grow(count, count + 100)
        command = [sys.executable, "-c", _RUN, str(source), str(folder / "archive"), str(workers)]
        told = subprocess.run(command, check=True, capture_output=True, env=os.environ).stdout
        found = json.loads(told.splitlines()[-1])
        print(
            f"{found['objects']:>8} {name:>10} {found['seconds']:>8.1f} "
            f"{1000 * found['seconds'] / found['objects']:>10.2f} {found['megabytes']:>10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
