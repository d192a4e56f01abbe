"""Takes the base64 of pictures out of a JSON body, so that it is parsed without megabytes, and puts it back as it came.

Each is replaced by a mark in the text, decoded, and handed to the media gate in the place of the mark. What is not
plainly the base64 of a picture part stays where it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar, cast

from qvl.media import base64_codec, sources
from qvl.media.base64_codec import Base64Picture
from qvl.pipeline.parse_parts import UnreadPicture

if TYPE_CHECKING:
    from qvl.media.picture import PictureSource

T = TypeVar("T")
# Nobody knows it who could write it in a text of theirs. The same for all bodies, so that equal questions about other
# pictures are equal bodies.
_KEY: Final = os.urandom(12).hex()
# Characters of a mark: the key, and the number of the picture.
_MARK: Final = 28
# Shorter texts of base64 are seldom pictures, and read soon enough where they are.
SHORTEST: Final = 1024
# Hardly anything else is as long, such as signatures of thoughts.
LONG: Final = 16 * 1024
# A body in which the search takes more is one of many short texts, and reading them takes longer than base64 does.
MOST_STEPS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Lifted:
    """A body with marks in the place of base64, and by its mark what stood there: the base64 and its bytes."""

    body: bytes
    found: dict[str, tuple[memoryview, bytes]]

    def are_all_in(self, texts: Iterable[str]) -> bool:
        """True if every mark ends one of `texts`; none is anywhere else then.

        Each stands once in the body, as long as nobody else knows the key.
        """
        return self.found.keys() <= {text[-_MARK:] for text in texts}

    def put_back(self, picture: UnreadPicture) -> UnreadPicture:
        """Return the picture with what stood in the place of a mark at the end of its source."""
        source = picture.source
        if not isinstance(source, str) or (stood := self.found.get(source[-_MARK:])) is None:
            return picture
        (text, data), head = stood, source[:-_MARK]
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
        elif isinstance(value, str) and (stood := self.found.get(value[-_MARK:])) is not None:
            whole = value[:-_MARK] + bytes(stood[0]).decode("ascii")
        return cast("T", whole)


def lift(body: bytes, max_bytes: int, least: int = SHORTEST) -> Lifted | None:
    """Return `body` without its texts of strict base64 of at most `max_bytes`; None if there are none.

    Texts shorter than `least` are left where they are.
    """
    if len(body) <= least:
        return None
    found: dict[str, tuple[memoryview, bytes]] = {}
    pieces: list[bytes | memoryview] = []
    view = memoryview(body)
    done, start = 0, body.find(b'"')
    for _ in range(MOST_STEPS):
        # A long text has no quotation mark near its beginning.
        if (nearer := body.rfind(b'"', start + 1, start + least)) >= 0:
            start = nearer
            continue
        end = body.find(b'"', start + least)
        if end < 0:
            break
        if (read := _read(body, view, start + 1, end, max_bytes)) is not None:
            at, data = read
            mark = f"{_KEY}{len(found):04d}"
            pieces += (view[done:at], mark.encode())
            found[mark] = view[at:end], data
            done = end
        start = end
    if not found:
        return None
    return Lifted(b"".join((*pieces, view[done:])), found)


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
