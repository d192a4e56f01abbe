"""The result of `locate()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qvl.evidence.overlay import Overlaid
from qvl.evidence.shapes import Located
from qvl.types import JsonObject, Result

if TYPE_CHECKING:
    from qvl.media.picture import Picture


class Locations(Overlaid, list[Located]):
    """The targets that were located, in their order; empty if none was. `result` has notes, cache state and times.

    `result.notes` tell what the model wrote and was left out or cut: a box outside of the picture, a label nobody
    asked for.
    """

    def __init__(self, located: Iterable[Located], result: Result) -> None:
        super().__init__(located)
        self.result = result

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.result.pictures

    def _places(self) -> tuple[Sequence[Picture], Sequence[Located]]:
        return self.pictures, self

    def _repr_html_(self) -> str:
        from qvl.html.overlays import located_html

        return located_html(self.pictures, self, self.result.facts, self.result.notes)

    def to_json(self) -> JsonObject:
        """Return label, box or point, and confidence of each as JSON values, with the picture's size and the notes."""
        located = [item.to_json() for item in self]
        return {"located": located, **size_of(self.pictures), "notes": list(self.result.notes)}


def size_of(pictures: Sequence[Picture]) -> dict[str, int]:
    """Return `width` and `height` of a single picture's original in pixels; nothing of several, or none."""
    if len(pictures) != 1:
        return {}
    width, height = pictures[0].original
    return {"width": width, "height": height}
