"""Document, the result of the media gate for a PDF: the pages that are shown, as Pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvl.media.picture import Picture


@dataclass(frozen=True, slots=True)
class Document:
    """A document that passed the media gate. Equal if the source and the pages are equal.

    Args:
        sha256: `sha256:` and the hex digest of the source bytes.
        pages: what is shown of it, rendered on first use; their `original` size is that at the policy's resolution.
        numbers: of these pages, from 1.
        count: how many pages the whole document has.
        source: short display name, as of a Picture; that of a page ends with `#page=2`.
    """

    sha256: str
    pages: tuple[Picture, ...] = field(repr=False)
    numbers: tuple[int, ...]
    count: int = field(compare=False)
    source: str = field(compare=False)

    @property
    def num_pixels(self) -> int:
        """Pixels of all shown pages together, as a model gets them."""
        return sum(page.width * page.height for page in self.pages)
