"""Limits on the structure of encoded pictures, checked before decoding: parts are counted, their content not read.

A decoder, or Pillow's reader in front of it, does work for every part, whether it holds pixels or nothing. Files of
cameras and programs stay far below these numbers. Counting itself ends at the bound.
"""

from __future__ import annotations

import functools
import io
import re
import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from qvl.errors import MediaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from PIL import Image

ByteOrder: TypeAlias = Literal["little", "big"]

MAX_SEGMENTS: Final = 2_000
MAX_EXIF_SEGMENTS: Final = 8
MAX_PHOTOSHOP_RECORDS: Final = 4_096
MAX_FILL: Final = 16_384
MAX_SCANS: Final = 64
# Pixels, once for each scan: about a second of a slow core.
MAX_SCAN_PIXELS: Final = 2**29
MAX_CHUNKS: Final = 20_000
# Compressed, of a MiB each when they are opened; and a PNG has one profile.
MAX_PACKED_CHUNKS: Final = 16
MAX_PROFILES: Final = 1
PLAIN_CHUNKS: Final = 16
MAX_COMMENT: Final = 256 * 1024
MAX_TAGS: Final = 4_096
MAX_STRIPS: Final = 32_768
# Pixels and bytes of a run-length BMP, which Pillow decodes in Python.
MAX_BMP_RUNS: Final = 2**21

