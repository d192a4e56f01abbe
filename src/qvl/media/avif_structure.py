"""Checks that the coded pictures of an AVIF have the size that the file declares; decoders notice this too late.

The declared size is in the box `ispe`; the memory that a decoder allocates depends on the AV1 sequence header of the
coded data. Sources: ISO/IEC 14496-12 and 23008-12 (boxes), AV1 specification, 5.3 and 5.5 (OBUs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from qvl.errors import MediaError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BOXES: Final = 10_000
MAX_EXTENTS: Final = 10_000
MAX_OBUS: Final = 10_000
# Pixels a side that encoders add to fill up their blocks.
PADDING: Final = 64
# A grid's tiles hold the colours, and often alpha, a gain map and a small picture, each filled up to whole tiles.
GRID_AREAS: Final = 4
# Small grids may be filled up by more: each picture of a 520 x 520 one is four tiles of 512 x 512.
SMALL_GRID: Final = 2**22

_SEQUENCE_HEADER: Final = 1
# The most bytes of one before and with its sizes: 32 operating points of at most 83 bits each, and timing.
_HEADER_BYTES: Final = 512
Span: TypeAlias = tuple[int, int]


def check(data: bytes, size: tuple[int, int], name: str) -> None:
    """Check the coded pictures of an AVIF against its declared `size` (width, height).

    Raises:
        MediaError: they are larger, or their sizes cannot be read.
    """
    try:
        grid, pictures = _pictures(data)
        budget = _Budget(MAX_OBUS)
        areas = [max((w * h for w, h in _sizes(picture, budget)), default=0) for picture in pictures]
    except (IndexError, ValueError) as exc:
        reason = str(exc) if isinstance(exc, _TooManyError) else "its boxes cannot be read"
        raise _refused(name, f"is broken: {reason}") from exc
    allowed = (size[0] + PADDING) * (size[1] + PADDING)
    if max(areas, default=0) > allowed or (grid and sum(areas) > max(SMALL_GRID, GRID_AREAS * allowed)):
        what = f"declares {size[0]} x {size[1]} pixels, but more are coded in it"
        raise _refused(name, what, code="image_too_large")
    if not any(areas):
        raise _refused(name, "is broken: it has no coded picture", "save or download it again")


def _refused(
    name: str, what: str, hint: str = "save the picture again with an image program", code: str = "image_decode_failed"
) -> MediaError:
    return MediaError(f"{name}: the AVIF picture {what}", hint=hint, code=code)


class _TooManyError(ValueError):
    pass


class _Budget:
    """Counts parts of a kind, up to a limit."""

    def __init__(self, most: int) -> None:
        self._most = self._remaining = most

    def take(self) -> None:
        self._remaining -= 1
        if self._remaining < 0:
            raise _TooManyError(f"it has more than {self._most} parts")


def _pictures(data: bytes) -> tuple[bool, list[bytes]]:
    """Return (True if there is a grid, coded data of every item and of the first sample of every track)."""
    budget, grid, payloads = _Budget(MAX_BOXES), False, list[bytes]()
    for kind, at, end in _boxes(data, 0, len(data), budget):
        if kind == b"meta":
            types, locations = _items(data, at + 4, end, budget)
            grid = grid or any(kind == b"grid" for _, kind in types)
            coded = {number for number, kind in types if kind == b"av01"}
            payloads += [_joined(data, spans) for number, spans in locations if number in coded]
        elif kind == b"moov":
            payloads += [_joined(data, [span]) for span in _first_samples(data, at, end, budget)]
    return grid, payloads


def _joined(data: bytes, spans: list[Span]) -> bytes:
    if sum(min(end, len(data)) - start for start, end in spans) > len(data):
        raise _TooManyError("byte ranges of its coded data overlap")
    return b"".join([data[start:end] for start, end in spans])


def _boxes(data: bytes, at: int, end: int, budget: _Budget) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of the content of each box between `at` and `end`."""
    while at + 8 <= end:
        budget.take()
        size, kind, head = _number(data, at, 4), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = _number(data, at + 8, 8), 16
        stop = end if size == 0 else min(end, at + size)
        if stop < at + head:
            raise ValueError
        yield kind, at + head, stop
        at = stop


