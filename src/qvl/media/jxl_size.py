"""Reads the size of a JPEG XL picture from its first bits (ISO/IEC 18181-1, clause D.2), before any decoder sees it."""

from __future__ import annotations

from typing import Final

CONTAINER: Final = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
CODESTREAM: Final = b"\xff\x0a"
_MOST_BOXES: Final = 64
# Width by height, for the numbers that stand for a ratio.
_RATIOS: Final = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_BITS: Final = (9, 13, 18, 30)


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) as coded; None if the data begin like no JPEG XL picture."""
    stream = _codestream(data)
    if stream[:2] != CODESTREAM or len(stream) < 12:
        return None
    bits = _LowBits(stream[2:12])
    small = bits.take(1)
    height = 8 * (bits.take(5) + 1) if small else bits.length()
    ratio = bits.take(3)
    if ratio:
        across, down = _RATIOS[ratio - 1]
        return height * across // down, height
    return (8 * (bits.take(5) + 1) if small else bits.length()), height


class _LowBits:
    """Bits, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._rest = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        value = self._rest & ((1 << count) - 1)
        self._rest >>= count
        return value

    def length(self) -> int:
        """Return a side that is no multiple of 8, or longer than 256."""
        return self.take(_BITS[self.take(2)]) + 1


def _codestream(data: bytes) -> bytes:
    """Return the beginning of the codestream, which may lie in a box."""
    if not data.startswith(CONTAINER):
        return data[:16]
    at = len(CONTAINER)
    for _ in range(_MOST_BOXES):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        head = 16 if size == 1 else 8
        if kind in (b"jxlc", b"jxlp"):
            # A part begins with its number.
            start = at + head + (4 if kind == b"jxlp" else 0)
            return data[start : start + 16]
        size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size
        if size < head:
            break
        at += size
    return b""
