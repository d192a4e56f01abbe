"""The cards of results that have places on their pictures: the picture with its marks beside the values."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from qvl.errors import QvlError
from qvl.evidence.marks import marks_of, printable
from qvl.evidence.overlay_svg import overlay_svg
from qvl.html.cards import card_html, table_html, thumbnail_html

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qvl.evidence.shapes import Located
    from qvl.html.cards import ShownPicture

# The longer side of a picture with marks, in pixels of the page.
OVERLAY: Final = 448


def fields_html(
    pictures: Sequence[ShownPicture],
    fields: Iterable[tuple[str, str, float | None]],
    facts: str = "",
    located: Sequence[Located] = (),
) -> str:
    """Return a card: pictures with what is `located` on them, a table of (label, value, confidence), and `facts`."""
    table = table_html((label, f"{value}  {_percent(sure)}") for label, value, sure in fields)
    return card_html(pictures_html(pictures, located), table, facts)


def located_html(pictures: Sequence[ShownPicture], located: Sequence[Located], facts: str, notes: Iterable[str]) -> str:
    """Return a card: pictures with what is `located` on them beside a table of it, `facts` and `notes`."""
    content = places_html(located)
    content += "".join(f"<p>{escape(note)}</p>" for note in notes)
    return card_html(pictures_html(pictures, located), content, facts)


def places_html(located: Sequence[Located]) -> str:
    """Return a table of labels, places and confidences."""
    rows = [(printable(item.label), f"{place_of(item)}  {_percent(item.confidence)}") for item in located]
    return table_html(rows) if rows else "<p>nothing located</p>"


def place_of(item: Located) -> str:
    """Return the pixels of a box or point in a few characters: "120, 40 – 300, 90"."""
    shape = item.shape
    numbers = [f"{getattr(shape, name):.0f}" for name in shape.names]
    return " – ".join(", ".join(numbers[at : at + 2]) for at in range(0, len(numbers), 2))


def pictures_html(pictures: Sequence[ShownPicture], located: Sequence[Located]) -> str:
    """Return the pictures as thumbnails; with marks, and larger, where something is located."""
    images = []
    for number, picture in enumerate(pictures):
        marks = marks_of(located, number)
        if not marks:
            images.append(thumbnail_html(picture))
            continue
        try:
            images.append(overlay_svg(picture.thumbnail(2 * OVERLAY), marks, shown=OVERLAY))
        except QvlError as exc:
            images.append(f"<span>{escape(exc.message)}</span>")
    return "".join(images)


def _percent(confidence: float | None) -> str:
    return "" if confidence is None else f"({confidence:.0%})"
