"""Verifies that JPEG bytes are what a decoder accepts, for a small part of the time that decoding takes.

A decoder refuses a JPEG for its segments, and for an end that is missing; wrong codes between them only give wrong
pixels. So the codes are left out, and the decoder judges the rest.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

_FRAMES: Final = (0xC0, 0xC2)
# With one component.
_MIN_FRAME: Final = 11
_SCAN: Final = 0xDA
_END: Final = 0xD9
_COMMENT: Final = 0xFE
_NO_COMMENT: Final = b"\xff\xfe\x00\x02"
# The upper five bits of all eight.
_RESTARTS: Final = 0xD0
_FILL: Final = 0xFF
# Decoders refuse more than 65,500, which the patched size would hide.
_MAX_EDGE: Final = 2**14
_MAX_SEGMENTS: Final = 1_000
# Most of them within segments; looking at so many takes a millisecond.
_MAX_MARKERS: Final = 10_000
# Fits the CPU cache, and bounds the memory for a file of nothing but markers.
_PIECE: Final = 2**17
_ONE_PIXEL: Final = b"\x00\x01\x00\x01"


def skeleton(data: bytes) -> bytes | None:
    """Return the JPEG of one pixel made of all segments of `data` and none of its codes; None if its end is missing.

    A decoder that accepts it accepts `data`, too: it reads the same segments in the same order, and for codes that are
    missing, too many or wrong it only warns. Comments are empty, since no decoder looks into them. None also for what
    `image_header` leaves to Pillow, and for junk between the segments in front of the first scan.

    Source: ITU-T T.81, annex B; libjpeg's jdmarker.c and jdinput.c.
    """
    head = _head(data)
    if head is None:
        return None
    front, at = head
    parts = [front]
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
        if len(parts) > _MAX_SEGMENTS:
            return None
    return None


def _head(data: bytes) -> tuple[bytes, int] | None:
    """Return (the segments up to the first scan's header, index behind that)."""
    at, framed = 2, False
    parts = [data[:2]]
    for _ in range(_MAX_SEGMENTS):
        if data[:2] != b"\xff\xd8" or len(data) < at + 10 or data[at] != _FILL:
            return None
        start, marker, length = at, data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 2 + length
        if length < 2:
            return None
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 5)
            if framed or length < _MIN_FRAME or not (0 < height <= _MAX_EDGE and 0 < width <= _MAX_EDGE):
                return None
            framed = True
            parts += (data[start : start + 5], _ONE_PIXEL, data[start + 9 : at])
        else:
            parts.append(_NO_COMMENT if marker == _COMMENT else data[start:at])
        if marker == _SCAN:
            return (b"".join(parts), at) if framed and at < len(data) else None
    return None


def _markers(data: bytes, at: int) -> Iterator[int]:
    """Yield the index of each marker from `at` on, but of restarts, which a decoder skips where it expects none."""
    values = np.frombuffer(data, np.uint8)
    for start in range(at, len(data) - 1, _PIECE):
        first, second = values[start : start + _PIECE], values[start + 1 : start + 1 + _PIECE]
        marked = (first[: second.size] == _FILL) & (second != 0)
        # Most pieces have none, and listing takes longer than finding that out.
        if marked.any():
            found = np.flatnonzero(marked)
            kind = second[found]
            yield from (found[(kind != _FILL) & (kind & 0xF8 != _RESTARTS)] + start).tolist()
