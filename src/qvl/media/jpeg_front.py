"""Reads what stands in front of the pixels of a usual JPEG, in one walk for all who ask."""

from __future__ import annotations

from typing import Final, NamedTuple

from qvl.media import file_structure

_SCAN: Final = 0xDA
# Baseline and progressive.
_FRAMES: Final = (0xC0, 0xC2)
# Of its header: the length with three components, and the bits of each.
_COLOUR: Final = b"\x00\x11\x08"
_COMPONENTS: Final = 3
_ALL: Final = bytes([_COMPONENTS])
_APP1: Final = 0xE1
_COMMENT: Final = 0xFE
# What tells nothing of size or orientation.
_SKIPPED: Final = frozenset({0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0)})
_NO_COMMENT: Final = b"\xff\xfe\x00\x02"
_ONE_PIXEL: Final = b"\x00\x01\x00\x01"


class JpegFront(NamedTuple):
    """The front of a colour JPEG of 8 bits, `width` x `height` pixels as stored.

    `exif`: its EXIF segment behind the length, b"" without one.
    `frame`: what `file_structure.jpeg_frame` returns.
    `cuts`: (start, end, what stands there instead) where it differs from that of the same JPEG without comments, of
    one pixel.
    `end`: index behind the header of the first scan.
    """

    width: int
    height: int
    exif: bytes
    frame: tuple[bool, float]
    cuts: tuple[tuple[int, int, bytes], ...]
    end: int


def jpeg_front(data: bytes) -> JpegFront | None:
    """Return the front of a usual colour JPEG; None if Pillow has to read it.

    Pillow takes ten times as long, most of the time of a cache hit beside hashing. Later damage is noticed when the
    picture is verified or decoded. Source: ITU-T T.81, annex B.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, frame, exif = 2, 0, b""
    cuts: list[tuple[int, int, bytes]] = []
    for _ in range(file_structure.MAX_SEGMENTS):
        if len(data) < at + 4 or data[at] != 0xFF:
            return None
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker in _SKIPPED:
            pass
        elif marker == _SCAN:
            break
        elif marker in _FRAMES:
            if frame or data[at + 2 : at + 5] != _COLOUR or data[at + 9 : at + 10] != _ALL:
                return None
            frame = at
            cuts.append((at + 5, at + 9, _ONE_PIXEL))
        elif marker == _COMMENT:
            cuts.append((at, end, _NO_COMMENT))
        elif marker != _APP1:
            return None
        elif data.startswith(b"Exif\0\0", at + 4):
            if exif:
                return None
            exif = data[at + 4 : end]
        at = end
    else:
        return None
    if not frame:
        return None
    height, width = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    several = data[frame + 1] != _FRAMES[0] or data[at + 4 : at + 5] != _ALL
    planes = file_structure.planes_of(data[frame + 11 : frame + 11 + 3 * _COMPONENTS : 3])
    return JpegFront(width, height, exif, (several, planes), tuple(cuts), end)
