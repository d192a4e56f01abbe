"""Takes the base64 of pictures out of a JSON body, so that it is parsed without megabytes, and puts it back as it came.

Each is replaced by a mark in the text, decoded, and handed to the media gate in the place of the mark. What is not
plainly the base64 of a picture part stays where it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar, cast

from qvl.media import base64_codec, sources
from qvl.media.base64_codec import Base64Picture
from qvl.pipeline.parse_parts import UnreadPicture

if TYPE_CHECKING:
    from qvl.media.picture import PictureSource

T = TypeVar("T")
# Characters of a mark, and of its number at the end.
_MARK: Final = 28
_NUMBER: Final = 4
LONG: Final = 16 * 1024
# Texts that are looked at: a body of more has long been read before they are all found.
MOST_TEXTS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Lifted:
    """A body with marks in the place of base64, and what stood there."""

    body: bytes
    key: str
    found: list[tuple[memoryview, bytes]] = field(default_factory=list)

    def mark(self, number: int) -> str:
        return f"{self.key}{number:04d}"

    def are_all_in(self, texts: Iterable[str]) -> bool:
        """True if every mark ends one of `texts`; none is anywhere else then, since each stands once in the body."""
        ends = {text[-_MARK:] for text in texts}
        return all(self.mark(number) in ends for number in range(len(self.found)))

    def put_back(self, picture: UnreadPicture) -> UnreadPicture:
        """Return the picture with what stood in the place of a mark at the end of its source."""
        if (number := self._marked(picture.source)) is None:
            return picture
        text, data = self.found[number]
        head = cast("str", picture.source)[:-_MARK]
        if head.endswith(",") and sources.is_base64(head[:-1]):
            own: object = Base64Picture(head[:-1], text, data)
        else:
            own = head + bytes(text).decode("ascii")
        return picture.with_source(cast("PictureSource", own), picture.pages)

    def written_out(self, value: T) -> T:
        """Return a JSON value with the base64 itself in its texts, as it was sent."""
        whole: object = value
        if isinstance(value, dict):
            whole = {name: self.written_out(item) for name, item in value.items()}
        elif isinstance(value, list):
            whole = [self.written_out(item) for item in value]
        elif isinstance(value, str) and (number := self._marked(value)) is not None:
            whole = value[:-_MARK] + bytes(self.found[number][0]).decode("ascii")
        return cast("T", whole)

    def _marked(self, text: object) -> int | None:
        """Return the number of the mark at the end of `text`; None if there is none."""
        return int(text[-_NUMBER:]) if isinstance(text, str) and text[-_MARK:-_NUMBER] == self.key else None


def lift(body: bytes, max_bytes: int) -> Lifted | None:
    """Return `body` without its long texts of strict base64 of at most `max_bytes`; None if there are none."""
    if len(body) <= LONG:
        return None
    found: list[tuple[memoryview, bytes]] = []
    pieces: list[bytes | memoryview] = []
    # Nobody can have written this in a text of theirs.
    key = os.urandom(12).hex()
    view = memoryview(body)
    done, start = 0, body.find(b'"')
    for _ in range(MOST_TEXTS):
        end = body.find(b'"', start + 1)
        if end < 0:
            break
        if end - start > LONG and (read := _read(body, view, start + 1, end, max_bytes)) is not None:
            at, data = read
            pieces += (view[done:at], f"{key}{len(found):04d}".encode())
            found.append((view[at:end], data))
            done = end
        start = end
    if not found:
        return None
    return Lifted(b"".join((*pieces, view[done:])), key, found)


def _read(body: bytes, view: memoryview, start: int, end: int, max_bytes: int) -> tuple[int, bytes] | None:
    """Return (index where the base64 of the text from `start` to `end` begins, its bytes); None if there is none."""
    # Behind the label of a data: URL, or all of it.
    at = body.find(b",", start, min(end, start + sources.MAX_LABEL)) + 1 or start
    if (end - at) * 3 // 4 > max_bytes:
        return None
    try:
        return at, base64_codec.decoded(view[at:end])
    except ValueError:
        return None
