"""Reads the header of encoded pictures before decoding: format, size, frames, orientation; checks the limits.

Limits are checked here, on the header, so that a picture that breaks one costs nothing. Frames and orientation are
read from the bytes directly, since Pillow walks every frame to count them and warns about EXIF blocks it dislikes.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import contextmanager
from itertools import islice
from typing import IO, TYPE_CHECKING, Final, NamedTuple

from qvl.errors import MediaError
from qvl.media import avif_structure, file_structure
from qvl.media.file_structure import ByteOrder
from qvl.media.jpeg_front import JpegFront, jpeg_front
from qvl.media.jxl_size import CODESTREAM, CONTAINER, jxl_size
from qvl.media.policy import canonical_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from PIL import Image, ImageFile

    from qvl.media.policy import MediaPolicy

_PNG: Final = b"\x89PNG\r\n\x1a\n"
MEDIA_TYPES: Final = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
# Formats that every endpoint and browser decodes to the same pixels when the picture is plain 8-bit RGB.
PORTABLE: Final = frozenset(MEDIA_TYPES)
ORIENTATION_TAG: Final = 0x0112
_LARGE_MEMORY: Final = 72 * 2**20
_LARGE_PIXELS: Final = 2**25
# Bytes given to a decoder at a time, after each of which its time is looked at.
_BLOCK: Final = 16 * 1024


class Header(NamedTuple):
    """The header of an encoded picture. `width` and `height` are the canonical ones.

    `original`: (width, height) of the source, upright.
    `sized`: a request set the size.
    `plain`: every decoder decodes these bytes to the canonical pixels, so they may be passed on unchanged.
    `large`: decoding takes so much time or memory that only one such picture is decoded at a time.
    `front`: of a usual colour JPEG.
    """

    format: str
    width: int
    height: int
    original: tuple[int, int]
    orientation: int
    plain: bool
    sized: bool
    large: bool
    front: JpegFront | None

    @property
    def media_type(self) -> str:
        """The media type of the canonical bytes: the source's if they are passed on unchanged, else PNG's."""
        return MEDIA_TYPES[self.format] if self.plain else MEDIA_TYPES["PNG"]


def probe(data: bytes, policy: MediaPolicy, name: str) -> Header:
    """Return the header of `data`, checked against the policy.

    Raises:
        MediaError: no picture, a format that is not allowed, or a limit of `policy` is broken.
    """
    if "JPEG" in policy.formats and (front := jpeg_front(data)) is not None:
        return _of_jpeg(front, policy, name)
    if (coded := jxl_size(data) if sniff(data) == "JXL" else None) is not None:
        # Its decoder decodes when it opens.
        check_size(coded, policy, name)
        _check_memory("JXL", coded, policy, name, coded[0] * coded[1] * file_structure.OF_JXL)
    with open_image(data, policy, name) as image:
        form = image.format or ""
        check_size(image.size, policy, name)
        if coded is not None and sorted(coded) != sorted(image.size):
            raise MediaError(f"{name}: {image.size} pixels where its header says {coded}", hint="save it again")
        if form == "AVIF":
            avif_structure.check(data, image.size, name)
        frames = _frames(image, data, form, policy, name)
        # The decoders of these turn a picture by themselves, but for a JPEG within JPEG XL.
        turned = form in ("TIFF", "HEIF") or (form == "JXL" and not getattr(image, "jpeg", False))
        orientation = 1 if turned else _orientation(image, data, form)
        simple = (
            image.mode == "RGB"
            and frames == 1
            and "transparency" not in image.info
            and (form != "PNG" or png_depth(data) == 8)
        )
        size = _tiff_size(image) if form == "TIFF" else image.size
        held = file_structure.jpeg_frame(data) if form == "JPEG" else file_structure.memory(image, form)
        return _header(form, size, orientation, policy, name, held, simple=simple)


def probe_at_once(data: bytes, policy: MediaPolicy, name: str) -> Header | None:
    """Return what `probe` does if that is very fast, else None.

    It is for a colour JPEG, and for a PNG of few chunks, none of them compressed text.
    """
    if data.startswith(_PNG):
        return probe(data, policy, name) if file_structure.is_plain_png(data) else None
    front = jpeg_front(data) if "JPEG" in policy.formats else None
    return None if front is None else _of_jpeg(front, policy, name)


def _of_jpeg(front: JpegFront, policy: MediaPolicy, name: str) -> Header:
    size = (front.width, front.height)
    check_size(size, policy, name)
    orientation = exif_orientation(front.exif) if front.exif else 1
    return _header("JPEG", size, orientation, policy, name, front.frame, simple=True, front=front)


def _header(
    form: str,
    size: tuple[int, int],
    orientation: int,
    policy: MediaPolicy,
    name: str,
    held: int | tuple[bool, float],
    *,
    simple: bool,
    front: JpegFront | None = None,
) -> Header:
    """Return the Header after checking the limits.

    `held`: bytes of memory that decoding takes; of a JPEG what `file_structure.jpeg_frame` returns.
    `simple`: one frame of opaque 8-bit RGB pixels.
    """
    upright = size[::-1] if orientation >= 5 else size
    width, height, sized = canonical_size(*upright, policy)
    if not isinstance(held, int):
        held = file_structure.jpeg_memory(held, upright, (width, height))
    _check_memory(form, size, policy, name, held)
    large = held > _LARGE_MEMORY or size[0] * size[1] > _LARGE_PIXELS
    plain = simple and form in PORTABLE and orientation == 1 and (width, height) == upright
    return Header(form, width, height, upright, orientation, plain, sized, large, front)


def _check_memory(form: str, size: tuple[int, int], policy: MediaPolicy, name: str, memory: int) -> None:
    if memory > policy.max_decode_bytes:
        raise MediaError(
            f"{name}: decoding {size[0]} x {size[1]} pixels of {form} takes {memory // 2**20} MiB, more than the limit"
            f" of {policy.max_decode_bytes // 2**20} MiB",
            hint="make the picture smaller first, or raise MediaPolicy.max_decode_bytes or qvl-serve --max-decode-mb",
            code="image_too_large",
        )


def open_image(data: bytes, policy: MediaPolicy, name: str) -> ImageFile.ImageFile:
    """Return the opened picture, not decoded; only the policy's decoders are tried.

    Not `Image.open`: its size check warns or raises by a process-wide setting, where the limit here is the policy's.
    """
    if not data:
        raise MediaError(f"{name} is empty", hint="0 bytes; save or download it again", code="image_decode_failed")
    form = sniff(data)
    decoder = _decoder(form) if form in policy.formats else None
    if decoder is not None:
        file_structure.check(data, form, policy.max_frames, name)
        with reading(name, form):
            image = decoder(file_structure.TimedBytes(data, policy.max_decode_seconds, name), "")
            image.decodermaxblock = _BLOCK
            return image
    what, hint = "a picture", f"accepted are {', '.join(sorted(policy.formats))}"
    if name.partition("#")[0].lower().endswith(".pdf"):
        what, hint = "a PDF", "one starts with %PDF; save or download it again"
    raise MediaError(f"{name} is not {what}: it starts like {kind_of(data)}", hint=hint, code="image_decode_failed")


def sniff(data: bytes) -> str:
    """Return the format by the first bytes, "" if it is unknown."""
    if data[4:8] == b"ftyp":
        if data[8:12] in (b"avif", b"avis") or (data[8:12] in (b"mif1", b"msf1") and b"avif" in data[16:64]):
            return "AVIF"
        return "HEIF" if data[8:12] in _HEIF_BRANDS else ""
    if data.startswith((CONTAINER, CODESTREAM)):
        return "JXL"
    if data[:4] == b"RIFF":
        return "WEBP" if data[8:12] == b"WEBP" else ""
    return next((form for magic, form in _PICTURES if data.startswith(magic)), "")


@functools.cache
def _decoder(form: str) -> Callable[[IO[bytes], str], ImageFile.ImageFile] | None:
    """Return Pillow's decoder class of one format, None if this Pillow was built without it.

    Not the registered factory, which turns a phone's JPEG with several pictures into another format, and which needs
    every plugin imported.
    """
    module, name = _BESIDE.get(form) or (f"PIL.{_PLUGINS[form]}ImagePlugin", f"{_PLUGINS[form]}ImageFile")
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        return None
    if not getattr(plugin, "SUPPORTED", True):
        return None
    decoder: Callable[[IO[bytes], str], ImageFile.ImageFile] = getattr(plugin, name)
    return decoder


@contextmanager
def reading(name: str, form: str) -> Iterator[None]:
    """Turn a decoder's exceptions into a MediaError of one line that quotes them."""
    try:
        yield
    except MediaError:
        raise
    except Exception as exc:
        raise MediaError(
            f"{name}: the {form} picture is cut short or broken: {words_of(exc)}",
            hint="save or download it again",
            code="image_decode_failed",
        ) from exc


