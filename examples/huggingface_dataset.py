"""An archive as a Hugging Face dataset: python examples/huggingface_dataset.py ARCHIVE"""

import sys

import datasets

import vaestream
from vaestream.connectors import pillow

if __name__ == "__main__":
    (url,) = sys.argv[1:]
    pillow.add_model(vaestream.open(url))  # the model that the archive was made with
    photos = datasets.load_dataset(
        "parquet", data_files=f"{url.rstrip('/')}/part-*.parquet", split="train", streaming=True
    )
    # The archive keeps what is no picture too.
    for row in photos.filter(lambda row: row["width"] is not None, input_columns=None).take(3):
        print(row["key"], row["image"].size, row["psnr"])
