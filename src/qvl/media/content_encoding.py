"""Undoes the compression of a fetched picture that came compressed though it was asked for plain."""

from __future__ import annotations

import importlib
import zlib
from typing import TYPE_CHECKING, Any, Final

from qvl.errors import MediaError
from qvl.media.inflate import GZIP, inflated, is_zlib
from qvl.media.sources import short, too_large

if TYPE_CHECKING:
    from collections.abc import Callable

    from qvl.media.policy import MediaPolicy

# Bytes of brotli at a time: each may become thousands.
_PIECE: Final = 1024
_MAX_CODINGS: Final = 4
_INFLATED: Final = frozenset({"gzip", "x-gzip", "deflate", "x-deflate"})


def unpacked(
    data: bytes, codings: str, policy: MediaPolicy, name: str, counted: Callable[[int], None] | None = None
) -> bytes:
    """`data` without what `codings`, a Content-Encoding in lower case, names; itself where that is not a compression.

    What begins as gzip is inflated even where nothing says so. `counted` is told of every piece that comes out, before
    the next is made.

    Raises:
        MediaError: it cannot be undone, or is more than `policy.max_bytes` then.
    """
    labels = [coding.strip().strip('"') for coding in codings.split(",")]
    named = [coding for coding in labels if coding in _CODINGS][-_MAX_CODINGS:]
    if data.startswith(GZIP) and not _INFLATED.intersection(named):
        named.append("gzip")
    for coding in reversed(named):
        try:
            data = _CODINGS[coding](data, _Counter(policy, name, counted), name)
        except zlib.error as exc:
            raise _failed(name, f"its {coding} compression is broken: {short(str(exc))[:80]}") from exc
    return data


class _Counter:
    """Holds what comes out of one coding against the limits."""

    def __init__(self, policy: MediaPolicy, name: str, counted: Callable[[int], None] | None) -> None:
        self._policy = policy
        self._name = name
        self._counted = counted
        self._size = 0

    def __call__(self, size: int) -> None:
        self._size += size
        if self._size > self._policy.max_bytes:
            raise too_large(self._name, self._policy)
        if self._counted is not None:
            self._counted(size)


def _gunzipped(data: bytes, counted: Callable[[int], None], name: str) -> bytes:
    return inflated(data, counted, strict=False) if data.startswith(GZIP) or is_zlib(data) else data


def _deflated(data: bytes, counted: Callable[[int], None], name: str) -> bytes:
    return inflated(data, counted, strict=False)


def _unbrotlied(data: bytes, counted: Callable[[int], None], name: str) -> bytes:
    for module in ("brotli", "brotlicffi"):
        try:
            brotli: Any = importlib.import_module(module)
        except ImportError:
            continue
        inflating = brotli.Decompressor()
        out = bytearray()
        for at in range(0, len(data), _PIECE):
            try:
                made = inflating.process(data[at : at + _PIECE])
            except brotli.error as exc:
                raise zlib.error(str(exc)) from exc
            counted(len(made))
            out += made
        return bytes(out)
    raise _failed(name, "the server compressed it with br though it was asked not to", "pip install brotli")


def _unknown(coding: str) -> Callable[[bytes, Callable[[int], None], str], bytes]:
    def refuse(data: bytes, counted: Callable[[int], None], name: str) -> bytes:
        raise _failed(name, f"the server compressed it with {coding} though it was asked not to")

    return refuse


_CODINGS: Final = {
    "gzip": _gunzipped,
    "x-gzip": _gunzipped,
    "deflate": _deflated,
    "x-deflate": _deflated,
    "br": _unbrotlied,
    **{coding: _unknown(coding) for coding in ("zstd", "compress", "x-compress", "dcb", "dcz")},
}


def _failed(name: str, reason: str, hint: str = "fetch it yourself and pass the bytes") -> MediaError:
    return MediaError(f"{name}: {reason}", hint=hint, code="image_fetch_failed")
