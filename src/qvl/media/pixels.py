"""Converts encoded bytes, PIL images and arrays to one canonical RGB picture.

Canonical means: first frame, alpha composited on white, mode RGB with 8 bits, EXIF orientation applied, within the
pixel budget with the aspect ratio kept. ICC profiles are not applied, as in the processors that Qwen3-VL was trained
with.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from qvl.errors import MediaError
from qvl.media import file_structure
from qvl.media.digest_cache import DigestCache, Encoded
from qvl.media.image_header import (
    ORIENTATION_TAG,
    Header,
    check_size,
    exif_orientation,
    open_image,
    png_depth,
    reading,
    words_of,
)
from qvl.media.jpeg_integrity import skeleton
from qvl.media.png_integrity import whole_png
from qvl.media.policy import canonical_size

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from qvl.media.policy import MediaPolicy

# The memory of the process is one, whatever threads and pipelines there are.
_one_large: Final = threading.Lock()

# Without EXIF data and profiles, which are large, and the former different in each picture.
_USUAL_SEGMENTS: Final = 4096
_FEW_SEGMENTS: Final = 128 * 1024
_ENCODED: Final = (str, bytes, bytearray, memoryview, os.PathLike)
_CHANNELS: Final = (1, 3, 4)
TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, header: Header, policy: MediaPolicy, name: str) -> Image.Image:
    """Return the canonical RGB picture of `data`, whose header was probed under the same policy.

    Raises:
        MediaError: the file is cut short or broken.
    """
    size = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    with _turn(header), open_image(data, policy, name) as image, reading(name, header.format):
        _check_scans(data, image, name)
        if header.format == "JPEG" and image.size != size:
            # The decoder can drop pixels that the resize would average away; twice the target keeps the quality.
            image.draft(None, (size[0] * 2, size[1] * 2))
        image.load()
        if header.format == "PNG":
            _scale_transparent_colour(image, png_depth(data))
        return _oriented(resized(to_rgb(image, name), size), header.orientation)


def check(data: bytes, header: Header, policy: MediaPolicy, name: str) -> None:
    """Verify plain `data`: raise what `decode` would, for less time if possible.

    Raises:
        MediaError: the file is cut short or broken.
    """
    if header.format == "PNG" and whole_png(data, header.width, header.height):
        return
    if header.format != "JPEG":
        decode(data, header, policy, name)
        return
    if _whole_jpeg(data, header, policy, name):
        return
    with _turn(header), open_image(data, policy, name) as image, reading(name, header.format):
        _check_scans(data, image, name)
        # At an eighth of the size the decoder reads every code, and leaves out only what it would do with them.
        image.draft(None, (max(1, header.width // 8), max(1, header.height // 8)))
        image.load()


def surely_whole(data: bytes, header: Header, policy: MediaPolicy) -> bool:
    """True if plain `data` is whole, as far as a fraction of a millisecond for each MiB tells; False: see `check`."""
    front = header.front
    if front is None or (front.frame[0] and not file_structure.has_few_scans(data, header.width * header.height)):
        return False
    bare = skeleton(data, front)
    return bare is not None and len(bare) <= _FEW_SEGMENTS and _accepts(bare, policy)


def _whole_jpeg(data: bytes, header: Header, policy: MediaPolicy, name: str) -> bool:
    """True if a decoder is certain to accept `data`; False means that only decoding it can tell.

    Raises:
        MediaError: it has too many parts.
    """
    front = header.front
    if front is None or (bare := skeleton(data, front)) is None:
        return False
    if front.frame[0]:
        file_structure.check_scans(data, header.width * header.height, name)
    return _accepts(bare, policy)


def _accepts(bare: bytes, policy: MediaPolicy) -> bool:
    """True if a decoder accepts the JPEG `bare`."""
    try:
        (_accepted if len(bare) <= _USUAL_SEGMENTS else _accepted.__wrapped__)(bare, policy)
    except MediaError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _accepted(bare: bytes, policy: MediaPolicy) -> None:
    """Verify that a decoder accepts the JPEG `bare`; what one camera or encoder writes differs in its codes alone.

    Raises:
        MediaError: it does not.
    """
    with open_image(bare, policy, "") as image, reading("", "JPEG"):
        # At once, so that the decoder sees the segments behind the last scan as well.
        image.decodermaxblock = len(bare)
        image.load()


def _turn(header: Header) -> AbstractContextManager[object]:
    return _one_large if header.large else nullcontext()


def _check_scans(data: bytes, image: Image.Image, name: str) -> None:
    if image.format == "JPEG" and file_structure.jpeg_frame(data)[0]:
        file_structure.check_scans(data, image.width * image.height, name)


def canonical(image: Image.Image, policy: MediaPolicy, name: str) -> tuple[Image.Image, tuple[int, int], bool]:
    """Return (canonical RGB picture of an open image, EXIF orientation applied; its `Picture.original` and `sized`).

    Raises:
        MediaError: its pixels cannot be read or it breaks a limit of `policy`.
    """
    check_size(image.size, policy, name)
    with reading(name, image.mode):
        # Loaded first: a TIFF turns itself while it loads, and then drops its tag.
        image.load()
        orientation = _image_orientation(image)
        across, down = image.size
        original = (across, down)
        if orientation >= 5:
            original = (down, across)
            height, width, sized = canonical_size(*original, policy)
        else:
            width, height, sized = canonical_size(across, down, policy)
        rgb = resized(to_rgb(image, name), (width, height))
        return _oriented(rgb, orientation), original, sized


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return the image as 8-bit RGB: alpha on white, 16-bit grey scaled (never clipped), palettes, CMYK converted."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;"):
        return _deep_grey(image, name)
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    if image.has_transparency_data:
        return _on_white(image)
    if mode == "RGB":
        return image
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image on white, composited band by band to take twice its memory, not five times."""
    width, height = image.size
    rows = max(1, 2**20 // width)
    laid = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        laid.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return laid


def _deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Return grey of more than 8 bits as 8 bits: `I;16` and `I` are 0..65535 (high byte kept), `F` is 0..1."""
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F":
        if not (low >= 0.0 and high <= 1.0):
            raise MediaError(f"{name}: a float picture must hold values from 0 to 1", hint="rescale it, or pass uint8")
        grey = np.rint(values * 255.0).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise MediaError(f"{name}: grey levels must fit in 16 bits", hint="rescale them to 0..255")
        grey = (values.astype(np.uint32) >> 8).astype(np.uint8)
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a LANCZOS copy of `size`; `image` itself if it has that size."""
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def encode_png(image: Image.Image) -> bytes:
    """Return the image as PNG, at compression level 1: much faster, and only a tenth larger."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def array_of(source: Any) -> ArrayLike | None:
    """Return an array or tensor of any library as a numpy array; None for anything else.

    A torch tensor is taken as channels first (CxHxW) unless only its last dimension can be channels.

    Raises:
        MediaError: its library cannot convert it.
    """
    if isinstance(source, np.ndarray):
        return source
    # While another thread still imports torch it has no Tensor yet, and nobody can have made one.
    tensors = getattr(sys.modules.get("torch"), "Tensor", None)
    is_tensor = tensors is not None and isinstance(source, tensors)
    if not is_tensor and (callable(getattr(source, "read", None)) or isinstance(source, _ENCODED)):
        return None
    try:
        if is_tensor:
            tensor = source.detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            values: NDArray[np.generic] = tensor.resolve_conj().resolve_neg().numpy()
            first = values.ndim == 3 and values.shape[0] in _CHANNELS
            return values.transpose(1, 2, 0) if first else values
        if callable(getattr(source, "__array__", None)):
            return np.asarray(source)
        if callable(getattr(source, "__dlpack__", None)):
            return np.from_dlpack(source)
    except Exception as exc:
        what = f"a {type(source).__name__} cannot be read as an array: {words_of(exc)}"
        raise MediaError(what, hint="pass a numpy array") from exc
    return None


def from_array(array: ArrayLike) -> Image.Image:
    """Return the image of an array HxW, HxWx1, HxWx3 (RGB) or HxWx4 (RGBA) of uint8, or of floats from 0 to 1.

    Raises:
        MediaError: any other shape, dtype or range.
    """
    values = np.asarray(array)
    shape = "x".join(map(str, values.shape)) or "scalar"
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise MediaError(
            f"unsupported array shape {shape} for a picture",
            hint="HxW, HxWx1, HxWx3 or HxWx4, channels last; a torch tensor CxHxW too; one picture at a time",
        )
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):
            raise MediaError("a float array must hold values from 0 to 1", hint="divide by 255, or pass uint8")
        values = np.rint(values.astype(np.float64) * 255.0).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise MediaError(
            f"unsupported array dtype {values.dtype} for a picture", hint="pass uint8, or floats from 0 to 1"
        )
    return Image.fromarray(np.ascontiguousarray(values))


def fingerprint(image: Image.Image, digests: DigestCache | None = None) -> str:
    """Return the sha256 over all parts of an open image that decide its canonical pixels, each with its length.

    `digests` caches it for equal images.
    """
    with reading("<PIL.Image>", image.mode):
        image.load()
        palette = image.palette
        pieces = (
            b"qvl.media.pixels.1",
            image.mode.encode(),
            struct.pack(">QQ", *image.size),
            image.tobytes(),
            b"" if palette is None else palette.mode.encode() + bytes(image.getpalette(palette.mode) or ()),
            repr(image.info.get("transparency")).encode(),
            bytes([_image_orientation(image)]),
        )
    framed = b"".join([part for piece in pieces for part in (len(piece).to_bytes(8, "big"), piece)])
    return (Encoded(framed) if digests is None else digests.encoded(framed)).sha256


def _scale_transparent_colour(image: Image.Image, depth: int) -> None:
    """Scale the transparent colour of a PNG in place from `depth` bits to the 8 bits of the decoded pixels.

    Pillow leaves it unscaled. A 16-bit colour loses its low byte, as the pixels did.
    """
    key = image.info.get("transparency")
    if image.mode == "L" and depth in (2, 4) and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _image_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an open image, also if it was set in memory."""
    value = image.getexif().get(ORIENTATION_TAG, 1)
    if value != 1 and ("xmp" in image.info or "XML:com.adobe.xmp" in image.info):
        # Pillow believes XMP too, which browsers and other decoders do not.
        block = image.info.get("exif")
        return exif_orientation(block) if isinstance(block, bytes) else 1
    return value if value in TRANSPOSE else 1


def _oriented(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image
