"""Makes the encoded pictures under fixtures/ and pins the canonical pixels of each in pinned.json.

Run once with `python tests/media/make_fixtures.py`; the files are committed, since encoders differ between builds of
Pillow while decoders must not. `--pin` writes pinned.json anew from the files that are there.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from qvl import media

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
PINNED = HERE / "pinned.json"
TURNED = {  # what undoes the viewer's turn, so that every file shows the same upright picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def drawing(width: int = 48, height: int = 32) -> Image.Image:
    """A picture without any symmetry: four quarters of different colour over a slope."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.where(x < width // 2, 220, 40)
    pixels[..., 1] = np.where(y < height // 2, 200, 30)
    pixels[..., 2] = (x * 255) // (width - 1)
    return Image.fromarray(pixels)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for what Pillow does not write. `rows` are unfiltered lines, each with its leading zero."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [chunk(kind, body) for kind, body in chunks if kind != b"eXIf"]
    parts.append(chunk(b"IDAT", zlib.compress(rows, 9)))
    parts += [chunk(kind, body) for kind, body in chunks if kind == b"eXIf"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def lines(values: np.ndarray) -> bytes:
    return b"".join(b"\x00" + row.tobytes() for row in values)


def make() -> None:
    FIXTURES.mkdir(exist_ok=True)
    rgb = drawing()
    grey16 = (np.asarray(rgb)[..., 2].astype(np.uint16) << 8) | 0x7F
    alpha = Image.fromarray(np.linspace(0, 255, 48).astype(np.uint8)[None, :].repeat(32, 0))
    rgba = rgb.copy()
    rgba.putalpha(alpha)

    for orientation, turn in TURNED.items():
        turned = rgb if turn is None else rgb.transpose(turn)
        turned.save(FIXTURES / f"exif_{orientation}.jpg", quality=95, subsampling=0, exif=exif(orientation))
        turned.save(FIXTURES / f"exif_{orientation}.png", exif=exif(orientation))
    turned = rgb.transpose(TURNED[6])
    turned.save(FIXTURES / "exif_6.webp", lossless=True, exif=exif(6))
    turned.save(FIXTURES / "exif_6.tif", tiffinfo={0x0112: 6})
    pixels = np.asarray(turned)
    behind = png(32, 48, 8, 2, lines(pixels.reshape(48, -1)), (b"eXIf", exif(6).removeprefix(b"Exif\x00\x00")))
    (FIXTURES / "exif_6_behind_pixels.png").write_bytes(behind)

    rgb.save(FIXTURES / "plain.png")
    rgb.save(FIXTURES / "plain.jpg", quality=90)
    rgb.save(FIXTURES / "progressive.jpg", quality=90, progressive=True)
    rgb.save(FIXTURES / "lossy.webp", quality=80)
    rgb.save(FIXTURES / "lossless.webp", lossless=True)
    rgb.save(FIXTURES / "plain.bmp")
    rgb.save(FIXTURES / "plain.tif", compression="tiff_lzw")
    rgb.save(FIXTURES / "plain.gif")
    rgb.save(FIXTURES / "plain.avif", quality=90)
    rgb.convert("CMYK").save(FIXTURES / "cmyk.jpg", quality=95)
    rgb.convert("L").save(FIXTURES / "grey.jpg", quality=90)
    rgb.convert("L").save(FIXTURES / "grey.png")
    rgb.convert("1").save(FIXTURES / "bilevel.png")
    rgb.quantize(16).save(FIXTURES / "palette.png")
    rgb.save(FIXTURES / "two_in_one.jpg", "MPO", quality=90, save_all=True, append_images=[rgb.rotate(180)])
    rgb.save(FIXTURES / "pages.tif", save_all=True, append_images=[rgb.rotate(180)])

    hidden = np.asarray(rgba).copy()
    hidden[:16, :, 3] = 0  # loud colour where nothing is to be seen
    Image.fromarray(hidden).save(FIXTURES / "rgba_hidden.png")
    rgba.save(FIXTURES / "rgba.webp", lossless=True)
    rgba.save(FIXTURES / "rgba.avif", quality=90)
    rgba.convert("LA").save(FIXTURES / "la.png")
    rgb.quantize(16).save(FIXTURES / "palette_one_transparent.png", transparency=0)
    rgb.quantize(16).save(FIXTURES / "palette_alpha.png", transparency=bytes(range(0, 256, 16)))
    rgb.save(FIXTURES / "rgb_transparent_colour.png", transparency=(220, 200, 0))
    rgb.quantize(16).save(FIXTURES / "transparent.gif", transparency=0)

    Image.fromarray(grey16).save(FIXTURES / "grey16.png")
    Image.fromarray(grey16).save(FIXTURES / "grey16.tif")
    big_endian = lines(grey16.astype(">u2"))
    key = struct.pack(">H", int(grey16[0, 0]))
    (FIXTURES / "grey16_transparent.png").write_bytes(png(48, 32, 16, 0, big_endian, (b"tRNS", key)))
    grey2 = np.tile(np.array([0b00011011], np.uint8), (4, 2))
    (FIXTURES / "grey2_transparent.png").write_bytes(png(8, 4, 2, 0, lines(grey2), (b"tRNS", b"\x00\x01")))
    rgb16 = (np.asarray(rgb).astype(">u2") << 8) + 0x12
    rows = lines(rgb16.astype(">u2").reshape(32, -1))
    (FIXTURES / "rgb16.png").write_bytes(png(48, 32, 16, 2, rows))
    key = struct.pack(">HHH", *(int(level) for level in rgb16[0, 0]))
    (FIXTURES / "rgb16_transparent.png").write_bytes(png(48, 32, 16, 2, rows, (b"tRNS", key)))

    frames = [rgb.rotate(180), rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    rgb.save(FIXTURES / "animated.webp", save_all=True, append_images=frames, lossless=True)
    rgb.save(FIXTURES / "animated.png", save_all=True, append_images=frames)
    rgb.save(FIXTURES / "animated.gif", save_all=True, append_images=frames)


def pin() -> None:
    table = {}
    for path in sorted(FIXTURES.iterdir()):
        picture = media.load(path)
        table[path.name] = {
            "size": [picture.width, picture.height],
            "untouched": picture.untouched,
            "pixels": hashlib.sha256(picture.rgb().tobytes()).hexdigest(),
        }
    PINNED.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    if "--pin" not in sys.argv:
        make()
    pin()
