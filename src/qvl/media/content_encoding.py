"""Undoes the compression of a fetched picture that came compressed though it was asked for plain."""

from __future__ import annotations

import importlib
import zlib
from typing import TYPE_CHECKING, Any, Final

from qvl.errors import MediaError
from qvl.media.sources import short, too_large

if TYPE_CHECKING:
    from collections.abc import Callable

    from qvl.media.policy import MediaPolicy

_GZIP: Final = b"\x1f\x8b"
_PIECE: Final = 256 * 1024
_MAX_CODINGS: Final = 4


def unpacked(data: bytes, codings: str, policy: MediaPolicy, name: str) -> bytes:
    """`data` without what `codings`, a Content-Encoding in lower case, names; itself where that is no compression.

    What begins as gzip is inflated even where nothing says so.

    Raises:
        MediaError: it cannot be undone, or is more than `policy.max_bytes` then.
    """
    named = [coding.strip() for coding in codings.split(",") if coding.strip() in _CODINGS][-_MAX_CODINGS:]
    if data.startswith(_GZIP) and not {"gzip", "x-gzip"}.intersection(named):
        named.append("gzip")
    for coding in reversed(named):
        try:
            data = _CODINGS[coding](data, policy, name)
        except MediaError:
            raise
        except Exception as exc:
            raise _failed(name, f"its {coding} compression is broken: {short(str(exc))[:80]}") from exc
    return data


def _gunzipped(data: bytes, policy: MediaPolicy, name: str) -> bytes:
    if not data.startswith(_GZIP):
        return data
    return _inflated(data, 31, policy, name)


def _deflated(data: bytes, policy: MediaPolicy, name: str) -> bytes:
    # Some send what zlib makes without its head, whose low half-byte is always 8.
    return _inflated(data, 15 if data[:1] and data[0] & 15 == 8 else -15, policy, name)


def _inflated(data: bytes, window: int, policy: MediaPolicy, name: str) -> bytes:
    inflating = zlib.decompressobj(window)
    out = inflating.decompress(data, policy.max_bytes + 1)
    if len(out) > policy.max_bytes:
        raise too_large(name, policy)
    if not inflating.eof:
        raise zlib.error("it is cut short")
    return out


def _unbrotlied(data: bytes, policy: MediaPolicy, name: str) -> bytes:
    for module in ("brotli", "brotlicffi"):
        try:
            brotli: Any = importlib.import_module(module)
        except ImportError:
            continue
        inflating = brotli.Decompressor()
        out = bytearray()
        for at in range(0, len(data), _PIECE):
            out += inflating.process(data[at : at + _PIECE])
            if len(out) > policy.max_bytes:
                raise too_large(name, policy)
        return bytes(out)
    raise _failed(name, "the server compressed it with br though it was asked not to", "pip install brotli")


def _unknown(coding: str) -> Callable[[bytes, MediaPolicy, str], bytes]:
    def refuse(data: bytes, policy: MediaPolicy, name: str) -> bytes:
        raise _failed(name, f"the server compressed it with {coding} though it was asked not to")

    return refuse


_CODINGS: Final = {
    "gzip": _gunzipped,
    "x-gzip": _gunzipped,
    "deflate": _deflated,
    "br": _unbrotlied,
    **{coding: _unknown(coding) for coding in ("zstd", "compress", "x-compress", "dcb", "dcz")},
}


def _failed(name: str, reason: str, hint: str = "fetch it yourself and pass the bytes") -> MediaError:
    return MediaError(f"{name}: {reason}", hint=hint, code="image_fetch_failed")
