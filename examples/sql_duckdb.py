"""An archive answers SQL (pip install duckdb): python examples/sql_duckdb.py ARCHIVE"""

import sys

import duckdb

QUESTIONS = {
    "bytes by codec": """
        SELECT codec, count(*) AS objects, sum(source_size) AS source_bytes,
               sum(num_bytes) AS archive_bytes
        FROM photos GROUP BY codec ORDER BY codec""",
    "lowest PSNR": """
        SELECT key, round(psnr, 2) AS psnr, round(8.0 * num_bytes / width / height, 3) AS bpp
        FROM photos WHERE codec = 'vae' ORDER BY psnr, key LIMIT 5""",
    "errors": "SELECT error, key FROM photos WHERE error IS NOT NULL ORDER BY error, key",
}

if __name__ == "__main__":
    (archive,) = sys.argv[1:]
    # A view over the parts: only the columns that a question names are read, never the photos.
    parts = archive.rstrip("/").replace("'", "''") + "/part-*.parquet"
    database = duckdb.connect()
    database.execute(f"CREATE VIEW photos AS SELECT * FROM read_parquet('{parts}')")
    for question, sql in QUESTIONS.items():
        print(question)
        for row in database.execute(sql).fetchall():
            print(" ", *row)
