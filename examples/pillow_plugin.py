"""A picture to a bitstream and back by Pillow: python examples/pillow_plugin.py PICTURE OUT.vst"""

import sys

from PIL import Image

import vaestream.connectors.pillow  # registers the format

if __name__ == "__main__":
    picture, out = sys.argv[1:]
    Image.open(picture).convert("RGB").save(out, quality=60)
    with Image.open(out) as image:
        print(vaestream.connectors.pillow.FORMAT, image.size, image.info["quality"])
        image.thumbnail((256, 256))  # decodes no more than it needs
        image.save(out + ".thumbnail.png")
