"""Ten product silhouettes, each drawn in a box of side 1 with the origin at its top left corner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from PIL import ImageDraw

Rgb = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Pen:
    """Draws on a canvas in units of a square box, from 0 to 1; `left`, `top` and `side` are the box in pixels."""

    canvas: ImageDraw.ImageDraw
    left: float
    top: float
    side: float
    fill: Rgb
    line: Rgb
    shade: Rgb

    @property
    def stroke(self) -> int:
        """Outline width in pixels, at least one."""
        return max(1, round(self.side * 0.02))

    def _at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(self.left + x * self.side, self.top + y * self.side) for x, y in points]

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (left, top), (right, bottom) = self._at((x0, y0), (x1, y1))
        return left, top, right, bottom

    def polygon(self, *points: tuple[float, float], fill: Rgb | None = None) -> None:
        self.canvas.polygon(self._at(*points), fill=fill or self.fill, outline=self.line, width=self.stroke)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb | None = None) -> None:
        """Draw an outlined ellipse in the rectangle from (x0, y0) to (x1, y1), in units of the box."""
        self.canvas.ellipse(self._box(x0, y0, x1, y1), fill=fill or self.fill, outline=self.line, width=self.stroke)

    def block(self, x0: float, y0: float, x1: float, y1: float, round_: float = 0.04, fill: Rgb | None = None) -> None:
        """Draw an outlined rectangle from (x0, y0) to (x1, y1), rounded by `round_`; all in units of the box."""
        self.canvas.rounded_rectangle(
            self._box(x0, y0, x1, y1),
            radius=round_ * self.side,
            fill=fill or self.fill,
            outline=self.line,
            width=self.stroke,
        )

    def ring(self, x0: float, y0: float, x1: float, y1: float, start: int, end: int, width: float) -> None:
        """Draw an arc of `width` units from `start` to `end`, in degrees clockwise from three o'clock."""
        box, thick = self._box(x0, y0, x1, y1), max(2, round(width * self.side))
        self.canvas.arc(box, start, end, fill=self.line, width=thick + 2 * self.stroke)
        self.canvas.arc(self._box(x0 + 0.02, y0 + 0.02, x1 - 0.02, y1 - 0.02), start, end, fill=self.fill, width=thick)


def mug(pen: Pen) -> None:
    pen.ring(0.55, 0.32, 0.98, 0.74, -100, 100, 0.07)
    pen.block(0.1, 0.18, 0.74, 0.9, 0.08)
    pen.ellipse(0.1, 0.1, 0.74, 0.28, fill=pen.shade)


def shoe(pen: Pen) -> None:
    pen.polygon((0.05, 0.3), (0.36, 0.3), (0.52, 0.5), (0.86, 0.6), (0.97, 0.76), (0.05, 0.76))
    pen.block(0.03, 0.74, 0.98, 0.86, 0.05, fill=pen.shade)
    for step in range(3):
        x = 0.4 + step * 0.09
        pen.canvas.line(
            pen._at((x, 0.5 + step * 0.03), (x + 0.07, 0.4 + step * 0.05)), fill=pen.line, width=pen.stroke * 2
        )


def bottle(pen: Pen) -> None:
    pen.block(0.41, 0.02, 0.59, 0.14, 0.02, fill=pen.shade)
    pen.polygon(
        (0.43, 0.13), (0.57, 0.13), (0.57, 0.28), (0.7, 0.42), (0.7, 0.98), (0.3, 0.98), (0.3, 0.42), (0.43, 0.28)
    )
    pen.block(0.3, 0.56, 0.7, 0.76, 0.0, fill=pen.shade)


def shirt(pen: Pen) -> None:
    pen.polygon(
        (0.34, 0.12), (0.66, 0.12), (0.98, 0.3), (0.88, 0.5), (0.75, 0.43),
        (0.75, 0.92), (0.25, 0.92), (0.25, 0.43), (0.12, 0.5), (0.02, 0.3),
    )  # fmt: skip
    pen.ellipse(0.4, 0.05, 0.6, 0.22, fill=pen.shade)


def bag(pen: Pen) -> None:
    pen.ring(0.27, 0.04, 0.73, 0.66, 180, 360, 0.06)
    pen.polygon((0.12, 0.36), (0.88, 0.36), (0.97, 0.95), (0.03, 0.95))
    pen.block(0.42, 0.44, 0.58, 0.56, 0.02, fill=pen.shade)


def hat(pen: Pen) -> None:
    pen.ellipse(0.0, 0.62, 1.0, 0.88)
    pen.polygon((0.24, 0.74), (0.3, 0.22), (0.42, 0.16), (0.58, 0.16), (0.7, 0.22), (0.76, 0.74))
    pen.polygon((0.245, 0.72), (0.265, 0.56), (0.735, 0.56), (0.755, 0.72), fill=pen.shade)


def lamp(pen: Pen) -> None:
    pen.block(0.46, 0.45, 0.54, 0.9, 0.0, fill=pen.shade)
    pen.polygon((0.34, 0.06), (0.66, 0.06), (0.9, 0.5), (0.1, 0.5))
    pen.ellipse(0.26, 0.84, 0.74, 0.98)


def watch(pen: Pen) -> None:
    pen.block(0.36, 0.0, 0.64, 0.3, 0.03)
    pen.block(0.36, 0.7, 0.64, 1.0, 0.03)
    pen.ellipse(0.2, 0.2, 0.8, 0.8)
    pen.ellipse(0.3, 0.3, 0.7, 0.7, fill=pen.shade)
    pen.canvas.line(pen._at((0.5, 0.36), (0.5, 0.5), (0.6, 0.56)), fill=pen.line, width=pen.stroke * 2)


def chair(pen: Pen) -> None:
    pen.block(0.2, 0.02, 0.34, 0.98, 0.03)
    pen.block(0.72, 0.55, 0.84, 0.98, 0.03)
    pen.block(0.2, 0.48, 0.84, 0.62, 0.03)
    pen.block(0.34, 0.1, 0.4, 0.5, 0.0, fill=pen.shade)


def phone(pen: Pen) -> None:
    pen.block(0.26, 0.02, 0.74, 0.98, 0.08)
    pen.block(0.32, 0.12, 0.68, 0.8, 0.02, fill=pen.shade)
    pen.ellipse(0.45, 0.84, 0.55, 0.94, fill=pen.shade)


SHAPES: Final[dict[str, Callable[[Pen], None]]] = {
    draw.__name__: draw for draw in (mug, shoe, bottle, shirt, bag, hat, lamp, watch, chair, phone)
}
