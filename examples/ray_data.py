"""Small copies of an archive's photos, in another archive: python examples/ray_data.py FROM TO"""

import sys

from vaestream.connectors.ray_data import read_archive, write_archive

if __name__ == "__main__":
    source, destination = sys.argv[1:]
    # Decoded at the size that is asked for, in parallel; each photo's key goes along.
    photos = read_archive(source, max_size=512)
    write_archive(photos, destination, quality=40, concurrency=2)
    print(f"{photos.count()} photos in {destination}")
