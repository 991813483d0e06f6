"""What vaestream does, on the sample photos: python examples/demo.py [FOLDER]

Compresses examples/photos with the real Ray job, on this machine, verifies the archive, extracts
two photos, prints a table and writes FOLDER/comparison.png: originals and reconstructions side by
side, beside JPEG and WebP of the same size. Run again, it finds the archive finished.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import vaestream
from vaestream.archive.reader import Archive
from vaestream.archive.verify import verify
from vaestream.pipeline.extract import extract

PHOTOS = Path(__file__).parent / "photos"
QUALITY = 30
CROP = 320
MARGIN = 12


def psnr(one: Image.Image, other: Image.Image) -> float:
    """dB between two pictures of one size."""
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


def at_size(image: Image.Image, format: str, size: int) -> tuple[Image.Image, int]:
    """`image` through Pillow's own codec, at the highest quality of at most `size` bytes (or the
    lowest quality there is), and the bytes that it took."""

    def encode(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, format, quality=quality, **({"method": 6} if format == "WEBP" else {}))
        return file.getvalue()

    low, high = 1, 100
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode(middle)) <= size else (low, middle - 1)
    data = encode(low)
    return Image.open(io.BytesIO(data)).convert("RGB"), len(data)


def busiest(image: Image.Image) -> tuple[int, int, int, int]:
    """The box of the square with most detail: where codecs differ."""
    gray = np.asarray(image.convert("L"), np.float32)
    down, across = np.diff(gray, axis=0, append=gray[-1:]), np.diff(gray, append=gray[:, -1:])
    detail = np.abs(down) + np.abs(across)
    side = min(CROP, image.width, image.height)
    sums = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    step = max(1, side // 4)
    boxes = [
        (x, y, x + side, y + side)
        for y in range(0, image.height - side + 1, step)
        for x in range(0, image.width - side + 1, step)
    ]

    def amount(box: tuple[int, int, int, int]) -> float:
        left, top, right, bottom = box
        total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return float(total)

    return max(boxes, key=amount)


def comparison(archive: Archive, keys: list[str]) -> Image.Image:
    """A row a photo: a crop of the original, of ours, of WebP and of JPEG at our bytes."""
    rows = []
    for key in keys:
        size = archive.row(key).num_bytes
        original = ImageOps.exif_transpose(Image.open(PHOTOS / key)).convert("RGB")
        ours = archive[key].convert("RGB")
        cells = [
            (original, f"{key}", f"original, {(PHOTOS / key).stat().st_size / 1000:.0f} kB"),
            (ours, "vaestream", f"{size / 1000:.1f} kB, {psnr(original, ours):.2f} dB"),
        ]
        for format, name in (("WEBP", "WebP"), ("JPEG", "JPEG")):
            image, took = at_size(original, format, size)
            over = "" if took <= size else " (its least)"
            told = f"{took / 1000:.1f} kB{over}, {psnr(original, image):.2f} dB"
            cells.append((image, name, told))
        box = busiest(original)
        rows.append([(image.crop(box), name, told) for image, name, told in cells])
    font = ImageFont.load_default(size=15)
    width = MARGIN + 4 * (CROP + MARGIN)
    height = MARGIN + len(rows) * (CROP + 44 + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (image, name, told) in enumerate(row):
            x, y = MARGIN + j * (CROP + MARGIN), MARGIN + i * (CROP + 44 + MARGIN)
            for line, text in enumerate((name, told)):
                draw.text((x, y + 20 * line), text, "black", font)
            sheet.paste(image, (x, y + 44))
    return sheet


def table(summary: vaestream.Summary) -> str:
    """The figures of the job."""
    none = "-"

    def number(value: float | None, digits: int) -> str:
        return none if value is None else f"{value:.{digits}f}"

    facts = {
        "photos": f"{summary.photos} compressed, {summary.objects - summary.photos} kept",
        "source": f"{summary.source_bytes:,} bytes",
        "archive": f"{summary.archive_bytes:,} bytes (and {summary.model_bytes:,} of the model)",
        "ratio": number(summary.ratio, 2),
        "bits per pixel": number(summary.bpp, 3),
        "PSNR": f"{number(summary.psnr, 2)} dB",
        "speed": f"{number(summary.megapixels_per_second, 2)} MP/s with start-up"
        if summary.megapixels_per_second
        else "nothing to do this time",
    }
    return "\n".join(f"  {name:15s} {value}" for name, value in facts.items())


def main(folder: Path) -> None:
    """Run the demo into `folder`."""
    target = str(folder / "archive")
    print(f"compressing {PHOTOS} into {target} with a local Ray ...", flush=True)
    summary = vaestream.compress(PHOTOS, target, quality=QUALITY, shard_images=4)
    print(table(summary))

    problems = verify(target)
    print(f"verified: {problems or 'every byte is as written'}")

    archive = vaestream.open(target)
    coded = [row.key for row in archive.rows() if row.codec == "vae"][:2]
    extracted = extract(archive, str(folder / "extracted"), coded)
    print(f"extracted {extracted.decoded} photos into {folder / 'extracted'}")

    picture = folder / "comparison.png"
    comparison(archive, coded).save(picture)
    print(f"side by side with WebP and JPEG of the same size: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