def words_of(exc: Exception) -> str:
    """Return an exception's message on one line, or its class name."""
    return " ".join(str(exc).split())[:120] or type(exc).__name__


def check_size(size: tuple[int, int], policy: MediaPolicy, name: str) -> None:
    """Raise MediaError if the size of a source breaks the policy."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name}: a picture of {width} x {height} pixels is empty", hint="save it again")
    if width * height > policy.max_source_pixels:
        raise MediaError(
            f"{name}: {width} x {height} pixels are more than the limit of {policy.max_source_pixels}",
            hint="make the picture smaller first",
            code="image_too_large",
        )
    if max(width, height) > policy.max_aspect * min(width, height):
        raise MediaError(
            f"{name}: {width} x {height} pixels have an aspect ratio above {policy.max_aspect:g}",
            hint="crop it to a less narrow picture",
        )


def png_depth(data: bytes) -> int:
    """Return the bits per channel of a PNG, from its IHDR chunk."""
    return data[24] if len(data) > 24 else 0


def kind_of(data: bytes) -> str:
    """Return a description of bytes that are not an accepted picture, with the way out if there is one."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in data[:4096]):
        return "an SVG drawing; render it to PNG first"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if data[4:8] == b"ftyp":
        if data[8:12] in _HEIF_BRANDS:
            return f"HEIC; {_INSTALL}"
        if data[8:12] in (b"avif", b"avis"):
            return "AVIF; convert it to JPEG or PNG first, or install a Pillow that reads it (11.3 or later)"
        return "a video; pass it as a video, or one of its frames"
    for magic, kind in _OTHERS + _PICTURES:
        if data.startswith(magic):
            return kind
    return "text" if _is_text(data[:512]) else "data of an unknown kind"


