"""Checks of a request body before JSON parsing: decompression, UTF-8, and limits so that parsing blocks nobody."""

from __future__ import annotations

import asyncio
import codecs
import re
import zlib
from typing import TYPE_CHECKING, Final, Protocol

from qvl.media import inflate
from qvl.server.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import Callable


class BodyReader(Protocol):
    """Reads the body of a request past ASGI's `receive`."""

    def whole(self) -> bytes | None:
        """Return the body if all of it has come; None, taking nothing, if it has not."""

    async def read(self, length: int, came: Callable[[int], None], due: Callable[[], float]) -> bytes:
        """Return the body, of `length` bytes, as it comes; `came(size)` is called for each piece.

        Raises:
            TimeoutError: it has not come by the loop's time `due()`, which is later the more came.
        """


# The name of the ASGI extension in which a server has a `reader` (a BodyReader).
READ_BODY: Final = "qvl.body"
# Media types of a body that is a picture or a document itself.
OF_MEDIA: Final = (b"image/", b"application/pdf")
SMALL_BODY: Final = 64 * 1024
# Reading and checking one takes some microseconds, and the event loop waits for all of them.
MAX_FIELDS: Final = 40_000
FEW: Final = 1_000
PIECE: Final = 2**20
MAX_ITEMS: Final = 100_000
# The end of a key, or of a text in a list; a quotation mark behind an odd number of backslashes is part of a text.
_FIELD: Final = re.compile(rb'(?<!\\)(?:\\\\)*"\s*[:,]')
_OTHER_MARKS: Final = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def coding_of(header: bytes) -> str | None:
    """Return the compression that a Content-Encoding names, "gzip" or "deflate"; None if there is none.

    Raises:
        HttpError: 415, an unsupported coding, or more than one.
    """
    labels = [label.strip().strip('"') for label in header.decode("latin-1").lower().split(",")]
    named = [label.removeprefix("x-") for label in labels if label not in ("", "identity")]
    if not named:
        return None
    if len(named) > 1 or named[0] not in ("gzip", "deflate"):
        raise HttpError(
            415,
            f"unsupported Content-Encoding {header.decode('latin-1')[:50]!r}",
            hint="gzip, deflate, or none",
            code="unsupported_media_type",
            headers=((b"accept-encoding", b"gzip, deflate"),),
        )
    return named[0]


def inflated(body: bytes, coding: str, counted: Callable[[int], None]) -> bytes:
    """Return the decompressed `body`; `counted(size)` is called per decompressed piece and may raise to stop it.

    Raises:
        HttpError: 400, the bytes are not valid data of `coding`.
    """
    try:
        if coding == "gzip" and not (body.startswith(inflate.GZIP) or inflate.is_zlib(body)):
            raise zlib.error("its header is missing")
        return inflate.inflated(body, counted, strict=True)
    except zlib.error as exc:
        reason = str(exc).rpartition(": ")[2]
        raise HttpError(400, f"invalid {coding} data in the body: {reason}", code="invalid_body") from exc


async def checked_json(body: bytes) -> bytes:
    """Return the JSON in `body` without a byte order mark.

    Raises:
        HttpError: 400, the body is not UTF-8, or has more than MAX_FIELDS fields or MAX_ITEMS items.
    """
    body = without_byte_order_mark(body)
    # A few megabytes of base64 have few of these, and finding them one by one is ten times as fast as counting.
    if len(body) > SMALL_BODY and not (_has_few(body, b",") and _has_few(body, b":")):
        # As below: only then it is worth to tell those in texts apart.
        if body.count(b",") > MAX_ITEMS:
            await _count_items(body)
        # Colons and commas may be text; only where there are many is it worth to look closer.
        if body.count(b":") + body.count(b",") > MAX_FIELDS:
            await _count_fields(body)
    return body


def without_byte_order_mark(body: bytes) -> bytes:
    """Return `body` without a UTF-8 byte order mark.

    Raises:
        HttpError: 400, it begins with that of another encoding.
    """
    for mark, name in _OTHER_MARKS:
        if body.startswith(mark):
            raise HttpError(400, f"the body is {name}", hint="send JSON as UTF-8", code="invalid_json")
    return body.removeprefix(codecs.BOM_UTF8)


def _has_few(body: bytes, sign: bytes) -> bool:
    at = -1
    for _ in range(FEW):
        at = body.find(sign, at + 1)
        if at < 0:
            return True
    return False


async def _count_items(body: bytes) -> None:
    """Check the number of commas outside JSON strings, yielding to the event loop after each MiB."""
    count, inside, start = 0, 0, 0
    while start < len(body):
        piece = body[start : start + PIECE]
        if len(piece) == PIECE and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            # What it escapes stands in the next piece.
            piece = piece[:-1]
        start += len(piece)
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        count += sum(part.count(b",") for part in parts[inside::2])
        inside = (inside + len(parts) - 1) % 2
        if count > MAX_ITEMS:
            raise _too_many(f"more than {MAX_ITEMS} items")
        await asyncio.sleep(0)


async def _count_fields(body: bytes) -> None:
    """Check the number of fields, yielding to the event loop after each MiB."""
    count = 0
    for start in range(0, len(body), PIECE):
        for _ in _FIELD.finditer(body, start, min(len(body), start + PIECE)):
            count += 1
            if count > MAX_FIELDS:
                raise _too_many(f"more than {MAX_FIELDS} fields")
        await asyncio.sleep(0)


def _too_many(what: str) -> HttpError:
    return HttpError(400, f"the body has {what}", hint="send several smaller requests", code="request_too_large")
