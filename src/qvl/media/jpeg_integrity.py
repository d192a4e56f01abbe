"""Verifies that JPEG bytes are what a decoder accepts, for a small part of the time that decoding takes.

A decoder refuses a JPEG for its segments, and for an end that is missing; wrong codes between them only give wrong
pixels. So the codes are left out, and the decoder judges the rest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qvl.media.jpeg_front import JpegFront

_END: Final = 0xD9
_COMMENT: Final = 0xFE
_NO_COMMENT: Final = b"\xff\xfe\x00\x02"
_FILL: Final = 0xFF
# The upper five bits of all eight.
_RESTARTS: Final = 0xD0
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Decoders refuse more than 65,500, which the patched size would hide.
_MAX_EDGE: Final = 2**14
_MAX_PARTS: Final = 1_000
# Most of them within segments; looking at so many takes a millisecond.
_MAX_MARKERS: Final = 10_000
# Bounds the memory; for most pictures one call of each function of numpy, which takes longer than the bytes do.
_PIECE: Final = 2**19
# Has the end of a whole file.
_TAIL: Final = 2**8
# So many bytes a regular expression reads before numpy has begun.
_FEW: Final = 2**14


def skeleton(data: bytes, front: JpegFront) -> bytes | None:
    """Return the JPEG of one pixel made of all segments of `data` and none of its codes; None if its end is missing.

    A decoder that accepts it accepts `data`, too: it reads the same segments in the same order, and for codes that are
    missing, too many or wrong it only warns. Comments are empty, since no decoder looks into them. None also for edges
    that decoders may refuse, and for many segments.

    Source: ITU-T T.81, annex B; libjpeg's jdmarker.c and jdinput.c.
    """
    if not (0 < front.height <= _MAX_EDGE and 0 < front.width <= _MAX_EDGE):
        return None
    at = 0
    parts: list[bytes] = []
    for start, end, instead in front.cuts:
        parts += (data[at:start], instead)
        at = end
    parts.append(data[at : front.end])
    at = front.end
    for number, start in enumerate(_markers(data, at)):
        if number > _MAX_MARKERS:
            return None
        if start < at:
            continue
        marker, at = data[start + 1], start + 2
        if marker == _END:
            return b"".join((*parts, b"\xff\xd9"))
        if marker == 0x01:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        at += length
        if length < 2 or at > len(data):
            return None
        parts.append(_NO_COMMENT if marker == _COMMENT else data[start:at])
        if len(parts) > _MAX_PARTS:
            return None
    return None


def _markers(data: bytes, at: int) -> Iterator[int]:
    """Yield the index of each marker from `at` on, but of restarts, which a decoder skips where it expects none."""
    # Of few bytes a regular expression tells in half of the time, of many numpy in a third of it.
    tail = at if len(data) - at <= _FEW else len(data) - _TAIL
    for start in range(at, tail, _PIECE):
        yield from _markers_of_piece(data, start, min(start + _PIECE, tail))
    yield from (match.start() for match in _MARKER.finditer(data, tail))


def _markers_of_piece(data: bytes, start: int, end: int) -> list[int]:
    values = np.frombuffer(data, np.uint8, end - start + 1, start)
    marked = (values[:-1] == _FILL).view(np.uint8)
    # 1 where a byte of a fill is not followed by the zero that stands behind it in codes.
    np.minimum(marked, values[1:], out=marked)
    # Most pieces have none, and listing takes longer than finding that out.
    if not np.maximum.reduce(marked):
        return []
    found = np.flatnonzero(marked.view(np.bool_))
    kinds = values[1:][found]
    markers = found[(kinds != _FILL) & (kinds & 0xF8 != _RESTARTS)]
    listed: list[int] = (markers[: _MAX_MARKERS + 1] + start).tolist()
    return listed
