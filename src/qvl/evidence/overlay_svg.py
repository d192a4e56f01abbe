"""An overlay as SVG: the picture with its marks, for pages and notebooks."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Protocol

from qvl.evidence.marks import INK, Edges, LabelPlaces, Mark
from qvl.evidence.shapes import Box

if TYPE_CHECKING:
    from qvl.types import JsonMapping


class Embedded(Protocol):
    """A picture that can be written into a page."""

    @property
    def original(self) -> tuple[int, int]: ...
    @property
    def source(self) -> str: ...
    def data_url(self) -> str: ...


def overlay_svg(picture: Embedded, marks: Sequence[Mark], *, shown: int | None = None) -> str:
    """Return `<svg>` with the picture inside and the marks on it, in pixels of the original.

    Args:
        shown: pixels of the longer side on the page, for labels of a readable size; None leaves it to the viewer.
    """
    width, height = picture.original
    unit = max(width, height) / (shown or 640)
    size = {} if shown is None else {"width": round(width / unit), "height": round(height / unit)}
    head = _tag(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            **size,
            "role": "img",
            "aria-label": f"{picture.source}: {', '.join(mark.words for mark in marks) or 'nothing located'}",
            "font-family": "system-ui, sans-serif",
            "font-size": _number(13 * unit),
        },
    )
    image = _tag(
        "image",
        {"href": picture.data_url(), "width": width, "height": height, "preserveAspectRatio": "none"},
        closed=True,
    )
    shapes = "".join(_shape(mark, unit) for mark in marks)
    places = LabelPlaces((width, height), 2 * unit)
    labels = "".join(_label(mark, unit, places) for mark in marks)
    return f"{head}{image}{shapes}{labels}</svg>"


def _shape(mark: Mark, unit: float) -> str:
    shape = mark.shape
    if isinstance(shape, Box):
        place: JsonMapping = {
            "x": _number(shape.x1),
            "y": _number(shape.y1),
            "width": _number(shape.x2 - shape.x1),
            "height": _number(shape.y2 - shape.y1),
        }
        return _twice("rect", place, mark, unit)
    return _twice("circle", {"cx": _number(shape.x), "cy": _number(shape.y), "r": _number(6 * unit)}, mark, unit)


def _twice(name: str, place: JsonMapping, mark: Mark, unit: float) -> str:
    """A black line below a coloured one, so that it is seen on light and dark alike."""
    lines = ((INK, 5.0), (mark.colour, 2.5))
    return "".join(
        _tag(name, {**place, "fill": "none", "stroke": colour, "stroke-width": _number(width * unit)}, closed=True)
        for colour, width in lines
    )


def _label(mark: Mark, unit: float, places: LabelPlaces) -> str:
    wide = sum(1.0 if unicodedata.east_asian_width(char) in "WF" else 0.62 for char in mark.words)
    across, down = (wide * 13 + 8) * unit, 18 * unit
    shape = mark.shape
    if isinstance(shape, Box):
        edges: Edges = (shape.x1, shape.y1, shape.x2, shape.y2)
    else:
        edges = (shape.x - 6 * unit, shape.y - 6 * unit, shape.x + 6 * unit, shape.y + 6 * unit)
    left, top = places.take(edges, across, down)
    plate = {"x": _number(left), "y": _number(top), "width": _number(across), "height": _number(down)}
    # Spread over the plate, whatever the viewer's font is.
    words = {
        "x": _number(left + 4 * unit),
        "y": _number(top + 13.5 * unit),
        "fill": INK,
        "textLength": _number(across - 8 * unit),
        "lengthAdjust": "spacingAndGlyphs",
    }
    return (
        f"{_tag('rect', {**plate, 'fill': mark.colour}, closed=True)}{_tag('text', words)}{escape(mark.words)}</text>"
    )


def _tag(name: str, fields: JsonMapping, *, closed: bool = False) -> str:
    told = "".join(f' {key}="{escape(str(value))}"' for key, value in fields.items())
    return f"<{name}{told}{'/' if closed else ''}>"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
