"""The overlay of a result that has places on its pictures: `overlay()` as PNG, `overlay_svg()` as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvl.errors import ConfigError
from qvl.evidence.marks import marks_of

if TYPE_CHECKING:
    from qvl.evidence.shapes import Located
    from qvl.media.picture import Picture


class Overlaid:
    """A result with pictures, and things located on them."""

    __slots__ = ()

    def _places(self) -> tuple[Sequence[Picture], Sequence[Located]]:
        """Return the pictures, and what is located on them."""
        raise NotImplementedError

    def overlay(self, picture: int = 0) -> bytes:
        """Return a PNG of a picture (by its number, from 0) with everything located on it drawn and labelled.

        It has the size that the model was given, a small picture being enlarged.

        Raises:
            ConfigError: there is no such picture, or the result has let its pictures go.
            MediaError: the picture cannot be decoded.
        """
        from qvl.evidence.overlay_png import overlay_png

        shown, located = self._shown(picture)
        return overlay_png(shown, marks_of(located, picture))

    def overlay_svg(self, picture: int = 0) -> str:
        """Return the overlay as SVG, in pixels of the original, with the picture inside it.

        Raises:
            ConfigError: there is no such picture, or the result has let its pictures go.
            MediaError: the picture cannot be decoded.
        """
        from qvl.evidence.overlay_svg import overlay_svg

        shown, located = self._shown(picture)
        return overlay_svg(shown, marks_of(located, picture))

    def _shown(self, number: int) -> tuple[Picture, Sequence[Located]]:
        pictures, located = self._places()
        if not pictures:
            raise ConfigError("the result has let its pictures go", hint="map(…, keep_pictures=True) keeps them")
        if not 0 <= number < len(pictures):
            raise ConfigError(f"there is no picture {number}", hint=f"0 to {len(pictures) - 1}", param="picture")
        return pictures[number], located
