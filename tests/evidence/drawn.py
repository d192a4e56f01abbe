"""Pictures with one white rectangle, in every orientation, and the eye that finds it again to a fraction of a pixel."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from qvl.media.image_header import ORIENTATION_TAG

# What undoes each EXIF orientation: the stored picture is the upright one, turned by the inverse.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
Edges = tuple[float, float, float, float]


def drawn(size: tuple[int, int], edges: tuple[int, int, int, int], orientation: int, form: str) -> bytes:
    """An upright picture of `size` with a rectangle at `edges` (x1, y1, x2, y2), stored turned by `orientation`."""
    upright = Image.new("RGB", size)
    x1, y1, x2, y2 = edges
    ImageDraw.Draw(upright).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    stored = upright.transpose(_STORED[orientation]) if orientation in _STORED else upright
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    out = io.BytesIO()
    stored.save(out, form, exif=exif, **({"quality": 98, "subsampling": 0} if form == "JPEG" else {}))
    return out.getvalue()


def seen(pixels: NDArray[np.uint8]) -> Edges:
    """The edges of the rectangle on a picture [height, width, 3], in its pixels: by the sums and centres of light."""
    light = pixels.astype(np.float64).mean(axis=2) / 255
    light[light < 0.04] = 0
    ends = []
    for axis in (0, 1):
        profile = light.max(axis=axis)
        length = profile.sum()
        middle = (profile * (np.arange(len(profile)) + 0.5)).sum() / length
        ends.append((middle - length / 2, middle + length / 2))
    (x1, x2), (y1, y2) = ends
    return float(x1), float(y1), float(x2), float(y2)
