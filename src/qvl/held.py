"""Where the pixels of a Picture are until somebody wants them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image


class HeldPixels:
    """Where a Picture's pixels come from, whichever thread asks first.

    Encoded bytes are decoded only when pixels are wanted, and checked when they are passed on, so that a cache hit
    costs a header and a hash; PNG is made only for those who send the picture on. Decoded pixels wait for their first
    use and go with it: thousands of results may hold their pictures, and bytes are a fraction of pixels.

    Args:
        rgb: the pixels, of a source that cannot be decoded again.
        decode: makes them from encoded bytes.
        raw: the encoded bytes, where they pass untouched.
        check: finds out for less than `decode` whether `raw` is sound, and raises what `decode` would.
    """

    __slots__ = ("_check", "_decode", "_lock", "_raw", "_rgb", "_sound")

    def __init__(
        self,
        *,
        rgb: Image.Image | None = None,
        decode: Callable[[], Image.Image] | None = None,
        raw: bytes | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._rgb = rgb
        self._decode = decode
        self._raw = raw
        self._check = check
        self._sound = rgb is not None

    @property
    def at_hand(self) -> bool:
        """Whether `encoded` has nothing to do."""
        return self._raw is not None and self._sound

    def rgb(self) -> Image.Image:
        """The pixels, a copy that is the caller's."""
        with self._lock:
            return self._taken() if self._decode is not None else self._held().copy()

    def settle(self) -> None:
        """Decodes if nobody knows yet whether the bytes are sound; the pixels then wait for their first use."""
        with self._lock:
            if not self._sound:
                self._rgb = self._held()

    def verify(self, *, keep: bool) -> None:
        """Finds out whether the bytes are sound; `keep` lets pixels that this took wait for their first use."""
        with self._lock:
            self._verify(keep=keep)

    def _verify(self, *, keep: bool) -> None:
        if self._sound:
            return
        if self._check is not None:
            self._check()
            self._sound = True
        else:
            image = self._held()
            self._rgb = image if keep else None

    def encoded(self) -> bytes:
        """The canonical picture as bytes: `raw`, once it was found sound, else a PNG."""
        from qvl import pixels

        with self._lock:
            if self._raw is None:
                return pixels.encode_png(self._taken())
            self._verify(keep=False)
            self._rgb = None
            return self._raw

    def _held(self) -> Image.Image:
        """The pixels, decoded now if they do not wait here."""
        if self._rgb is not None:
            return self._rgb
        assert self._decode is not None
        image = self._decode()
        self._sound = True
        return image

    def _taken(self) -> Image.Image:
        """The same, which no longer wait here if they can be decoded again."""
        image = self._held()
        if self._decode is not None:
            self._rgb = None
        return image
