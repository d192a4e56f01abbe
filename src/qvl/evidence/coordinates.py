"""The coordinates that a model writes, and the pixels of the original picture that they stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

from qvl.errors import ConfigError
from qvl.evidence.prompts import Convention
from qvl.evidence.shapes import DECIMALS, Box, Point
from qvl.media.smart_resize import smart_resize

if TYPE_CHECKING:
    from qvl.media.picture import Picture

CONVENTIONS: Final[tuple[Convention, ...]] = get_args(Convention)
THOUSAND: Final = 1000


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The coordinates that a model writes; for "pixels", with the limits of Qwen's smart_resize of its pictures.

    `assumed`: nothing tells the model's convention, so it is taken at the word of the prompt.
    """

    convention: Convention = "0-1000"
    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16384
    assumed: bool = False

    def scale(self, picture: Picture) -> tuple[float, float]:
        """Return the coordinates of the picture's lower right corner, as the model writes them."""
        if self.convention == "0-1000":
            return THOUSAND, THOUSAND
        least = 0 if picture.sized else self.min_pixels
        rows, columns = smart_resize(picture.height, picture.width, self.factor, least, self.max_pixels)
        return columns, rows


RELATIVE: Final = Coordinates("0-1000")
# The limits of Qwen2.5-VL's own image processor.
RESIZED: Final = Coordinates("pixels")
# Qwen2-VL and Qwen3-VL and later write thousandths; between them, Qwen2.5-VL wrote pixels.
_PIXELS: Final = re.compile(r"qwen[-_ ]?2[._-]?5[-_ ]?(vl|omni)", re.IGNORECASE)
_THOUSANDTHS: Final = re.compile(r"qwen|bundled|internvl", re.IGNORECASE)


def coordinates_of(model: str) -> Coordinates:
    """Return the coordinates that a model writes, by its name."""
    if _PIXELS.search(model):
        return RESIZED
    return RELATIVE if _THOUSANDTHS.search(model) else Coordinates(assumed=True)


def coordinates_named(convention: str) -> Coordinates:
    """Return the coordinates of a convention that a user names.

    Raises:
        ConfigError: no such convention.
    """
    for known in CONVENTIONS:
        if convention == known:
            return Coordinates(known)
    raise ConfigError(
        f"unknown box convention {str(convention)[:40]!r}",
        hint="0-1000, thousandths of the picture as Qwen3-VL writes, or pixels of the resized one as Qwen2.5-VL",
        param="box_convention",
    )


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of a request: its original size, and the coordinates of its lower right corner in the model's."""

    number: int
    width: int
    height: int
    right: float
    bottom: float
    relative: bool

    @classmethod
    def of(cls, number: int, picture: Picture, coordinates: Coordinates) -> Frame:
        relative = coordinates.convention == "0-1000"
        return cls(number, *picture.original, *coordinates.scale(picture), relative)

    def box(self, values: Sequence[float]) -> Box | None:
        """Return the box of the model's (x1, y1, x2, y2), corners in any order; None if it is off the picture.

        What reaches beyond the picture is cut off at its edges, and the box is `clipped`.
        """
        if len(values) != 4 or not all(map(math.isfinite, values)):
            return None
        x1, x2 = sorted((values[0], values[2]))
        y1, y2 = sorted((values[1], values[3]))
        (left, beyond_left), (right, beyond_right) = self._across(x1), self._across(x2)
        (top, beyond_top), (bottom, beyond_bottom) = self._down(y1), self._down(y2)
        if left >= right or top >= bottom:
            return None
        clipped = beyond_left or beyond_right or beyond_top or beyond_bottom
        return Box(left, top, right, bottom, self.width, self.height, self.number, clipped)

    def point(self, values: Sequence[float]) -> Point | None:
        """Return the point of the model's (x, y); None if it is not on the picture."""
        if len(values) != 2 or not all(map(math.isfinite, values)):
            return None
        (x, beyond_x), (y, beyond_y) = self._across(values[0]), self._down(values[1])
        return None if beyond_x or beyond_y else Point(x, y, self.width, self.height, self.number)

    def _across(self, value: float) -> tuple[float, bool]:
        return _placed(value, self.right, self.width)

    def _down(self, value: float) -> tuple[float, bool]:
        return _placed(value, self.bottom, self.height)


def _placed(value: float, end: float, size: int) -> tuple[float, bool]:
    """Return (pixels of the original, whether they had to be moved to an edge)."""
    pixels = round(value * size / end, DECIMALS)
    inside = min(max(pixels, 0.0), float(size))
    return inside, inside != pixels
