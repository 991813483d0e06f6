"""Any file is a photo, kept or broken; a photo's pixels and metadata are those of the file."""

import csv
import io
import re
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from vaestream.errors import ArchiveError
from vaestream.images import Broken, Kept, Photo, decode_kept, load, save, to_image
from vaestream.images.containers import UNKNOWN_FORMAT, ifd

DATA = Path(__file__).parent / "data"
PACKET = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d" a="b"/></x:xmpmeta>'


def read(name: str) -> bytes:
    return (DATA / name).read_bytes()


def picture(mode: str = "RGB", size: tuple[int, int] = (96, 64)) -> Image.Image:
    with Image.open(DATA / "otters.png") as image:
        return image.convert(mode).resize(size)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo(data: bytes, name: str = "a.jpg") -> Photo:
    result = load(data, name=name)
    assert isinstance(result, Photo), result
    return result


def reason(data: bytes, name: str = "a") -> str:
    result = load(data, name=name)
    assert isinstance(result, Kept), result
    return result.reason


def upright(data: bytes) -> np.ndarray:
    """Pillow's own reading."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# --- photos


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("otters.png", "PNG"),
        ("gray.jpg", "JPEG"),
        ("skyline.webp", "WEBP"),
        ("forget-me-not.jpg", "JPEG"),
        ("display-p3.jpg", "JPEG"),
        ("orientation-6.jpg", "JPEG"),
    ],
)
def test_pixels_are_those_pillow_reads(name: str, format: str) -> None:
    loaded = photo(read(name), name)
    assert loaded.format == format
    assert loaded.pixels.dtype == np.uint8 and loaded.pixels.flags.c_contiguous
    np.testing.assert_array_equal(loaded.pixels, upright(read(name)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("PPM", {}),
        ("TGA", {}),
        ("JPEG2000", {}),
        ("AVIF", {}),
    ],
)
def test_every_format(mode: str, format: str, options: dict[str, object]) -> None:
    data = encoded(picture(mode), format, **options)
    loaded = photo(data, f"a.{format.lower()}")
    assert loaded.format == format
    assert loaded.exif is None or format == "TIFF"
    np.testing.assert_array_equal(loaded.pixels, upright(data))


def test_bmp_in_colour() -> None:
    data = encoded(picture(), "BMP")
    np.testing.assert_array_equal(photo(data, "a.bmp").pixels, upright(data))


def test_large_photo_is_read_in_strips_without_a_seam() -> None:
    image = picture(size=(3000, 3100))
    np.testing.assert_array_equal(photo(encoded(image, "PPM")).pixels, np.asarray(image))


# --- orientation and metadata


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("endian", ["<", ">"])
def test_orientation_is_applied_once(orientation: int, endian: str) -> None:
    exif = Image.Exif()
    exif.endian = endian
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    data = encoded(picture(), "PNG", exif=exif.tobytes())
    loaded = photo(data)
    np.testing.assert_array_equal(loaded.pixels, upright(data))
    restored = to_image(loaded.pixels, exif=loaded.exif)
    assert restored.getexif()[ExifTags.Base.Orientation] == 1
    assert restored.getexif()[ExifTags.Base.Make] == "Maker"


def test_only_the_orientation_changes_in_exif() -> None:
    with Image.open(DATA / "orientation-6.jpg") as image:
        source = image.info["exif"]
    carried = photo(read("orientation-6.jpg")).exif
    assert carried is not None and len(carried) == len(source)
    changed = [at for at in range(len(source)) if source[at] != carried[at]]
    (entry,) = (entry for entry in ifd(source[6:]) if entry.tag == ExifTags.Base.Orientation)
    assert changed and set(changed) <= set(range(6 + entry.at, 6 + entry.at + entry.width))


def test_orientation_in_xmp() -> None:
    data = encoded(picture(), "JPEG", xmp=PACKET % 6)
    loaded = photo(data)
    assert loaded.pixels.shape == (96, 64, 3)
    np.testing.assert_array_equal(loaded.pixels, upright(data))
    assert loaded.xmp == PACKET % 1


def test_exif_outranks_xmp_and_both_end_upright() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    data = encoded(picture(), "JPEG", xmp=PACKET % 6, exif=exif)
    loaded = photo(data)
    np.testing.assert_array_equal(loaded.pixels, upright(data))
    assert loaded.xmp == PACKET % 1
    assert to_image(loaded.pixels, exif=loaded.exif).getexif()[ExifTags.Base.Orientation] == 1


def test_a_kept_source_is_upright_and_has_8_bits() -> None:
    """Whether `load` would keep it or not."""
    image = picture()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for mode, plain in (("RGB", "RGB"), ("L", "L"), ("RGBA", "RGB"), ("LA", "RGB")):
        expected = upright(encoded(image.convert(mode).convert(plain), "PNG", exif=turned))
        found = decode_kept(encoded(image.convert(mode), "PNG", exif=turned))
        np.testing.assert_array_equal(found, expected)
    for broken in (b"", b"notes", encoded(image, "PNG")[:300], encoded(image.convert("F"), "TIFF")):
        with pytest.raises(ArchiveError, match="a kept source, which does not decode"):
            decode_kept(broken)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200)),
    ],
)
def test_corrupt_exif_costs_nothing(exif: bytes) -> None:
    image = picture()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = photo(encoded(image, "JPEG", exif=exif))
    assert loaded.exif == exif
    np.testing.assert_array_equal(loaded.pixels, upright(encoded(image, "JPEG")))


def test_tiff_carries_its_description() -> None:
    tags = ImageFileDirectory_v2()
    tags[ExifTags.Base.Make] = "Maker"
    tags[ExifTags.Base.Orientation] = 8
    tags[ExifTags.IFD.Exif] = {ExifTags.Base.ISOSpeedRatings: 200}
    data = encoded(picture(), "TIFF", tiffinfo=tags)
    loaded = photo(data, "a.tif")
    np.testing.assert_array_equal(loaded.pixels, upright(data))
    carried = to_image(loaded.pixels, exif=loaded.exif).getexif()
    assert carried[ExifTags.Base.Make] == "Maker"
    assert carried.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 200
    assert ExifTags.Base.StripOffsets not in carried
    assert carried.get(ExifTags.Base.Orientation, 1) == 1


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_metadata_survives_saving(format: Literal["png", "jpeg", "webp"]) -> None:
    first, second = photo(read("orientation-6.jpg")), photo(read("display-p3.jpg"))
    file = io.BytesIO()
    save(first.pixels, file, format, exif=first.exif, xmp=first.xmp, icc=second.icc)
    back = photo(file.getvalue(), f"a.{format}")
    assert (back.exif, back.xmp, back.icc) == (first.exif, first.xmp, second.icc)
    if format == "png":
        np.testing.assert_array_equal(back.pixels, first.pixels)
    again = io.BytesIO()
    save(to_image(first.pixels, icc=second.icc), again, format)
    bare = photo(again.getvalue(), f"a.{format}")
    assert bare.exif is None and bare.xmp is None


def test_images_carry_metadata_as_pillow_does() -> None:
    loaded = photo(read("orientation-6.jpg"))
    image = to_image(loaded.pixels, exif=loaded.exif, xmp=loaded.xmp, icc=b"profile")
    with Image.open(DATA / "orientation-6.jpg") as source:
        assert dict(image.getexif()) == dict(source.getexif()) | {ExifTags.Base.Orientation: 1}
    assert image.info["xmp"] == loaded.xmp and image.info["icc_profile"] == b"profile"


# --- kept


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("alpha.png", "alpha channel"),
        ("alpha.webp", "alpha channel"),
        ("transparent-colour.png", "alpha channel"),
        ("16-bit.png", "16 bits per channel"),
        ("palette.png", "palette"),
        ("1-bit.png", "1 bit per pixel"),
        ("8x8.png", "smaller than 32x32"),
        ("cmyk.tiff", "CMYK"),
    ],
)
def test_what_the_codec_does_not_serve_is_kept(name: str, why: str) -> None:
    result = load(read(name), name=name)
    assert isinstance(result, Kept) and result.reason == why
    assert result.width and result.height and result.format


def test_modes_kept() -> None:
    assert reason(encoded(picture("CMYK"), "JPEG")) == "CMYK"
    assert reason(encoded(picture("RGBA"), "PNG")) == "alpha channel"  # opaque, too
    assert reason(encoded(picture("LA"), "PNG")) == "alpha channel"
    assert reason(encoded(picture("F"), "TIFF")) == "floating point"
    assert reason(encoded(picture("I").convert("I;16"), "TIFF")) == "16 bits per channel"
    assert reason(encoded(picture("L"), "GIF")) == "palette"
    assert reason(b"P6 96 64 65535\n" + bytes(96 * 64 * 6)) == "16 bits per channel"


def tiff(channels: int, extra: int | None, photometric: int = 2) -> bytes:
    """96x64, 8 bits; extra: what the last channel is, by ExtraSamples."""
    pixels = np.asarray(picture()).repeat(2, axis=2)[:, :, :channels].tobytes()
    short, long = 3, 4
    values = {256: 96, 257: 64, 258: 0, 259: 1, 262: photometric, 273: 0, 277: channels}
    values |= {278: 64, 279: len(pixels)} | ({} if extra is None else {338: extra})
    end = 8 + 2 + 12 * len(values) + 4
    values |= {258: end, 273: end + 2 * channels}
    entries = b"".join(
        struct.pack("<HHI", tag, short if tag == 258 else long, channels if tag == 258 else 1)
        + struct.pack("<I", value)
        for tag, value in values.items()
    )
    depths = struct.pack(f"<{channels}H", *[8] * channels)
    head = struct.pack("<4sIH", b"II*\0", 8, len(values))
    return head + entries + bytes(4) + depths + pixels


def test_channels_that_pillow_leaves_out_are_kept() -> None:
    assert photo(tiff(3, None)).pixels.shape == (64, 96, 3)
    assert reason(tiff(4, 0)) == "extra channels"  # near infrared, or a selection of Photoshop's
    assert reason(tiff(4, 2)) == "alpha channel"
    big = tiff(3, None).replace(b"II*\0", b"II+\0", 1)
    assert reason(big) == "BigTIFF"


def test_pictures_and_profiles_that_pillow_passes_over_are_kept() -> None:
    one = b"P6\n96 64\n255\n" + np.asarray(picture()).tobytes()
    assert photo(one).pixels.shape == (64, 96, 3)
    assert reason(one + one) == "data after the picture"
    plain = encoded(picture(), "BMP")
    pixels, fields = plain[54:], bytearray(plain[14:54] + bytes(84))
    fields[:4], fields[56:60] = struct.pack("<I", 124), b"DEBM"
    head = b"BM" + struct.pack("<IHHI", 138 + len(pixels), 0, 0, 138)
    assert reason(head + fields + pixels) == "colour profile that Pillow does not hand out"
    fields[56:60] = b"BGRs"
    assert photo(head + bytes(fields) + pixels).pixels.shape == (64, 96, 3)
    jpeg2000 = encoded(picture(), "JPEG2000")
    assert photo(jpeg2000).pixels.shape == (64, 96, 3)
    at = jpeg2000.index(b"colr")
    for method, space in ((1, 21), (2, 16), (3, 16)):  # ROMM RGB; ICC profiles
        told = bytes([method, 0, 0]) + struct.pack(">I", space)
        other = jpeg2000[: at + 4] + told + jpeg2000[at + 11 :]
        assert reason(other) == "JPEG 2000 metadata"


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_kept(format: str) -> None:
    frames = [picture(), ImageOps.mirror(picture()), ImageOps.invert(picture())]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert reason(data) == ("several pages" if format == "TIFF" else "animation")
    if format in ("GIF", "PNG"):  # the damage is in the last frame
        assert isinstance(load(data[: len(data) * 9 // 10], name="a"), Broken)


def test_second_pictures_are_kept() -> None:
    frames = [picture(), ImageOps.mirror(picture())]
    multi = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert reason(multi) == "several pictures in one file"
    base, gain = (
        encoded(picture(), "JPEG", xmp=b'<x hdrgm:Version="1.0"/>'),
        encoded(frames[1], "JPEG"),
    )
    assert reason(base + gain) == "gain map"
    assert photo(base).xmp == b'<x hdrgm:Version="1.0"/>'  # the name alone is no gain map
    plain = encoded(picture(), "JPEG")
    assert reason(plain + b"\0\0\0\x18ftypmp42" + bytes(100)) == "motion photo"
    assert reason(plain + bytes(1 << 17)) == "data after the picture"
    assert isinstance(load(plain + bytes(60), name="a"), Photo)


def test_the_preview_a_camera_appends_is_left_behind() -> None:
    """Most cameras write one: a smaller picture of the same, announced as a large thumbnail."""
    first, preview = picture(), picture().resize((48, 32))
    data = bytearray(encoded(first, "MPO", save_all=True, append_images=[preview]))
    second = data.index(struct.pack("<I", 0x030000), data.index(b"MPF\0") + 46) + 16
    struct.pack_into("<I", data, second, 0x010002)
    plain = photo(encoded(first, "JPEG"))
    assert np.array_equal(photo(bytes(data)).pixels, plain.pixels)
    assert reason(bytes(data) + bytes(encoded(preview, "JPEG"))) == "several pictures in one file"
    struct.pack_into("<I", data, second, 0x020003)  # a second view of a scene
    assert reason(bytes(data)) == "several pictures in one file"


def test_metadata_that_no_column_holds_is_kept() -> None:
    jpeg = encoded(picture(), "JPEG")
    extended = b"http://ns.adobe.com/xmp/extension/\0" + bytes(50)
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x04abcd"
    for marker, payload, why in (
        (b"\xff\xe1", extended, "extended XMP"),
        (b"\xff\xed", iptc, "IPTC without XMP"),
    ):
        segment = marker + struct.pack(">H", len(payload) + 2) + payload
        assert reason(jpeg[:2] + segment + jpeg[2:]) == why
    text = PngInfo()
    text.add_text("parameters", "a photo of otters, " * 50)
    assert reason(encoded(picture(), "PNG", pnginfo=text)) == "long text in PNG chunks"
    for keyword, packed in (("Raw profile type exif", True), ("XML:com.adobe.xmp", False)):
        profile = PngInfo()
        profile.add_text(keyword, "\nexif\n       4\n45786966\n", zip=packed)
        assert reason(encoded(picture(), "PNG", pnginfo=profile)) == "metadata in PNG text chunks"
    chatter = PngInfo()
    chatter.add_text("Software", "otter editor" * 50)
    assert photo(encoded(picture(), "PNG", pnginfo=chatter))
    for keyword, length in (("Software", 2_000_000), ("Workflow", 3_000_000)):
        for last in (False, True):
            text = PngInfo()
            text.add(b"zTXt", keyword.encode() + b"\0\0" + zlib.compress(bytes(length)), last)
            assert reason(encoded(picture(), "PNG", pnginfo=text)) == "long text in PNG chunks"
    odd = ImageFileDirectory_v2()
    odd.tagtype[ExifTags.Base.XResolution] = 2
    odd[ExifTags.Base.XResolution] = "72"
    assert reason(encoded(picture(), "TIFF", tiffinfo=odd)) == "TIFF tags that EXIF cannot hold"
    geo = encoded(picture(), "TIFF", tiffinfo={33550: (1.0, 1.0, 0.0)})
    assert reason(geo) == "TIFF tags with no place in EXIF"


@pytest.mark.parametrize("keyword", ["exif", "xmp", "icc_profile", "interlace", "transparency"])
def test_a_note_that_passes_for_metadata_keeps_the_png(keyword: str) -> None:
    bodies = {
        b"tEXt": b"note",
        b"zTXt": b"\0" + zlib.compress(b"note"),
        b"iTXt": bytes(4) + b"note",
    }
    for kind, body in bodies.items():
        note = PngInfo()
        note.add(kind, keyword.encode() + b"\0" + body)
        for whole in (picture(), picture().convert("P")):
            data = encoded(whole, "PNG", pnginfo=note)
            assert reason(data) == "metadata in PNG text chunks", kind
            assert np.array_equal(decode_kept(data), np.asarray(whole.convert("RGB")))


@pytest.mark.parametrize("tag", [700, 34675])  # XMP, ICC
@pytest.mark.parametrize(("kind", "value"), [(2, "text"), (3, 7), (4, 7)])
def test_metadata_of_an_odd_type_keeps_the_tiff(tag: int, kind: int, value: Any) -> None:
    directory = ImageFileDirectory_v2()
    directory.tagtype[tag] = kind
    directory[tag] = value
    directory[ExifTags.Base.Orientation] = 6
    data = encoded(picture(), "TIFF", tiffinfo=directory)
    assert reason(data) == "metadata of an odd type"
    turned = picture().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(decode_kept(data), np.asarray(turned))


def test_profiles_for_other_channels_are_kept() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert reason(encoded(picture(), "JPEG", icc_profile=lab)).startswith("ICC profile")
    assert photo(encoded(picture(), "JPEG", icc_profile=srgb)).icc == srgb
    assert photo(encoded(picture("L"), "PNG", icc_profile=srgb)).icc == srgb


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("IMG_1.xmp", b"<x:xmpmeta/>"),
        ("notes.txt", b"BMW is a car, and P6 an engine"),
        ("notes.txt", b"P6 is an engine"),
        (".nomedia", b""),
        ("IMG_1.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("IMG_1.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("video.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"),
        ("IMG_1.CR2", b"II*\0\x10\0\0\0CR\x02\0" + bytes(100)),
    ],
)
def test_other_formats_are_kept(name: str, data: bytes) -> None:
    assert reason(data, name) == UNKNOWN_FORMAT


def test_the_preview_of_a_raw_file_is_no_photo() -> None:
    tiff = encoded(picture(), "TIFF")
    dng = encoded(picture(), "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    assert reason(tiff, "DSC_1.NEF") == UNKNOWN_FORMAT
    assert reason(dng, "without-a-suffix") == UNKNOWN_FORMAT


# --- broken


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"]
)
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.7, 0.9])
def test_truncated_files_are_broken(format: str, fraction: float) -> None:
    data = encoded(picture(), format)
    result = load(data[: int(len(data) * fraction)], name=f"a.{format.lower()}")
    if format == "JPEG2000" and fraction >= 0.3:
        return  # its decoder answers with what has come so far
    assert isinstance(result, Broken), result
    assert result.error


def test_damage_is_broken_and_says_where() -> None:
    for name in ("checksum.png", "no-data.png"):
        result = load(read(name), name=name)
        assert isinstance(result, Broken) and result.format == "PNG" and result.width == 32
    assert "IDAT" in load(read("checksum.png"), name="a").error  # type: ignore[union-attr]
    for data in (b"", bytes(5000), b"<html>404</html>"):
        assert isinstance(load(data, name="IMG_1.jpg"), Broken)


def test_no_bytes_make_it_raise() -> None:
    """Whole files with a few bytes changed, or cut, never raise."""
    rng = np.random.default_rng(0)
    sources = [encoded(picture(size=(40, 36)), f) for f in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")]
    sources += [encoded(picture(size=(40, 36)), f) for f in ("GIF", "PPM", "JPEG2000", "TGA")]
    sources += [encoded(picture(), "JPEG", exif=photo(read("orientation-6.jpg")).exif)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in sources:
            for _ in range(40):
                data = bytearray(source)
                for at in rng.integers(0, min(len(data), 700), 6):
                    data[at] = rng.integers(256)
                cut = bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
                assert isinstance(
                    load(cut, name="a.tga", max_pixels=1 << 20), Photo | Kept | Broken
                )


# --- limits


def bomb(width: int, height: int, size: int = 24_000) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(size * 900))[:size]
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_pixel_limit_can_be_raised() -> None:
    data = read("otters.png")
    result = load(data, name="a.png", max_pixels=456 * 257 - 1)
    assert isinstance(result, Kept)
    assert "max_pixels" in result.reason and (result.width, result.height) == (456, 257)
    assert isinstance(load(data, name="a.png", max_pixels=456 * 257), Photo)


def test_bombs_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    huge_webp = bytearray(read("alpha.webp"))
    assert huge_webp[12:16] == b"VP8X"
    huge_webp[24:30] = b"\xfe\xff\0\xfe\xff\0"
    jpeg = bytearray(encoded(picture(), "JPEG"))
    at = re.search(rb"\xff\xc0\0\x11\x08", jpeg).end()  # type: ignore[union-attr]
    jpeg[at : at + 4] = struct.pack(">HH", 12000, 20000)
    for name, data in (
        ("limit.png", bomb(20000, 20000)),
        ("claim.png", bomb(20000, 10000)),
        ("huge.webp", bytes(huge_webp)),
        ("claim.jpg", bytes(jpeg)),
    ):
        (tmp_path / name).write_bytes(data)
    script = """
        import resource, sys
        from pathlib import Path
        from vaestream.images import load
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (128 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for path in sorted(Path(sys.argv[1]).iterdir()):
            print(path.name, type(load(path.read_bytes(), name=path.name)).__name__)
    """
    run = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    result = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert result.stdout.split("\n")[:-1] == [
        "claim.jpg Broken",
        "claim.png Broken",
        "huge.webp Kept",
        "limit.png Kept",
    ]


def test_pillows_own_limit_is_neither_used_nor_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [encoded(picture(size=(456, 257)), f) for f in ("JPEG", "PNG", "BMP", "PPM")]
    limited = {f: encoded(picture(size=(456, 257)), f) for f in ("TIFF", "WEBP")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda data: load(data, name="a"), sources * 5))
    assert all(isinstance(result, Photo) for result in results)
    for format, data in limited.items():  # whose readers in Pillow know no other
        large = load(data, name="a")
        assert isinstance(large, Kept)
        assert large.reason == f"more than the 80000 pixels that Pillow reads of {format}"
    assert Image.MAX_IMAGE_PIXELS == 40_000


# --- many files, where they are at hand


def consistent(data: bytes, name: str) -> Photo | Kept | Broken:
    """Load, and compare with what Pillow reads."""
    result = load(data, name=name)
    if isinstance(result, Photo):
        np.testing.assert_array_equal(result.pixels, upright(data), err_msg=name)
    return result


def test_odd_files(shared: Path) -> None:
    folder = shared / "photos" / "odd"
    # Pillow decodes these, and should not: a wrong checksum, damage in later frames, more pixels
    # than the bytes can hold.
    damaged = ("xcsn0g01", "id_000662", "id_000663", "id_003125", "Bad_unusual_extend")
    counts = {Photo: 0, Kept: 0, Broken: 0}
    with (folder / "SOURCES.tsv").open(newline="") as table, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in csv.DictReader(table, delimiter="\t"):
            path = folder / row["file"]
            if path.parent.name == "exif-orientation":
                continue
            result = consistent(path.read_bytes(), path.name)
            counts[type(result)] += 1
            status = row["pillow_status"]
            if "decodes" in status:
                assert not isinstance(result, Broken) or any(d in path.name for d in damaged), path
            elif "load error" in status:
                assert isinstance(result, Broken), (path, result)
            else:
                assert not isinstance(result, Photo), path
    assert min(counts.values()) > 50, counts


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_orientation_samples_are_the_same_picture(shared: Path, kind: str) -> None:
    def small(path: Path) -> np.ndarray:
        loaded = photo(path.read_bytes(), path.name)
        if loaded.exif is not None:
            orientation = to_image(loaded.pixels, exif=loaded.exif).getexif()
            assert orientation.get(ExifTags.Base.Orientation, 1) == 1
        return np.asarray(Image.fromarray(loaded.pixels).resize((60, 60)), np.float32)

    paths = sorted((shared / "photos" / "odd" / "exif-orientation").glob(f"{kind}_[1-8].jpg"))
    assert len(paths) == 8
    first = small(paths[0])
    for path in paths[1:]:
        assert np.abs(small(path) - first).mean() < 6, path  # each says its own number in writing


def test_camera_photos(shared: Path) -> None:
    folder = shared / "photos" / "camera"
    with (folder / "SOURCES.tsv").open(newline="") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            path = folder / row["file"]
            data = path.read_bytes()
            if float(row["mp"]) > 9:  # what the header tells
                result: Photo | Kept | Broken = load(data, name=path.name, max_pixels=9_000_000)
                assert isinstance(result, Kept)
                assert f"{result.width}x{result.height}" == row["size"]
                continue
            result = consistent(data, path.name)
            assert isinstance(result, Photo), (path, result)
            with Image.open(path) as image:
                assert (result.exif is None) == ("exif" not in image.info)
                assert (result.icc, result.xmp) == (
                    image.info.get("icc_profile"),
                    image.info.get("xmp"),
                )
