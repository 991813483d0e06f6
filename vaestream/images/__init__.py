"""Any file's bytes -> 8-bit pixels and what must survive with them, or why the source is kept.

`load` answers with one of three:

* `Photo`: 8-bit RGB or gray, upright, with EXIF, XMP and ICC profile. Coding the pixels and
  carrying the metadata keeps everything that this package promises to keep.
* `Kept`: nothing is wrong with the file, but something in it would be lost. So it stays as it is:
  alpha (opaque or not), more than 8 bits, CMYK, palette, 1 bit, floating point, animation, several
  pages or pictures (previews, too), gain maps, motion photos, extended XMP, IPTC without XMP, long
  text in a PNG (over 512 bytes), an ICC profile that is unreadable or for other channels, TIFF tags
  with no place in EXIF (GeoTIFF), fewer than 32 pixels on a side, more than `max_pixels`; and every
  file of a format that is not read here (HEIC, raw, video, sidecars).
* `Broken`: the bytes, or for want of a signature the name, claim a format that is read here, but
  they do not decode.

Left behind on purpose: JPEG comments, short notes in a PNG, density, Photoshop resources and
makers' private segments; gamma, chromaticities, background and time stamps of PNG; trailers of less
than 64 KiB.

EXIF is carried byte for byte, maker notes and thumbnail included, but for the orientation: pixels
are turned upright and the value is set to 1 in place, in EXIF and XMP. EXIF that cannot be parsed
is carried as it is too, and says nothing about orientation (but an AVIF decoder may refuse a file
for it: that one is broken).
"""

from vaestream.images.kept import decode_kept
from vaestream.images.pixels import to_8bit
from vaestream.images.reading import EMPTY_FILE, MIN_SIDE, Broken, Kept, Photo, load
from vaestream.images.writing import save, to_image

__all__ = [
    "EMPTY_FILE",
    "MIN_SIDE",
    "Broken",
    "Kept",
    "Photo",
    "decode_kept",
    "load",
    "save",
    "to_8bit",
    "to_image",
]
