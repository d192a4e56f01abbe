"""Decompresses gzip and deflate piece by piece, so that a caller can stop at a limit on the output."""

from __future__ import annotations

import io
import re
import zlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

GZIP: Final = b"\x1f\x8b"
# Each takes some microseconds, however little it holds.
MAX_MEMBERS: Final = 1_000
_FED: Final = 64 * 1024
_MADE: Final = 256 * 1024
_GZIP_WINDOW, _ZLIB_WINDOW, _RAW_WINDOW = 31, 15, -15
_PADDING: Final = re.compile(rb"\0*")


def is_zlib(data: bytes) -> bool:
    """True if `data` begins with the head of a zlib stream (RFC 1950, section 2.2)."""
    return len(data) > 1 and data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0


def inflated(data: bytes, counted: Callable[[int], None], *, strict: bool) -> bytes:
    """Return `data` decompressed: gzip or zlib by its first bytes, else raw deflate.

    Args:
        data: a stream, or several concatenated gzip members; trailing zeros are ignored.
        counted: called with the size of each piece of output; an exception of it ends the work.
        strict: True if other trailing bytes are an error; False ignores them.

    Raises:
        zlib.error: the data is broken, cut short, or has too many members.
    """
    if data.startswith(GZIP):
        return _members(data, _GZIP_WINDOW, counted, strict)
    made = 0

    def first(size: int) -> None:
        nonlocal made
        made += size
        counted(size)

    if is_zlib(data):
        try:
            return _members(data, _ZLIB_WINDOW, first, strict)
        except zlib.error:
            # Two bytes may look like a head by chance; what gave something was one.
            if made:
                raise
    return _members(data, _RAW_WINDOW, counted, strict)


def _members(data: bytes, window: int, counted: Callable[[int], None], strict: bool) -> bytes:
    view, out, at = memoryview(data), io.BytesIO(), 0
    for _ in range(MAX_MEMBERS):
        reader = zlib.decompressobj(window)
        while not reader.eof:
            piece: bytes | memoryview = reader.unconsumed_tail
            if not piece:
                piece = view[at : at + _FED]
                at += len(piece)
            made = reader.decompress(piece, _MADE)
            if not (piece or made or reader.eof):
                raise zlib.error("the stream is cut short")
            counted(len(made))
            out.write(made)
        at -= len(reader.unused_data)
        padding = _PADDING.match(data, at)
        at = at if padding is None else padding.end()
        if window != _GZIP_WINDOW or not data.startswith(GZIP, at):
            if strict and at < len(data):
                raise zlib.error("unexpected data after the end of the stream")
            return out.getvalue()
    raise zlib.error(f"the stream has more than {MAX_MEMBERS} members")
