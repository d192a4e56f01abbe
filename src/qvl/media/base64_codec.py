"""Base64 of pictures: by pybase64 where it is installed, some forty times as fast, else by the standard library."""

from __future__ import annotations

import base64
from dataclasses import dataclass

__all__ = ["FAST", "Base64Picture", "decoded", "encoded", "is_canonical"]


@dataclass(frozen=True, slots=True, eq=False)
class Base64Picture:
    """A `data:` URL whose base64 was decoded where it arrived: `head` up to its comma, the base64, and its bytes."""

    head: str
    text: memoryview
    data: bytes


def is_canonical(text: memoryview, data: bytes) -> bool:
    """True if `text`, which was decoded to `data`, is what `encoded(data)` would return."""
    # Only the bits behind the last byte may differ.
    last = len(data) % 3 or 3
    return len(text) == (len(data) + 2) // 3 * 4 and text[-4:] == base64.b64encode(data[-last:])


try:
    import pybase64
except ImportError:  # not on every platform
    # True if megabytes take less time than a change of thread.
    FAST = False

    def encoded(data: bytes) -> bytes:
        """Return `data` as base64."""
        return base64.b64encode(data)

    def decoded(text: str | memoryview) -> bytes:
        """Return the bytes of strict base64.

        Raises:
            ValueError: other characters, or wrong padding.
        """
        return base64.b64decode(text, validate=True)

else:
    FAST = True

    def encoded(data: bytes) -> bytes:
        """Return `data` as base64."""
        return pybase64.b64encode(data)

    def decoded(text: str | memoryview) -> bytes:
        """Return the bytes of strict base64.

        Raises:
            ValueError: other characters, or wrong padding.
        """
        return pybase64.b64decode(text, validate=True)
