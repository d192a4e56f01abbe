"""Picture, the result of the media gate; its pixels are decoded on first use."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from qvl.media import base64_codec
from qvl.media.digest_cache import Encoded
from qvl.media.policy import MediaPolicy, canonical_size
from qvl.media.smart_resize import budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from PIL import Image

PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any] | Picture"
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that passed the media gate. Equal if the source and the canonical size are equal.

    Thread-safe. `sha256` and `data` may be computed (hashed, checked or encoded) on first use.

    Args:
        sha256: `sha256:` and the hex digest, of the source bytes for encoded pictures, of mode, size and pixels for
            PIL images and arrays.
        width: canonical width in pixels (after EXIF, within the budget).
        height: canonical height in pixels.
        data: encoded canonical picture: the source bytes themselves when every decoder reads them alike (plain 8-bit
            RGB as JPEG, PNG or WebP, one frame, not turned, within the budget), else a lossless PNG.
        media_type: of `data`, as `image/png`.
        source: short display name: a path, a URL without query and credentials, `<bytes>`, `<PIL.Image>`.
        untouched: True if `data` are the source bytes.
        sized: True if a request set the size, so that the model's own lower limit does not change it again.
    """

    sha256: str
    width: int
    height: int
    data: bytes = field(repr=False, compare=False)
    media_type: str = field(compare=False)
    source: str = field(compare=False)
    untouched: bool = field(compare=False)
    sized: bool = False
    _original: tuple[int, int] | None = field(default=None, repr=False, compare=False)
    _pixels: LazyPixels | None = field(default=None, repr=False, compare=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            # Reached for these two alone, whose slots stay empty until they are needed.
            if name == "data" and self._pixels is not None:
                object.__setattr__(self, "data", self._pixels.encoded())
                return self.data
            if name == "sha256" and self._pixels is not None:
                object.__setattr__(self, "sha256", self._pixels.sha256)
                return self.sha256
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> tuple[type[Picture], tuple[object, ...]]:
        # Locks and open images do not pickle; the canonical bytes say everything.
        state = (self.sha256, self.width, self.height, self.data, self.media_type, self.source, self.untouched)
        return Picture, (*state, self.sized, self.original)

    @property
    def original(self) -> tuple[int, int]:
        """(width, height) of the source in pixels, after EXIF and before any budget; the canonical size if unknown."""
        return self._original or (self.width, self.height)

    def rgb(self) -> Image.Image:
        """Return the canonical picture decoded, in mode RGB, as a copy for the caller.

        Raises:
            MediaError: the source bytes are cut short or broken (only when loaded with `decode=False`).
        """
        if self._pixels is not None:
            return self._pixels.rgb()
        from PIL import Image

        with Image.open(io.BytesIO(self.data)) as image:
            return image.convert("RGB")

    def data_url(self) -> str:
        """Return the canonical bytes (`data`) as a base64 `data:` URL."""
        return f"data:{self.media_type};base64,{base64_codec.encoded(self.data).decode('ascii')}"

    def base64(self) -> bytes | memoryview:
        """Return the canonical bytes (`data`) as base64: the very text that the picture came as, where it is that.

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        text = None if self._pixels is None else self._pixels.text
        if text is None or not self.untouched:
            return base64_codec.encoded(self.data)
        self.checked()
        return text

    def thumbnail(self, edge: int = 256) -> Picture:
        """Return a JPEG copy whose longer side is at most `edge` pixels; itself if it is small enough."""
        if max(self.width, self.height) <= edge:
            return self
        from qvl.media import pixels

        scale = edge / max(self.width, self.height)
        size = (max(1, round(self.width * scale)), max(1, round(self.height * scale)))
        data = pixels.encode_jpeg(pixels.resized(self.rgb(), size))
        return Picture(self.sha256, *size, data, "image/jpeg", self.source, untouched=False, _original=self.original)

    def fit(self, max_pixels: int) -> Picture:
        """Return a copy downscaled to `max_pixels` with its aspect ratio kept; itself if it fits already."""
        return self._resized(budget(self.width, self.height, max_pixels), self.sized)

    def under(self, policy: MediaPolicy) -> Picture:
        """Return a copy of the canonical size under `policy`; itself if it has that size already."""
        width, height, sized = canonical_size(self.width, self.height, policy)
        return self._resized((width, height), sized or self.sized)

    def _resized(self, size: tuple[int, int], sized: bool) -> Picture:
        from qvl.media import pixels

        if size != (self.width, self.height):
            lazy = LazyPixels(rgb=pixels.resized(self.rgb(), size))
            return _deferred(self.sha256, size, self.source, lazy, self.original, untouched=False, sized=sized)
        if sized == self.sized:
            return self
        lazy = self._pixels or LazyPixels(rgb=self.rgb())
        media_type, untouched = self.media_type, self.untouched
        return _deferred(
            self.sha256, size, self.source, lazy, self.original, media_type, untouched=untouched, sized=sized
        )

    def decoded(self) -> Picture:
        """Return itself, with the source bytes verified (by decoding, which makes the next `rgb()` free).

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        if self._pixels is not None:
            self._pixels.settle()
        return self

    def checked(self) -> Picture:
        """Return itself, with the source bytes verified, so that `data` can be sent to another decoder.

        Where the source bytes are passed on unchanged this is cheaper than decoding them.

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        if self._pixels is not None:
            self._pixels.verify(keep=True)
        return self

    @property
    def large(self) -> bool:
        """True if decoding takes so much time or memory that only one such picture is decoded at a time."""
        return self._pixels is not None and self._pixels.large

    @property
    def whole(self) -> object:
        """Something that all pages of one document share; None for a picture that is no page."""
        return None if self._pixels is None else self._pixels.whole

    def hold(self) -> None:
        """Decode the picture, so that its next `rgb()` or `data` takes no time.

        Raises:
            MediaError: the source is cut short or broken.
        """
        if self._pixels is not None:
            self._pixels.hold()

    def checked_at_once(self) -> bool:
        """Verify the source bytes if that takes less time than a change of thread; False: it may take longer.

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        return self._pixels is None or self._pixels.verify_at_once()

    @property
    def hashed(self) -> bool:
        """True if `sha256` returns immediately: it is known, or that of few bytes."""
        return self._pixels is None or self._pixels.hashed

    @property
    def at_hand(self) -> bool:
        """True if `data` returns immediately, without encoding or checking."""
        return self._pixels is None or self._pixels.at_hand


def _deferred(
    sha256: str | None,
    size: tuple[int, int],
    source: str,
    lazy: LazyPixels,
    original: tuple[int, int],
    media_type: str = "image/png",
    *,
    untouched: bool,
    sized: bool,
) -> Picture:
    """Return a Picture whose `data` is computed on first use, and `sha256` too if it is None."""
    picture = object.__new__(Picture)
    if sha256 is not None:
        object.__setattr__(picture, "sha256", sha256)
    object.__setattr__(picture, "width", size[0])
    object.__setattr__(picture, "height", size[1])
    object.__setattr__(picture, "media_type", media_type)
    object.__setattr__(picture, "source", source)
    object.__setattr__(picture, "untouched", untouched)
    object.__setattr__(picture, "sized", sized)
    object.__setattr__(picture, "_original", original)
    object.__setattr__(picture, "_pixels", lazy)
    return picture


class LazyPixels:
    """Decodes and encodes the pixels of a Picture lazily; thread-safe.

    Encoded bytes are decoded only for their pixels, and verified when they are passed on, so that a cache hit costs a
    header and a hash; PNG is made only to send the picture on. Decoded pixels are kept until their first use only:
    thousands of results may refer to their pictures, and bytes are a fraction of pixels.

    Args:
        rgb: the pixels of a source that cannot be decoded again.
        encoded: the bytes of a source that can be decoded again, with the flag that they were verified.
        decode: decodes the bytes.
        check: set if the bytes are passed on unchanged: verifies them for less than `decode`, with the same errors.
        at_once: returns True if the bytes are sure to be whole, within the time of a change of thread; None: `check`
            takes no longer than that.
        large: only one such picture is to be decoded at a time.
        text: the bytes as base64.
        whole: stands for the document that the picture is a page of.
    """

    __slots__ = ("_at_once", "_check", "_decode", "_encoded", "_lock", "_rgb", "large", "text", "whole")

    def __init__(
        self,
        *,
        rgb: Image.Image | None = None,
        encoded: Encoded | None = None,
        decode: Callable[[], Image.Image] | None = None,
        check: Callable[[], None] | None = None,
        at_once: Callable[[], bool] | None = None,
        large: bool = False,
        text: memoryview | None = None,
        whole: object = None,
    ) -> None:
        self.large = large
        self.text = text
        self.whole = whole
        self._at_once = at_once
        self._lock = threading.RLock()
        self._rgb = rgb
        self._encoded = encoded
        self._decode = decode
        self._check = check

    @property
    def at_hand(self) -> bool:
        """True if `encoded()` returns immediately, without checking or encoding."""
        return self._check is not None and self._sound

    @property
    def sha256(self) -> str:
        """The hash of the bytes."""
        assert self._encoded is not None
        return self._encoded.sha256

    @property
    def hashed(self) -> bool:
        """True if `sha256` was computed."""
        return self._encoded is None or self._encoded.hashed

    @property
    def _sound(self) -> bool:
        return self._encoded is None or self._encoded.sound

    def rgb(self) -> Image.Image:
        """Return the pixels as a copy for the caller."""
        with self._lock:
            return self._take() if self._decode is not None else self._decoded().copy()

    def settle(self) -> None:
        """Decode a large or unverified picture, and keep the pixels for their first use."""
        with self._lock:
            if not self._sound or self.large:
                self._rgb = self._decoded()

    def hold(self) -> None:
        """Decode the picture, and keep the pixels for their first use."""
        with self._lock:
            self._rgb = self._decoded()

    def verify(self, *, keep: bool) -> None:
        """Raise MediaError if the bytes are broken; `keep` keeps pixels decoded for this until their first use."""
        with self._lock:
            if self._encoded is None or self._encoded.sound:
                return
            if self._check is not None:
                self._check()
                self._encoded.sound = True
            else:
                image = self._decoded()
                self._rgb = image if keep else None

    def verify_at_once(self) -> bool:
        """Verify the bytes if that takes less time than a change of thread; False: it may take longer."""
        if self._check is None:
            return False
        if not self._sound:
            if self._at_once is None:
                self.verify(keep=True)
            elif self._encoded is not None:
                self._encoded.sound = self._at_once()
        return self._sound

    def encoded(self) -> bytes:
        """Return the canonical picture as bytes: the source's, once verified, or a PNG."""
        with self._lock:
            if self._encoded is None or self._check is None:
                from qvl.media import pixels

                return pixels.encode_png(self._take())
            self.verify(keep=False)
            self._rgb = None
            return self._encoded.data

    def _decoded(self) -> Image.Image:
        """Return the pixels, decoded now unless they are kept."""
        if self._rgb is not None:
            return self._rgb
        assert self._decode is not None
        image = self._decode()
        if self._encoded is not None:
            self._encoded.sound = True
        return image

    def _take(self) -> Image.Image:
        """Return the pixels and drop them here if they can be decoded again."""
        image = self._decoded()
        if self._decode is not None:
            self._rgb = None
        return image
