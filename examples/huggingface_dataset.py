"""An archive as a Hugging Face dataset: python examples/huggingface_dataset.py ARCHIVE"""

import sys

import datasets

import vaestream
from vaestream.connectors import pillow

if __name__ == "__main__":
    (url,) = sys.argv[1:]
    pillow.add_model(vaestream.open(url))  # the model that the archive was made with
    parts = f"{url.rstrip('/')}/part-*.parquet"
    # The archive has objects too that are no pictures, or broken ones: bitstreams are neither.
    photos = datasets.load_dataset(
        "parquet", data_files=parts, split="train", streaming=True, filters=[("codec", "==", "vae")]
    )
    for row in photos.take(3):
        print(row["key"], row["image"].size, row["psnr"])
