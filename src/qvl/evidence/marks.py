"""What an overlay draws: a mark for everything located on a picture, its label's words and its colour."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from qvl.evidence.shapes import Box, Located, Point

# Bright ones, each with black words on it and a black edge around, so that they stand out from any picture; told apart
# by people who see few colours.
COLOURS: Final = ("#ffd400", "#56c8ff", "#ff8ad8", "#4dff88", "#ff9a3d", "#b9a5ff", "#ffffff", "#ff7b7b")
INK: Final = "#000000"
LONGEST: Final = 48


@dataclass(frozen=True, slots=True)
class Mark:
    """A box or point to draw, with the words of its label and its colour, `#rrggbb`."""

    shape: Box | Point
    words: str
    colour: str


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