_PICTURES: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)
# As in the names of Pillow's plugins and of the classes in them.
_PLUGINS: Final = {
    "JPEG": "Jpeg",
    "PNG": "Png",
    "GIF": "Gif",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "WEBP": "WebP",
    "AVIF": "Avif",
}
# Of the extra `formats`.
_BESIDE: Final = {
    "HEIF": ("pillow_heif.as_plugin", "HeifImageFile"),
    "JXL": ("pillow_jxl.JpegXLImagePlugin", "JXLImageFile"),
}
_HEIF_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_INSTALL: Final = "pip install 'qvl[formats]' reads it, or convert it to JPEG or PNG"
_OTHERS: Final = (
    (b"%PDF", "a PDF document; its pages are pictures: qvl.media.load_document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"8BPS", "a Photoshop document; export it as PNG first"),
    (b"RIFF", "WebP or another RIFF file"),
    (b"\x00\x00\x01\x00", "an icon; save it as PNG first"),
    (CONTAINER, f"JPEG XL; {_INSTALL}"),
    (CODESTREAM, f"JPEG XL; {_INSTALL}"),
)


def _is_text(sample: bytes) -> bool:
    if any(byte < 32 and byte not in b"\t\r\n\f\x1b" for byte in sample):
        return False
    try:
        sample.decode()
    except UnicodeDecodeError as exc:
        # A character may be cut by the end of the sample.
        return exc.start > len(sample) - 4
    return True


def _frames(image: Image.Image, data: bytes, form: str, policy: MediaPolicy, name: str) -> int:
    """Return the number of frames (pages of a TIFF), counted up to one beyond the limit."""
    walk = {"GIF": _gif_frames, "TIFF": _tiff_pages}.get(form)
    if walk is not None:
        frames = sum(1 for _ in islice(walk(data), policy.max_frames + 1))
    else:
        frames = int(getattr(image, "n_frames", 1))
    if frames > policy.max_frames:
        raise MediaError(
            f"{name}: more than the limit of {policy.max_frames} frames",
            hint="send one of its frames",
            code="image_too_large",
        )
    return frames


def _gif_frames(data: bytes) -> Iterator[int]:
    """Yield the index of each frame's pixels (GIF89a, sections 18 to 27); a file that is cut short just ends."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while at + 10 < len(data):
        if data[at] == 0x21:
            at += 2
        elif data[at] == 0x2C:
            flags = data[at + 9]
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            yield at
        else:
            return
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1


def _tiff_pages(data: bytes) -> Iterator[int]:
    """Yield the offset of each page's directory (TIFF 6.0, section 2; BigTIFF); a looping chain never ends."""
    order: ByteOrder = "little" if data[:1] == b"I" else "big"
    big = int.from_bytes(data[2:4], order) == 43
    word, head, entry = (8, 8, 20) if big else (4, 2, 12)
    at = int.from_bytes(data[8:16] if big else data[4:8], order)
    while at and at + head <= len(data):
        yield at
        end = at + head + entry * int.from_bytes(data[at : at + head], order)
        at = int.from_bytes(data[end : end + word], order)


def _orientation(image: Image.Image, data: bytes, form: str) -> int:
    """Return the EXIF orientation, 1 to 8; an invalid one counts as 1, as in browsers."""
    block = image.info.get("exif")
    if not block and form == "PNG":
        # The chunk may stand behind the pixels, where Pillow has not looked yet after opening.
        block = next((data[content] for kind, content in file_structure.png_chunks(data) if kind == b"eXIf"), b"")
    return exif_orientation(block) if isinstance(block, bytes) else 1


def _tiff_size(image: Image.Image) -> tuple[int, int]:
    """Return the upright size: Pillow rotates a TIFF while loading, and its size before that depends on the version."""
    tags: Mapping[int, int] = getattr(image, "tag_v2", {})
    sideways = tags.get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    stored = (tags.get(0x0100), tags.get(0x0101))
    return image.size[::-1] if sideways and stored == image.size else image.size


def exif_orientation(block: bytes) -> int:
    """Return the orientation in an EXIF block (Exif 2.32, section 4.6.4), 1 if it is missing or invalid."""
    tiff = block.removeprefix(b"Exif\x00\x00")
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    order: ByteOrder = "little" if tiff[:2] == b"II" else "big"
    at = int.from_bytes(tiff[4:8], order)
    for index in range(int.from_bytes(tiff[at : at + 2], order)):
        entry = tiff[at + 2 + 12 * index : at + 14 + 12 * index]
        if len(entry) < 12:
            return 1
        if int.from_bytes(entry[:2], order) == ORIENTATION_TAG:
            value = int.from_bytes(entry[8:10], order)
            return value if 1 <= value <= 8 else 1
    return 1
