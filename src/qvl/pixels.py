"""Encoded bytes, PIL images and arrays to one canonical RGB picture: what the media gate does to pixels.

Canonical means: first frame, alpha laid on white, mode RGB with 8 bits, EXIF orientation applied, within the pixel
budget with the aspect ratio kept. ICC profiles are not applied: pixels stay as they are stored, as the processors that
Qwen3-VL was trained with have it.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image, ImageOps

from qvl.errors import MediaError

if TYPE_CHECKING:
    from qvl.media import MediaPolicy

MEDIA_TYPES: Final = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
}
# Formats that every endpoint and browser decodes to the same pixels when the picture is plain 8-bit RGB.
PORTABLE: Final = frozenset({"JPEG", "PNG", "WEBP"})
ORIENTATION_TAG: Final = 0x0112
TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of an encoded picture before its pixels are decoded. `width` and `height` are the canonical ones.

    `plain`: every decoder reads these bytes to the canonical pixels, so they may be passed on as they are.
    """

    format: str
    width: int
    height: int
    orientation: int
    plain: bool

    @property
    def media_type(self) -> str:
        return MEDIA_TYPES.get(self.format, f"image/{self.format.lower()}")


def probe(data: bytes, policy: MediaPolicy, name: str) -> Header:
    """Reads the header of `data` and holds it against the policy; no pixel is decoded.

    Raises:
        MediaError: no picture, a format that is not allowed, or a limit of `policy` is broken.
    """
    with _open(data, policy, name) as image:
        form = _format_of(image)
        width, height = _checked_size(image.size, policy, name)
        frames = _frames(image, data, form, policy, name)
        orientation = _orientation(image, data, form)
        if orientation >= 5:
            width, height = height, width
        size = budget(width, height, policy.max_pixels)
        plain = (
            form in PORTABLE
            and image.mode == "RGB"
            and frames == 1
            and orientation == 1
            and size == (width, height)
            and "transparency" not in image.info
            and not (form == "PNG" and data[24:25] != b"\x08")
        )
        return Header(form, *size, orientation, plain)


def decode(data: bytes, header: Header, policy: MediaPolicy, name: str) -> Image.Image:
    """The canonical RGB picture of `data`, whose header was probed under the same policy.

    Raises:
        MediaError: the file is cut short or broken.
    """
    size = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    with _open(data, policy, name) as image:
        try:
            if header.format == "JPEG" and image.size != size:
                # The decoder can drop pixels that the resize would average away; twice the target keeps the quality.
                image.draft(None, (size[0] * 2, size[1] * 2))
            image.load()
            return _orient(resized(to_rgb(image, name), size), header.orientation)
        except MediaError:
            raise
        except Exception as exc:
            raise broken(name, header.format, exc) from exc


def canonical(image: Image.Image, policy: MediaPolicy, name: str) -> Image.Image:
    """The canonical RGB picture of an image that is already open; its own EXIF orientation is applied.

    Raises:
        MediaError: its pixels cannot be read or it breaks a limit of `policy`.
    """
    _checked_size(image.size, policy, name)
    try:
        # Transposed first, since a lazy file may transpose itself while it loads and then forgets its tag.
        image.load()
        upright = ImageOps.exif_transpose(image)
        return resized(to_rgb(upright, name), budget(*upright.size, policy.max_pixels))
    except MediaError:
        raise
    except Exception as exc:
        raise broken(name, image.mode, exc) from exc


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Mode RGB, 8 bits a channel: alpha on white, 16-bit grey scaled (never clipped), palettes and CMYK converted."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;"):
        return _deep_grey(image, name)
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode == "RGB":
        return image
    return image.convert("RGB")


def _deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bits: `I;16` and `I` hold 0..65535 (high byte kept, as for 16-bit RGB), `F` holds 0..1."""
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F":
        if not (low >= 0.0 and high <= 1.0):
            raise MediaError(f"{name}: a float picture must hold values from 0 to 1", hint="rescale it, or pass uint8")
        grey = np.rint(values * 255.0).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise MediaError(f"{name}: integers beyond 16 bits are no grey levels", hint="rescale them to 0..255")
        grey = (values.astype(np.uint32) >> 8).astype(np.uint8)
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` itself when it has that size already, else a LANCZOS copy."""
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def budget(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The largest size within `max_pixels` that keeps the aspect ratio, at least 1 x 1; never larger than given."""
    if width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    return min(new_width, max_pixels // new_height), min(new_height, max_pixels // new_width)


def encode_png(image: Image.Image) -> bytes:
    """Lossless; level 1, since the time it takes counts for more than a tenth of the size."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def from_array(array: Any) -> Image.Image:
    """HxW, HxWx1, HxWx3 (RGB) or HxWx4 (RGBA) of uint8, or of floats from 0 to 1.

    Raises:
        MediaError: any other shape, dtype or range.
    """
    values = np.asarray(array)
    shape = "x".join(map(str, values.shape)) or "scalar"
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise MediaError(f"an array of shape {shape} is no picture", hint="HxW, HxWx1, HxWx3 or HxWx4, channels last")
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):
            raise MediaError("a float array must hold values from 0 to 1", hint="divide by 255, or pass uint8")
        values = np.rint(values.astype(np.float64) * 255.0).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise MediaError(f"an array of {values.dtype} is no picture", hint="pass uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(values))


def fingerprint(image: Image.Image) -> str:
    """sha256 over everything of an open image that decides its canonical pixels, each piece framed by its length."""
    try:
        image.load()
        pieces = (
            b"qvl.pixels.1",
            image.mode.encode(),
            struct.pack(">QQ", *image.size),
            image.tobytes(),
            _palette(image),
            repr(image.info.get("transparency")).encode(),
            str(image.getexif().get(ORIENTATION_TAG, 1)).encode(),
        )
    except Exception as exc:
        raise broken("<PIL.Image>", image.mode, exc) from exc
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "big"))
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def broken(name: str, form: str, exc: BaseException) -> MediaError:
    """The error for a picture whose decoder gave up; the decoder's own words go along, on one line."""
    reason = " ".join(str(exc).split())[:120] or type(exc).__name__
    return MediaError(
        f"{name}: the {form} picture is cut short or broken: {reason}",
        hint="save or download it again",
        code="image_decode_failed",
    )


