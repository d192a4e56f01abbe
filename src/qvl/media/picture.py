"""What comes out of the media gate: a Picture, whose pixels are made when somebody wants them."""

from __future__ import annotations

import base64
import io
import os
import threading
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, TypeAlias

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
    """A picture that came through the gate. Equal when the source and the canonical size are equal.

    Safe to share between threads. `data` may be computed (checked, or encoded) when it is first asked for.

    Args:
        sha256: `sha256:` and the hex digest, of the source bytes for encoded pictures, of mode, size and pixels for
            PIL images and arrays.
        width: canonical width in pixels (after EXIF, within the budget).
        height: canonical height in pixels.
        data: encoded canonical picture: the source bytes themselves when every decoder reads them alike (plain 8-bit
            RGB as JPEG, PNG or WebP, one frame, not turned, within the budget), else a lossless PNG.
        media_type: of `data`, as `image/png`.
        source: short name for people: a path, a URL without query and credentials, `<bytes>`, `<PIL.Image>`.
        untouched: whether `data` are the source bytes.
        sized: whether a request set the size, so that the model's own lower limit does not change it again.
    """

    sha256: str
    width: int
    height: int
    data: bytes = field(repr=False, compare=False)
    media_type: str = field(compare=False)
    source: str = field(compare=False)
    untouched: bool = field(compare=False)
    sized: bool = False
    _pixels: HeldPixels | None = field(default=None, repr=False, compare=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            # Reached for `data` alone, whose slot stays empty until the bytes are needed.
            if name == "data" and self._pixels is not None:
                object.__setattr__(self, "data", self._pixels.encoded())
                return self.data
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> tuple[type[Picture], tuple[object, ...]]:
        # Locks and open images do not pickle; the canonical bytes say everything.
        state = (self.sha256, self.width, self.height, self.data, self.media_type, self.source, self.untouched)
        return Picture, (*state, self.sized)

    def rgb(self) -> Image.Image:
        """The canonical picture, decoded: mode RGB, a fresh copy for the caller.

        Raises:
            MediaError: the source bytes are cut short or broken (only when loaded with `decode=False`).
        """
        if self._pixels is not None:
            return self._pixels.rgb()
        from PIL import Image

        with Image.open(io.BytesIO(self.data)) as image:
            return image.convert("RGB")

    def data_url(self) -> str:
        """`data` as a `data:` URL with base64."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"

    def thumbnail(self, edge: int = 256) -> Picture:
        """A copy whose longer side is at most `edge` pixels, as JPEG; itself when it is small enough."""
        if max(self.width, self.height) <= edge:
            return self
        from qvl.media import pixels

        scale = edge / max(self.width, self.height)
        size = (max(1, round(self.width * scale)), max(1, round(self.height * scale)))
        data = pixels.encode_jpeg(pixels.resized(self.rgb(), size))
        return Picture(self.sha256, *size, data, "image/jpeg", self.source, untouched=False)

    def fit(self, max_pixels: int) -> Picture:
        """A smaller copy within `max_pixels`, aspect ratio kept; itself when it fits already."""
        return self._resized(budget(self.width, self.height, max_pixels), self.sized)

    def under(self, policy: MediaPolicy) -> Picture:
        """A copy of the size that `policy` gives it; itself when it has that already."""
        width, height, sized = canonical_size(self.width, self.height, policy)
        return self._resized((width, height), sized or self.sized)

    def _resized(self, size: tuple[int, int], sized: bool) -> Picture:
        from qvl.media import pixels

        if size != (self.width, self.height):
            held = HeldPixels(rgb=pixels.resized(self.rgb(), size))
            return _deferred(self.sha256, size, self.source, held, untouched=False, sized=sized)
        if sized == self.sized:
            return self
        held = self._pixels or HeldPixels(rgb=self.rgb())
        return _deferred(self.sha256, size, self.source, held, self.media_type, untouched=self.untouched, sized=sized)

    def decoded(self) -> Picture:
        """Itself, so that nothing later can fail: decoded, and the next `rgb()` costs nothing, unless the source bytes
        are known to be sound already.

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        if self._pixels is not None:
            self._pixels.settle()
        return self

    def checked(self) -> Picture:
        """Itself, after its bytes were found whole, so that whoever is given `data` can decode them.

        For those who pass `data` on: where bytes pass untouched this takes less than decoding them.

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        if self._pixels is not None:
            self._pixels.verify(keep=True)
        return self

    @property
    def large(self) -> bool:
        """True if decoding takes so long or so much memory that it is done one at a time."""
        return self._pixels is not None and self._pixels.large

    @property
    def at_hand(self) -> bool:
        """True if `data` returns immediately, without encoding or checking."""
        return self._pixels is None or self._pixels.at_hand


def _deferred(
    sha256: str,
    size: tuple[int, int],
    source: str,
    held: HeldPixels,
    media_type: str = "image/png",
    *,
    untouched: bool,
    sized: bool,
) -> Picture:
    """A Picture whose `data` is worked out on first use."""
    picture = object.__new__(Picture)
    for name, value in (
        ("sha256", sha256),
        ("width", size[0]),
        ("height", size[1]),
        ("media_type", media_type),
        ("source", source),
        ("untouched", untouched),
        ("sized", sized),
        ("_pixels", held),
    ):
        object.__setattr__(picture, name, value)
    return picture


class HeldPixels:
    """Where a Picture's pixels come from, whichever thread asks first.

    Encoded bytes are decoded only when pixels are wanted, and checked when they are passed on, so that a cache hit
    costs a header and a hash; PNG is made only for those who send the picture on. Decoded pixels wait for their first
    use and go with it: thousands of results may hold their pictures, and bytes are a fraction of pixels.

    Args:
        rgb: the pixels, of a source that cannot be decoded again.
        encoded: the bytes of a source that can be decoded again; that they are sound is noted there.
        decode: makes pixels of them.
        check: given where the bytes pass untouched: finds out for less than `decode` whether they are sound, and raises
            what `decode` would.
        large: decoding is done one at a time, where whoever asks knows to wait for it.
    """

    __slots__ = ("_check", "_decode", "_encoded", "_lock", "_rgb", "large")

    def __init__(
        self,
        *,
        rgb: Image.Image | None = None,
        encoded: Encoded | None = None,
        decode: Callable[[], Image.Image] | None = None,
        check: Callable[[], None] | None = None,
        large: bool = False,
    ) -> None:
        self.large = large
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
    def _sound(self) -> bool:
        return self._encoded is None or self._encoded.sound

    def rgb(self) -> Image.Image:
        """The pixels, a copy that is the caller's."""
        with self._lock:
            return self._taken() if self._decode is not None else self._held().copy()

    def settle(self) -> None:
        """Decodes a large picture, and one of which nobody knows yet whether its bytes are sound.

        The pixels then wait for their first use.
        """
        with self._lock:
            if not self._sound or self.large:
                self._rgb = self._held()

    def verify(self, *, keep: bool) -> None:
        """Finds out whether the bytes are sound; `keep` lets pixels that this took wait for their first use."""
        with self._lock:
            if self._encoded is None or self._encoded.sound:
                return
            if self._check is not None:
                self._check()
                self._encoded.sound = True
            else:
                image = self._held()
                self._rgb = image if keep else None

    def encoded(self) -> bytes:
        """The canonical picture as bytes: those it came as, once they were found sound, else a PNG."""
        from qvl.media import pixels

        with self._lock:
            if self._encoded is None or self._check is None:
                return pixels.encode_png(self._taken())
            self.verify(keep=False)
            self._rgb = None
            return self._encoded.data

    def _held(self) -> Image.Image:
        """The pixels, decoded now if they do not wait here."""
        if self._rgb is not None:
            return self._rgb
        assert self._decode is not None
        image = self._decode()
        if self._encoded is not None:
            self._encoded.sound = True
        return image

    def _taken(self) -> Image.Image:
        """The same, which no longer wait here if they can be decoded again."""
        image = self._held()
        if self._decode is not None:
            self._rgb = None
        return image
