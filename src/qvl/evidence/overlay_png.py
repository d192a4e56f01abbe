"""An overlay as PNG: the picture's pixels with its marks drawn on them."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw, ImageFont

from qvl.evidence.marks import INK, Edges, LabelPlaces, Mark
from qvl.evidence.shapes import Box

if TYPE_CHECKING:
    from qvl.media.picture import Picture

    _Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Of the shorter side: a smaller picture is enlarged, so that labels fit on it.
LEAST_EDGE: Final = 320
MOST_ENLARGED: Final = 16
# Where the font that comes with Pillow has no glyph, as for Chinese: those of usual systems, if one is there.
_OTHER_FONTS: Final = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallback.ttf",
    "msyh.ttc", "simhei.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf",
)  # fmt: skip


def overlay_png(picture: Picture, marks: Sequence[Mark]) -> bytes:
    """Return a PNG of the canonical picture (enlarged where it is small) with the marks drawn on it."""
    image = picture.rgb()
    enlarged = min(MOST_ENLARGED, max(1, -(-LEAST_EDGE // min(image.size))))
    if enlarged > 1 and max(image.size) * enlarged <= 4096:
        image = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.LANCZOS)
    _Drawing(image, picture.original).draw(marks)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class _Drawing:
    """Draws on an image whose original has the size `original`."""

    def __init__(self, image: Image.Image, original: tuple[int, int]) -> None:
        self._size = image.size
        self._across, self._down = image.width / original[0], image.height / original[1]
        self._draw = ImageDraw.Draw(image)
        self._line = max(2, round(min(image.size) / 220))
        self._text = max(14, round(min(image.size) / 28))
        self._places = LabelPlaces(self._size, self._line)

    def draw(self, marks: Sequence[Mark]) -> None:
        # Labels last, so that no line crosses one.
        for mark in marks:
            self._outline(mark)
        for number, mark in enumerate(marks, start=1):
            self._label(mark, number)

    def _outline(self, mark: Mark) -> None:
        """A black line around a coloured one, so that it is seen on light and dark alike."""
        x1, y1, x2, y2 = self._edges(mark)
        shape = self._draw.rectangle if isinstance(mark.shape, Box) else self._draw.ellipse
        halo = max(1, self._line // 2)
        shape((x1 - halo, y1 - halo, x2 + halo, y2 + halo), outline=INK, width=self._line + 2 * halo)
        shape((x1, y1, x2, y2), outline=mark.colour, width=self._line)

    def _edges(self, mark: Mark) -> Edges:
        shape = mark.shape
        if isinstance(shape, Box):
            x1, y1 = round(shape.x1 * self._across), round(shape.y1 * self._down)
            # Of the last pixel inside; a box of less than a pixel is one.
            return x1, y1, max(x1, round(shape.x2 * self._across) - 1), max(y1, round(shape.y2 * self._down) - 1)
        x, y, radius = shape.x * self._across, shape.y * self._down, 3 * self._line
        return x - radius, y - radius, x + radius, y + radius

    def _label(self, mark: Mark, number: int) -> None:
        font, words = _font_for(mark.words, number, self._text)
        edge = self._text // 4
        left, top, right, bottom = self._draw.textbbox((0, 0), words, font=font)
        width, height = right - left + 2 * edge, bottom - top + 2 * edge
        x, y = self._places.take(self._edges(mark), width, height)
        self._draw.rectangle((x - 1, y - 1, x + width + 1, y + height + 1), fill=INK)
        self._draw.rectangle((x, y, x + width, y + height), fill=mark.colour)
        self._draw.text((x + edge - left, y + edge - top), words, fill=INK, font=font)


def _font_for(words: str, number: int, size: int) -> tuple[_Font, str]:
    """Return a font that has every character of `words`; where there is none, the mark's number for words."""
    for font in _fonts(size):
        if _has(font, words):
            return font, words
    share = words.rpartition(" ")[2]
    return _fonts(size)[0], f"{number} {share}" if share.endswith("%") else str(number)


@functools.lru_cache(maxsize=16)
def _fonts(size: int) -> tuple[_Font, ...]:
    fonts: list[_Font] = [ImageFont.load_default(size)]
    for name in _OTHER_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(fonts)


def _has(font: _Font, words: str) -> bool:
    absent = bytes(font.getmask("\U0010ffff"))
    return all(bytes(font.getmask(char)) != absent for char in set(words) if not char.isspace())
