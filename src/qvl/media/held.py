"""Where the pixels of a Picture are until somebody wants them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from qvl.media.digest_cache import Encoded


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
        self._lock = threading.Lock()
        self._rgb = rgb
        self._encoded = encoded
        self._decode = decode
        self._check = check

    @property
    def at_hand(self) -> bool:
        """Whether `encoded` has nothing to do."""
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
            self._verify(keep=keep)

    def _verify(self, *, keep: bool) -> None:
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
            self._verify(keep=False)
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
