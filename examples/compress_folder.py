"""Compress a folder of photos: python examples/compress_folder.py PHOTOS ARCHIVE"""

import sys

import vaestream

if __name__ == "__main__":
    photos, archive = sys.argv[1:]
    summary = vaestream.compress(photos, archive, quality=50)
    print(f"{summary.photos} of {summary.objects} compressed, {summary.ratio:.1f} times smaller")
