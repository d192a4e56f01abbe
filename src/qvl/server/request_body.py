"""The body of a request before it is read as JSON: inflated, UTF-8, and small enough to hold up nobody else."""

from __future__ import annotations

import asyncio
import codecs
import re
import zlib
from typing import TYPE_CHECKING, Final

from qvl.media import inflate
from qvl.server.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL_BODY: Final = 64 * 1024
# Reading and checking one takes some microseconds, and the event loop waits for all of them.
MAX_FIELDS: Final = 40_000
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
        HttpError: 415, it names something else, or more than one.
    """
    labels = [label.strip().strip('"') for label in header.decode("latin-1").lower().split(",")]
    named = [label.removeprefix("x-") for label in labels if label not in ("", "identity")]
    if not named:
        return None
    if len(named) > 1 or named[0] not in ("gzip", "deflate"):
        raise HttpError(
            415,
            f"unknown Content-Encoding {header.decode('latin-1')[:50]!r}",
            hint="gzip, deflate, or none",
            code="unsupported_media_type",
            headers=((b"accept-encoding", b"gzip, deflate"),),
        )
    return named[0]


def inflated(body: bytes, coding: str, counted: Callable[[int], None]) -> bytes:
    """Return `body` without its `coding`; what `counted` raises for a piece that came out ends it.

    Raises:
        HttpError: 400, the bytes are not of that coding.
    """
    try:
        if coding == "gzip" and not (body.startswith(inflate.GZIP) or inflate.is_zlib(body)):
            raise zlib.error("its head is missing")
        return inflate.inflated(body, counted, strict=True)
    except zlib.error as exc:
        reason = str(exc).rpartition(": ")[2]
        raise HttpError(400, f"the body is not whole {coding} data: {reason}", code="invalid_body") from exc


async def checked_json(body: bytes) -> bytes:
    """Return the JSON in `body` without a byte order mark.

    Raises:
        HttpError: 400, it is not UTF-8, or has more fields or items than are read for one request.
    """
    for mark, name in _OTHER_MARKS:
        if body.startswith(mark):
            raise HttpError(400, f"the body is {name}", hint="JSON is sent as UTF-8", code="invalid_json")
    body = body.removeprefix(codecs.BOM_UTF8)
    if len(body) > SMALL_BODY:
        # As below: only then it is worth to tell those in texts apart.
        if body.count(b",") > MAX_ITEMS:
            await _count_items(body)
        # Colons and commas may be text; only where there are many is it worth to look closer.
        if body.count(b":") + body.count(b",") > MAX_FIELDS:
            await _count_fields(body)
    return body


async def _count_items(body: bytes) -> None:
    """Counts the commas outside of texts, a mebibyte at a time."""
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
    """Looks through a mebibyte at a time, so that others have their turn in between."""
    count = 0
    for start in range(0, len(body), PIECE):
        for _ in _FIELD.finditer(body, start, min(len(body), start + PIECE)):
            count += 1
            if count > MAX_FIELDS:
                raise _too_many(f"more than {MAX_FIELDS} fields")
        await asyncio.sleep(0)


def _too_many(what: str) -> HttpError:
    return HttpError(400, f"the body has {what}", hint="send several smaller requests", code="request_too_large")
