"""Pictures as cameras and designers store them, and as right and wrong readers see them: probes of endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.parity.variants import on_colour

if TYPE_CHECKING:
    from PIL import Image

_ORIENTATION: Final = 0x0112
_TURNED: Final = 6


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture as it is stored; `right` is how it must be seen, `wrong` are the readings that are known to happen.

    `wrong` is by what they do, in words that follow "it is read".
    """

    stored: Image.Image
    right: Image.Image
    wrong: Mapping[str, Image.Image]


def sample() -> Image.Image:
    """Return an upright test picture that is not rotationally symmetric: a product with a printed brand."""
    from qvl.tiny.render import DrawnProduct, draw

    return draw(DrawnProduct("ZELPHO", "mug", "blue", 1), seed=11, size=(448, 320))


def turned_picture() -> StoredPicture:
    """Return the sample lying on its side, with the EXIF orientation that tells so."""
    from PIL import Image

    upright = sample()
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    stored = lying.copy()
    stored.getexif()[_ORIENTATION] = _TURNED
    return StoredPicture(stored, upright, {"without its EXIF orientation": lying})


def transparent_picture() -> StoredPicture:
    """Return the sample with its upper half transparent, the colours still there."""
    from PIL import Image

    hidden = sample()
    mask = Image.new("L", hidden.size, 255)
    mask.paste(0, (0, 0, hidden.width, hidden.height // 2))
    stored = hidden.convert("RGBA")
    stored.putalpha(mask)
    wrong = {"with its alpha laid on black": on_colour(stored, 0), "with its alpha dropped": hidden}
    return StoredPicture(stored, on_colour(stored, 255), wrong)
