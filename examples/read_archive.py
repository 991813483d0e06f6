"""Read an archive: python examples/read_archive.py ARCHIVE"""

import sys

import vaestream

if __name__ == "__main__":
    archive = vaestream.open(sys.argv[1])
    # What is broken or no picture has a row too: `archive.blob(key)` is its bytes.
    keys = [row.key for row in archive.rows() if row.width is not None and row.error is None]
    print(f"{len(archive)} objects, {len(keys)} of them photos")

    # One photo, as Pillow opens files: one ranged read, nothing else is fetched.
    key = keys[0]
    image = archive[key]
    print(key, image.size, image.mode, "with EXIF" if "exif" in image.info else "without EXIF")

    # Many at once, as arrays (height, width, 3) or (height, width).
    for name, pixels in zip(keys[:8], archive.read(keys[:8]), strict=True):
        print(name, pixels.shape, f"mean {pixels.mean():.0f}")
