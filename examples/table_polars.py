"""An archive as a table (pip install polars): python examples/table_polars.py ARCHIVE"""

import sys

import polars as pl

if __name__ == "__main__":
    (archive,) = sys.argv[1:]
    # Lazy: only the columns that a query names are read, never the photos.
    photos = pl.scan_parquet(f"{archive.rstrip('/')}/part-*.parquet")
    bpp = 8 * pl.col("num_bytes") / pl.col("width") / pl.col("height")
    sums = pl.len().alias("objects"), pl.col("source_size").sum(), pl.col("num_bytes").sum()
    compressed = photos.filter(pl.col("codec") == "vae")
    broken = photos.filter(pl.col("error").is_not_null())
    tables = {
        "bytes by codec": photos.group_by("codec").agg(*sums).sort("codec"),
        "lowest PSNR": compressed.sort("psnr", "key").select("key", "psnr", bpp.alias("bpp")),
        "errors": broken.sort("error", "key").select("error", "key"),
    }
    for question, table in tables.items():
        print(question)
        print(table.head(5).collect())
