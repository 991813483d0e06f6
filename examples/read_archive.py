"""Read an archive: python examples/read_archive.py ARCHIVE"""

import sys

import vaestream

if __name__ == "__main__":
    archive = vaestream.open(sys.argv[1])
    print(f"{len(archive)} photos")

    # One photo, as Pillow opens files: one ranged read, nothing else is fetched.
    key = next(iter(archive))
    image = archive[key]
    print(key, image.size, image.mode, "with EXIF" if "exif" in image.info else "without EXIF")

    # Many at once, as arrays (height, width, 3) or (height, width).
    keys = [row.key for row in archive.rows() if row.error is None][:8]
    for name, pixels in zip(keys, archive.read(keys), strict=True):
        print(name, pixels.shape, f"mean {pixels.mean():.0f}")