def _palette(image: Image.Image) -> bytes:
    if image.palette is None:
        return b""
    return image.palette.mode.encode() + bytes(image.getpalette(image.palette.mode) or ())


def _open(data: bytes, policy: MediaPolicy, name: str) -> Image.Image:
    """Opens with the allowed decoders alone.

    Not `Image.open`: its size check warns or raises by a process-wide setting, where the limit here is the policy's.
    """
    if not data:
        raise MediaError(f"{name} is empty", hint="0 bytes; save or download it again", code="image_decode_failed")
    Image.init()
    for form in sorted(policy.formats):
        if form not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[form]
        if accept is not None and accept(data[:16]) is not True:
            continue
        try:
            return factory(io.BytesIO(data), "")
        except Exception as exc:
            raise broken(name, form, exc) from exc
    raise MediaError(*_unreadable(data, policy, name), code="image_decode_failed")


def _unreadable(data: bytes, policy: MediaPolicy, name: str) -> tuple[str]:
    return (f"{name} is not a picture: it starts like {_kind(data)}; accepted are {', '.join(sorted(policy.formats))}",)


def _kind(data: bytes) -> str:
    """What the first bytes look like, in a reader's words."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in data[:4096]):
        return "an SVG drawing (render it to PNG first)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
            return "HEIC (convert it to JPEG first; on an iPhone, Settings > Camera > Formats > Most Compatible)"
        if brand in (b"avif", b"avis"):
            return "AVIF (this Pillow reads none, or the policy allows none; convert it to JPEG or PNG first)"
        return "a video"
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    sample = data[:512]
    if all(byte >= 32 or byte in b"\t\r\n\f\x1b" for byte in sample):
        try:
            sample.decode()
        except UnicodeDecodeError as exc:
            return "text" if exc.start > len(sample) - 4 else "data of no known kind"
        return "text"
    return "data of no known kind"


_MAGIC: Final = (
    (b"%PDF", "a PDF document (render its pages to PNG first)"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"8BPS", "a Photoshop document (export it as PNG first)"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"RIFF", "WebP or another RIFF file"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL (convert it to PNG first)"),
    (b"\xff\x0a", "JPEG XL (convert it to PNG first)"),
)


def _format_of(image: Image.Image) -> str:
    """Pillow's name, where MPO (JPEG with more pictures behind the first, as phones write it) is JPEG."""
    return "JPEG" if image.format == "MPO" else (image.format or "")


def _checked_size(size: tuple[int, int], policy: MediaPolicy, name: str) -> tuple[int, int]:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name}: a picture of {width} x {height} pixels has nothing to see")
    if width * height > policy.max_source_pixels:
        raise MediaError(
            f"{name}: {width} x {height} pixels are more than the limit of {policy.max_source_pixels}",
            hint="make it smaller first",
            code="image_too_large",
        )
    if max(width, height) > policy.max_aspect * min(width, height):
        raise MediaError(
            f"{name}: {width} x {height} pixels is an aspect ratio above {policy.max_aspect:g}",
            hint="crop it to a less narrow picture",
        )
    return width, height


def _frames(image: Image.Image, data: bytes, form: str, policy: MediaPolicy, name: str) -> int:
    """The number of frames, counted no further than the limit; a TIFF's pages are its frames."""
    try:
        frames = int(getattr(image, "n_frames", 1))
    except Exception as exc:
        raise broken(name, form, exc) from exc
    if frames > policy.max_frames:
        raise MediaError(
            f"{name}: more than {policy.max_frames} frames",
            hint="send one of its frames",
            code="image_too_large",
        )
    return max(frames, 1)


def _orientation(image: Image.Image, data: bytes, form: str) -> int:
    """EXIF orientation, 1 to 8; what is not a valid one counts as 1, as in browsers."""
    if form == "TIFF":
        return 1  # Pillow turns a TIFF itself while it loads, and reports the turned size.
    raw = image.info.get("exif") or (_png_exif(data) if form == "PNG" else None)
    if not raw:
        return 1
    exif = Image.Exif()
    try:
        exif.load(raw)
        value = exif.get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - a broken EXIF block turns nothing; the pixels are still good
        return 1
    return value if value in TRANSPOSE else 1


def _png_exif(data: bytes) -> bytes | None:
    """The eXIf chunk, which may stand behind the pixels, where Pillow has not looked yet after opening."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            return b"Exif\x00\x00" + data[at + 8 : at + 8 + length]
        at += 12 + length
    return None


def _orient(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image
