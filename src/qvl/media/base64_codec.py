"""Base64 of pictures: by pybase64 where it is installed, some forty times as fast, else by the standard library."""

from __future__ import annotations

import base64

__all__ = ["FAST", "decoded", "encoded"]

try:
    import pybase64
except ImportError:  # not on every platform
    # True if megabytes take less time than a change of thread.
    FAST = False

    def encoded(data: bytes) -> bytes:
        """Return `data` as base64."""
        return base64.b64encode(data)

    def decoded(text: str) -> bytes:
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

    def decoded(text: str) -> bytes:
        """Return the bytes of strict base64.

        Raises:
            ValueError: other characters, or wrong padding.
        """
        return pybase64.b64decode(text, validate=True)
