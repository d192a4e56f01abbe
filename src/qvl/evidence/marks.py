"""What an overlay draws: a mark for everything located on a picture, its label's words, place and colour."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from qvl.evidence.shapes import Box, Located, Point

# Bright ones, each with black words on it and a black edge around, so that they stand out from any picture; told apart
# by people who see few colours.
COLOURS: Final = ("#ffd400", "#56c8ff", "#ff8ad8", "#4dff88", "#ff9a3d", "#b9a5ff", "#ffffff", "#ff7b7b")
INK: Final = "#000000"
LONGEST: Final = 48
Edges: TypeAlias = tuple[float, float, float, float]
"""Left, upper, right and lower edge."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A box or point to draw, with the words of its label and its colour, `#rrggbb`."""

    shape: Box | Point
    words: str
    colour: str


class LabelPlaces:
    """The places of labels on a picture of `size`, in whatever unit: each where there is no other yet.

    `gap` is left between a mark and its label.
    """

    def __init__(self, size: tuple[float, float], gap: float) -> None:
        self._size, self._gap = size, gap
        self._taken: list[Edges] = []

    def take(self, mark: Edges, width: float, height: float) -> tuple[float, float]:
        """Return the upper left corner for a label of `width` x `height`: above, below or inside its mark."""
        x1, y1, x2, y2 = mark
        gap = self._gap
        above, below, inside, foot = y1 - height - gap, y2 + gap, y1 + gap, y2 - height - gap
        spots = [(x1, above), (x1, below), (x1 + gap, inside), (x2 - width, above), (x2 - width - gap, inside)]
        spots += [(x1 + gap, foot), (x2 - width - gap, foot)]
        spots += [(x1, below + step * (height + gap)) for step in range(1, 8)]
        fitting = [(self._within(x, width, 0), self._within(y, height, 1), y) for x, y in spots]
        free = [(x, y) for x, y, wanted in fitting if y == wanted and not self._covers(x, y, width, height)]
        x, y = free[0] if free else fitting[2][:2]
        self._taken.append((x, y, x + width, y + height))
        return x, y

    def _within(self, at: float, length: float, axis: int) -> float:
        return max(0.0, min(at, self._size[axis] - length - min(1.0, self._gap)))

    def _covers(self, x: float, y: float, width: float, height: float) -> bool:
        return any(
            x < right and left < x + width and y < bottom and top < y + height
            for left, top, right, bottom in self._taken
        )


def marks_of(located: Iterable[Located], picture: int) -> list[Mark]:
    """Return the marks on the picture of this number, from 0; equal labels have one colour."""
    colours: dict[str, str] = {}
    marks = []
    for item in located:
        colour = colours.setdefault(item.label, COLOURS[len(colours) % len(COLOURS)])
        if item.shape.picture == picture:
            marks.append(Mark(item.shape, _words(item), colour))
    return marks


def printable(label: str) -> str:
    """Return a label without control characters, which would be drawn as boxes and are no XML."""
    return " ".join("".join(char if char.isprintable() else " " for char in label).split())


def _words(item: Located) -> str:
    label = printable(item.label)
    label = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
    return label if item.confidence is None else f"{label} {item.confidence:.0%}"