def _items(
    data: bytes, at: int, end: int, budget: _Budget
) -> tuple[list[tuple[int, bytes]], list[tuple[int, list[Span]]]]:
    """Return ((number, type) of each item of a `meta` box, (number, spans of its data) of each)."""
    inner = [(kind, start, stop) for kind, start, stop in _boxes(data, at, end, budget)]
    within = next((start for kind, start, _ in inner if kind == b"idat"), 0)
    types: list[tuple[int, bytes]] = []
    locations: list[tuple[int, list[Span]]] = []
    for kind, start, stop in inner:
        if kind == b"iinf":
            first = start + (6 if data[start] == 0 else 8)
            types += [_item(data, into) for name, into, _ in _boxes(data, first, stop, budget) if name == b"infe"]
        elif kind == b"iloc":
            locations += _locations(data, start, within)
    return types, locations


def _item(data: bytes, at: int) -> tuple[int, bytes]:
    width = 4 if data[at] >= 3 else 2
    return _number(data, at + 4, width), data[at + 6 + width : at + 10 + width]


def _locations(data: bytes, at: int, within: int) -> Iterator[tuple[int, list[Span]]]:
    version = data[at]
    offset_width, length_width = data[at + 4] >> 4, data[at + 4] & 15
    base_width, index_width = data[at + 5] >> 4, data[at + 5] & 15 if version else 0
    wide = 4 if version == 2 else 2
    count = _number(data, at + 6, wide)
    at += 6 + wide
    budget = _Budget(MAX_EXTENTS)
    for _ in range(count):
        budget.take()
        number = _number(data, at, wide)
        at += wide
        begin = 0
        if version:
            begin = within if data[at + 1] & 15 == 1 else 0
            at += 2
        begin += _number(data, at + 2, base_width)
        extents = _number(data, at + 2 + base_width, 2)
        at += 4 + base_width
        spans: list[Span] = []
        for _ in range(extents):
            budget.take()
            at += index_width
            start = begin + _number(data, at, offset_width)
            length = _number(data, at + offset_width, length_width)
            at += offset_width + length_width
            # Without a length it is all the rest.
            spans.append((start, start + length if length else len(data)))
        yield number, [(start, end) for start, end in spans if start < len(data)]


def _first_samples(data: bytes, at: int, end: int, budget: _Budget) -> Iterator[Span]:
    for kind, start, stop in _boxes(data, at, end, budget):
        if kind in (b"trak", b"mdia", b"minf"):
            yield from _first_samples(data, start, stop, budget)
        elif kind == b"stbl":
            begin = length = None
            for name, into, _ in _boxes(data, start, stop, budget):
                if name == b"stsz":
                    length = _number(data, into + 4, 4) or _number(data, into + 12, 4)
                elif name in (b"stco", b"co64"):
                    begin = _number(data, into + 8, 4 if name == b"stco" else 8)
            if begin is not None and length is not None and begin < len(data):
                yield begin, begin + length


def _number(data: bytes, at: int, width: int) -> int:
    if at + width > len(data):
        raise ValueError
    return int.from_bytes(data[at : at + width], "big")


def _sizes(coded: bytes, budget: _Budget) -> Iterator[tuple[int, int]]:
    """Yield the largest (width, height) that each sequence header in `coded` allows."""
    at = 0
    while at < len(coded):
        budget.take()
        head = coded[at]
        at += 2 if head & 4 else 1
        size = len(coded) - at
        if head & 2:
            size = shift = 0
            for _ in range(8):
                byte = coded[at]
                at += 1
                size |= (byte & 127) << shift
                shift += 7
                if not byte & 128:
                    break
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            yield _size(_Bits(coded[at : at + min(size, _HEADER_BYTES)]))
        at += size


class _Bits:
    """Reads bits from bytes, the highest first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._remaining = len(data) * 8

    def take(self, count: int) -> int:
        self._remaining -= count
        if self._remaining < 0:
            raise ValueError
        return self._value >> self._remaining & (1 << count) - 1


def _size(bits: _Bits) -> tuple[int, int]:
    """Return (max_frame_width, max_frame_height) of a sequence header."""
    bits.take(4)
    if bits.take(1):
        bits.take(5)
    else:
        delay = _timing(bits) if bits.take(1) else 0
        shown = bits.take(1)
        for _ in range(bits.take(5) + 1):
            bits.take(12)
            if bits.take(5) > 7:
                bits.take(1)
            if delay and bits.take(1):
                bits.take(2 * delay + 1)
            if shown and bits.take(1):
                bits.take(4)
    width, height = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(width) + 1, bits.take(height) + 1


def _timing(bits: _Bits) -> int:
    """Skip timing_info and decoder_model_info; return the bits of a buffer delay, 0 without a decoder model."""
    bits.take(64)
    if bits.take(1):
        zeros = 0
        while not bits.take(1):
            zeros += 1
        bits.take(zeros if zeros < 32 else 0)
    if not bits.take(1):
        return 0
    delay = bits.take(5) + 1
    bits.take(42)
    return delay
