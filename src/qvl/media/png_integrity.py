"""Verifies that PNG bytes are complete and intact, for less than decoding them.

A picture that is passed on unchanged needs no decoding, but a broken one must not be passed on.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# Eight bits, RGB, the one compression and the one filter method there are, rows in order.
_PLAIN: Final = b"\x08\x02\x00\x00\x00"
_ANIMATION: Final = frozenset({b"acTL", b"fcTL", b"fdAT"})
_LAST_FILTER: Final = 4
_PIECE: Final = 32 * 1024
_INPUT: Final = 64 * 1024


def whole_png(data: bytes, width: int, height: int) -> bool:
    """True if `data` is certainly a complete and intact PNG of 8-bit RGB pixels.

    All chunks and checksums are correct, and the pixels inflate to exactly their number; the rest of decoding (the
    rows' filters) cannot fail. False means that only a decoder can tell: rare kinds (interlaced, animated, chunks
    between pixels and end) are not examined.

    Source: PNG (Third Edition), sections 5.3, 10 and 11.2.
    """
    packed = _pixel_data(data, width, height)
    if packed is None:
        return False
    row, size, done = 1 + 3 * width, (1 + 3 * width) * height, 0
    inflating = zlib.decompressobj()
    try:
        for rows in _inflated(inflating, packed):
            # Each row begins with its filter. Those of this piece:
            filters = rows[-done % row :: row]
            done += len(rows)
            if done > size or (filters and max(filters) > _LAST_FILTER):
                return False
    except zlib.error:
        return False
    return inflating.eof and done == size


def _inflated(inflating: zlib._Decompress, packed: bytes) -> Iterator[bytes]:
    """Yield the decompressed data in pieces that fit the CPU cache, so that no stream grows beyond its picture."""
    view = memoryview(packed)
    for at in range(0, len(packed), _INPUT):
        rest: bytes | memoryview = view[at : at + _INPUT]
        while len(piece := inflating.decompress(rest, _PIECE)) == _PIECE:
            yield piece
            rest = inflating.unconsumed_tail
        yield piece


def _pixel_data(data: bytes, width: int, height: int) -> bytes | None:
    """Return the joined content of the IDAT chunks; None unless all chunks are as `whole_png` requires."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + _PLAIN
    if not data.startswith(_SIGNATURE) or data[12:29] != b"IHDR" + head:
        return None
    view = memoryview(data)
    pieces: list[memoryview] = []
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data) or zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return None
        if kind == b"IDAT":
            pieces.append(view[at + 8 : end - 4])
        elif kind == b"IEND":
            return b"".join(pieces)
        elif pieces or kind in _ANIMATION or (kind[:1].isupper() and kind != b"PLTE" and at > len(_SIGNATURE)):
            # Also another header, which decoders believe instead of the first.
            return None
        at = end
    return None