_PIECE: Final = 2**20
_PACKED: Final = frozenset({b"iCCP", b"zTXt", b"iTXt"})
_FILL: Final = re.compile(rb"\xff+")
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN: Final = 0xDA
_END: Final = 0xD9
_NO_LENGTH: Final = frozenset({0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
# What Pillow reads of a TIFF: the layout, the colours, and where the pixels are.
_READ_TAGS: Final = frozenset({258, 273, 278, 279, 320, 322, 323, 324, 325, 338, 339})
_SUB_DIRECTORIES: Final = frozenset({34665, 34853, 40965})
_TIFF_JPEG: Final = (6, 7)


class TimedBytes(io.BytesIO):
    """A file object whose `read` raises a MediaError once its thread has used `seconds` of processor time.

    Decoders of JPEG, PNG, GIF and BMP read while they decode, so they stop there; those of WebP, AVIF and TIFF read
    everything first, and their work is limited by the size of the picture.
    """

    def __init__(self, data: bytes, seconds: float, name: str) -> None:
        super().__init__(data)
        self._seconds = seconds
        self._name = name
        self._until = time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._until:
            raise MediaError(
                f"{self._name}: decoding it takes more than {self._seconds:g} s of processor time",
                hint="save the picture again with an image program, or raise MediaPolicy.max_decode_seconds",
                code="image_too_large",
            )
        return super().read(size)


def check(data: bytes, form: str, max_frames: int, name: str) -> None:
    """Check the number of parts that a decoder of the format `form` reads when it opens `data`; not that of frames.

    Raises:
        MediaError: there are more parts of a kind than in any real picture.
    """
    if form == "GIF":
        _check_gif(data, max_frames, name)
        return
    look = {"JPEG": _check_jpeg, "PNG": _check_png, "TIFF": _check_tiff, "BMP": _check_bmp}.get(form)
    if look is not None:
        look(data, name)


def has_few_scans(data: bytes, pixels: int) -> bool:
    """True if a progressive JPEG is certain to have no more scans than allowed, False if that needs a closer look."""
    # In pieces, so that other threads get their turn.
    rough = sum(data.count(b"\xff\xda", at, at + _PIECE + 1) for at in range(0, len(data), _PIECE))
    return rough <= _allowed_scans(pixels)


def _allowed_scans(pixels: int) -> int:
    return min(MAX_SCANS, max(1, MAX_SCAN_PIXELS // pixels))


def check_scans(data: bytes, pixels: int, name: str) -> None:
    """Check the number of scans of a progressive JPEG, each of which goes over all pixels.

    Raises:
        MediaError: there are more than any encoder writes, or too many for so many pixels.
    """
    # What is counted in vain, as in a film behind a picture of a phone, is looked at closely below.
    if has_few_scans(data, pixels):
        return
    allowed = _allowed_scans(pixels)
    scans = 0
    at = _next_marker(data, 2)
    while at + 4 <= len(data) and (marker := data[at + 1]) != _END:
        scans += marker == _START_OF_SCAN
        _bound(scans, allowed, f"scans in a JPEG of {pixels} pixels", name, "save it with fewer scans")
        body = 0 if marker in _NO_LENGTH else int.from_bytes(data[at + 2 : at + 4], "big")
        at = _next_marker(data, at + 2 + body)


def _next_marker(data: bytes, at: int) -> int:
    while at < len(data):
        if (match := _MARKER.search(data, at, at + _PIECE)) is not None:
            return match.start()
        at += _PIECE - 1
    return len(data)


def jpeg_frame(data: bytes) -> tuple[bool, float]:
    """Return (True if a decoder buffers all coefficients of the JPEG, their number per pixel)."""
    several, planes, components = False, 3.0, 0
    for at in _jpeg_segments(data):
        marker = data[at + 1]
        if marker in _FRAMES:
            several = marker not in (0xC0, 0xC1, 0xC9)
            components = data[at + 9] if at + 9 < len(data) else 0
            # One byte of the three that a component has.
            planes = planes_of(data[at + 11 : at + 11 + 3 * components : 3])
        elif marker == _START_OF_SCAN:
            return several or data[at + 4 : at + 5] != bytes([components]), planes
    return True, 4


@functools.lru_cache(maxsize=64)
def planes_of(factors: bytes) -> float:
    """Return the coefficients per pixel of a JPEG with these sampling factors of its components."""
    area = widest = highest = 0
    for factor in factors:
        wide, high = factor >> 4, factor & 15
        area += wide * high
        widest, highest = max(widest, wide), max(highest, high)
    return max(1.0, area / max(1, widest * highest))


def _jpeg_segments(data: bytes) -> Iterator[int]:
    """Yield the index of each marker up to the first scan, skipping fill bytes and junk as Pillow does."""
    at = 2
    while at >= 0 and at + 4 <= len(data):
        if data[at] != 0xFF:
            at = data.find(b"\xff", at)
            continue
        if data[at + 1] == 0xFF:
            fill = _FILL.match(data, at)
            at = at if fill is None else fill.end() - 1
            continue
        yield at
        marker = data[at + 1]
        if marker == _START_OF_SCAN:
            return
        at += 2 if marker in _NO_LENGTH else 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))


def _check_jpeg(data: bytes, name: str) -> None:
    exif = fill = photoshop = marker = 0
    end = 2
    for segments, at in enumerate(_jpeg_segments(data), 1):
        fill += max(0, at - end)
        end = at + 2
        marker = data[at + 1]
        if marker not in _NO_LENGTH:
            end += max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        exif += marker == 0xE1 and data.startswith(b"Exif\0\0", at + 4)
        if marker == 0xED:
            photoshop += data.count(b"8BIM", at, end)
        _bound(segments, MAX_SEGMENTS, "segments in front of a JPEG's pixels", name)
        _bound(fill, MAX_FILL, "bytes of fill in front of a JPEG's pixels", name)
        _bound(exif, MAX_EXIF_SEGMENTS, "EXIF segments", name)
        _bound(photoshop, MAX_PHOTOSHOP_RECORDS, "Photoshop records", name)
    # Behind the start of a scan come its codes, which may begin with the byte of a fill.
    if marker != _START_OF_SCAN and data[end : end + 2] in (b"\xff\xff", b"\xff\x00"):
        _bound(len(data) - end, MAX_FILL, "bytes of fill in front of a JPEG's pixels", name)


def _check_png(data: bytes, name: str) -> None:
    packed = profiles = 0
    for chunks, (kind, _) in enumerate(png_chunks(data), 1):
        packed += kind in _PACKED
        profiles += kind == b"iCCP"
        _bound(chunks, MAX_CHUNKS, "chunks in a PNG", name)
        _bound(profiles, MAX_PROFILES, "colour profile in a PNG", name)
        _bound(packed, MAX_PACKED_CHUNKS, "compressed texts and profiles in a PNG", name)
        if kind == b"IEND":
            return


def png_chunks(data: bytes) -> Iterator[tuple[bytes, slice]]:
    """Yield (kind, slice of its content) for each chunk of a PNG, those after its end included."""
    at = 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], slice(at + 8, end)
        at = end + 4


def is_plain_png(data: bytes) -> bool:
    """True for a PNG of few chunks, none of which is a compressed text or profile."""
    for chunks, (kind, _) in enumerate(png_chunks(data), 1):
        if kind == b"IEND":
            break
        if kind in _PACKED or chunks == PLAIN_CHUNKS:
            return False
    return True


def _check_gif(data: bytes, max_frames: int, name: str) -> None:
    """Raise MediaError for a GIF of too many blocks or stray bytes: decoders read them one by one."""
    allowed = 100_000 + len(data) // 128
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    blocks = comment = frames = 0
    while at + 2 < len(data) and data[at] != 0x3B and frames <= max_frames:
        kind, follows, is_comment = data[at], True, data[at : at + 2] == b"\x21\xfe"
        if kind == 0x21:
            at += 2
        elif kind == 0x2C and at + 10 < len(data):
            flags = data[at + 9]
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            frames += 1
        else:
            follows = False
        while follows and blocks <= allowed and at < len(data) and (size := data[at]):
            at += 1 + size
            blocks += 1
            comment += size if is_comment else 0
        blocks += 1
        at += 1
        _bound(comment, MAX_COMMENT, "bytes of comments in a GIF", name)
        _bound(blocks, allowed, f"blocks in a GIF of {len(data)} bytes", name)


def _check_tiff(data: bytes, name: str) -> None:
    order: ByteOrder = "little" if data[:1] == b"I" else "big"
    big = int.from_bytes(data[2:4], order) == 43
    first = int.from_bytes(data[8:16] if big else data[4:8], order)
    ahead = [first]
    compression = strips = 1
    for depth in range(3):
        values = []
        for at in ahead:
            for tag, count, value in _tags(data, at, order, big, name):
                if tag in _READ_TAGS:
                    _bound(count, MAX_STRIPS, f"strips or values of tag {tag} in a TIFF", name)
                if tag in _SUB_DIRECTORIES:
                    values.append(value)
                if depth == 0 and tag == 259:
                    compression = value & 0xFFFF if order == "little" else value >> (48 if big else 16) or value
                if depth == 0 and tag in (273, 324):
                    strips = count
        ahead = values[:8]
    # One scan a strip is what encoders write; libtiff would read a hundred in each.
    if compression in _TIFF_JPEG:
        beside = data.count(b"\xff\xda") - 2 * strips
        _bound(beside, MAX_SCANS, f"scans beside those of its {strips} strips in a TIFF", name)


def _tags(data: bytes, at: int, order: ByteOrder, big: bool, name: str) -> Iterator[tuple[int, int, int]]:
    """Yield (tag, count, value or its offset) of each entry of the TIFF directory at offset `at`."""
    head, entry, word = (8, 20, 8) if big else (2, 12, 4)
    number = int.from_bytes(data[at : at + head], order)
    _bound(number, MAX_TAGS, "tags in a directory of a TIFF", name)
    for start in range(at + head, min(at + head + number * entry, len(data) - entry + 1), entry):
        count = int.from_bytes(data[start + 4 : start + 4 + word], order)
        value = int.from_bytes(data[start + 4 + word : start + 4 + 2 * word], order)
        yield int.from_bytes(data[start : start + 2], order), count, value


def _check_bmp(data: bytes, name: str) -> None:
    if int.from_bytes(data[14:18], "little") < 40 or int.from_bytes(data[30:34], "little") not in (1, 2):
        return
    width = int.from_bytes(data[18:22], "little")
    height = abs(int.from_bytes(data[22:26], "little", signed=True))
    _bound(width * height + len(data), MAX_BMP_RUNS, "pixels and bytes in a run-length BMP", name, "save it as PNG")


# Bytes a pixel at the highest, conversion to RGB included, by Pillow's mode; Pillow holds RGB in four bytes.
_BYTES: Final = {"1": 6, "L": 6, "P": 9, "RGB": 4, "CMYK": 8, "YCbCr": 8, "I;16": 12, "I;16B": 12, "I": 16, "F": 18}
_OF_OTHER_MODES: Final = 10
# What the decoder itself holds of the whole picture: canvases, planes, a strip that may be all of it.
OF_JXL: Final = 16
_DECODERS: Final = {"WEBP": 12, "AVIF": 14, "TIFF": 4, "HEIF": 14, "JXL": OF_JXL - 4}


def memory(image: Image.Image, form: str) -> int:
    """Return an upper estimate, from the header, of the bytes that decoding an open picture (not a JPEG) takes."""
    width, height = image.size
    taken = width * height * (_BYTES.get(image.mode, _OF_OTHER_MODES) + _DECODERS.get(form, 0))
    if form == "TIFF":
        tags: Mapping[int, int] = getattr(image, "tag_v2", {})
        taken += 8 * int(tags.get(322) or 0) * int(tags.get(323) or 0)
    return taken


def jpeg_memory(frame: tuple[bool, float], size: tuple[int, int], target: tuple[int, int]) -> int:
    """Return the bytes of memory for decoding a JPEG of `size` to be scaled to `target`, both (width, height).

    `frame` is what `jpeg_frame` returns.
    """
    width, height = size
    # As Pillow's draft mode chooses, asked for twice the target.
    fewer = min(width // (2 * target[0]), height // (2 * target[1]))
    scale = 8 if fewer >= 8 else 4 if fewer >= 4 else 2 if fewer >= 2 else 1
    several, planes = frame
    coefficients = int(width * height * 2 * planes) if several else 0
    return width * height * 4 // scale**2 * (2 if planes > 3 else 1) + coefficients


def _bound(
    number: int, most: int, what: str, name: str, hint: str = "save the picture again with an image program"
) -> None:
    if number > most:
        raise MediaError(f"{name}: more than the limit of {most} {what}", hint=hint, code="image_too_large")
