"""Decompresses fetched pictures that a server sent with a Content-Encoding although none was accepted."""

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
_GZIPPED: Final = frozenset({"gzip", "x-gzip"})
_DEFLATED: Final = frozenset({"deflate", "x-deflate"})
_OTHERS: Final = frozenset({"zstd", "compress", "x-compress", "dcb", "dcz"})


def unpacked(
    data: bytes, codings: str, policy: MediaPolicy, name: str, counted: Callable[[int], None] | None = None
) -> bytes:
    """Return `data` decompressed by the codings of a lower-case Content-Encoding; unchanged if they name no known one.

    Bytes that begin as gzip are inflated even if `codings` does not name it. `counted` is called with the size of
    every piece that comes out, before the next is made.

    Raises:
        MediaError: the compression is broken or unknown, or the result exceeds `policy.max_bytes`.
    """
    labels = [coding.strip().strip('"') for coding in codings.split(",")]
    known = _GZIPPED | _DEFLATED | _OTHERS | {"br"}
    named = [coding for coding in labels if coding in known][-_MAX_CODINGS:]
    if data.startswith(GZIP) and (_GZIPPED | _DEFLATED).isdisjoint(named):
        named.append("gzip")
    for coding in reversed(named):
        try:
            data = _undone(coding, data, _counting(policy, name, counted), name)
        except zlib.error as exc:
            raise _failed(name, f"its {coding} compression is broken: {short(str(exc))[:80]}") from exc
    return data


def _counting(policy: MediaPolicy, name: str, counted: Callable[[int], None] | None) -> Callable[[int], None]:
    """Return a callback that counts decompressed bytes and raises MediaError beyond the policy's limit."""
    total = 0

    def count(size: int) -> None:
        nonlocal total
        total += size
        if total > policy.max_bytes:
            raise too_large(name, policy)
        if counted is not None:
            counted(size)

    return count


def _undone(coding: str, data: bytes, counted: Callable[[int], None], name: str) -> bytes:
    if coding == "br":
        return _unbrotlied(data, counted, name)
    if coding in _OTHERS:
        raise _failed(name, f"the server compressed it with {coding} though it was asked not to")
    if coding in _GZIPPED and not data.startswith(GZIP) and not is_zlib(data):
        return data
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


def _failed(name: str, reason: str, hint: str = "fetch it yourself and pass the bytes") -> MediaError:
    return MediaError(f"{name}: {reason}", hint=hint, code="image_fetch_failed")
