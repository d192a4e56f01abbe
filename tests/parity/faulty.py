"""A command of qvl whose gate reads pictures wrongly: `python -m tests.parity.faulty exif,alpha qvl.cli.serve …`."""

from __future__ import annotations

import runpy
import sys

from PIL import Image

from qvl.media import image_header, pixels


def on_black(image: Image.Image) -> Image.Image:
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "black"), whole).convert("RGB")


def plant(faults: str) -> None:
    if "exif" in faults:
        image_header.exif_orientation = pixels.exif_orientation = lambda block: 1
        pixels._image_orientation = lambda image: 1
    if "alpha" in faults:
        pixels._on_white = on_black


if __name__ == "__main__":
    plant(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
