"""Parses the head of an HTTP/1.1 response, and the framing and compression of its body.

Strict where leniency would confuse the bytes of one response with the next (RFC 9112, sections 6 and 7).
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

MAX_HEAD: Final = 65_536
MAX_CHUNK: Final = 16 * 2**20
END: Final = b"\r\n"
# Headers whose values add up when they come more than once; of the others, the last one counts.
_LISTS: Final = frozenset({"connection", "content-encoding", "transfer-encoding"})
# Some servers pad the size with spaces, others put an extension behind it.
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?", re.S)

# How zlib reads what a Content-Encoding names: with gzip's head, or with its own.
_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class TransportError(Exception):
    """The connection failed, broke off, or does not speak HTTP."""


class BrokenAnswerError(TransportError):
    """The response is not HTTP, or exceeds a limit."""


# Those of one server are mostly equal, but for a date in seconds.
@functools.lru_cache(maxsize=16)
def read_head(data: bytes) -> tuple[int, Mapping[str, str]]:
    """Return (status, headers in lower case) of a response's head, given without its final empty line.

    Raises:
        BrokenAnswerError: it is not HTTP, or it has two different lengths.
    """
    lines = data.decode("latin-1").split("\r\n")
    version, _, status = lines[0].partition(" ")
    if not version.startswith("HTTP/1") or not status[:3].isdecimal():
        raise BrokenAnswerError(f"the answer is not HTTP: {lines[0][:60]!r}")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name in headers:
            before = headers[name]
            if name in _LISTS:
                value = f"{before}, {value}"
            elif name == "content-length" and before != value:
                raise BrokenAnswerError(f"the answer has two Content-Lengths: {before[:40]!r} and {value[:40]!r}")
        headers[name] = value
    if version == "HTTP/1.0" and "keep-alive" not in headers.get("connection", "").lower():
        headers["connection"] = "close"
    return int(status[:3]), MappingProxyType(headers)


class Body:
    """Decodes a response body: chunked, with a length or until the connection ends; gzip or deflate.

    Requests do not accept compression, but some proxies compress anyway.

    Raises:
        BrokenAnswerError: (also from `feed`) framing or compression is unknown, broken, or above the limits.
    """

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        transfer = headers.get("transfer-encoding", "").lower()
        if transfer not in ("", "chunked", "identity"):
            raise BrokenAnswerError(f"unsupported Transfer-Encoding {transfer[:40]!r}")
        self._chunked = transfer == "chunked"
        length = headers.get("content-length", "")
        if length and not self._chunked and not (length.isdecimal() and len(length) < 20):
            raise BrokenAnswerError(f"invalid Content-Length {length[:40]!r}")
        self._remaining = int(length) if length and not self._chunked else 0
        self.ends_with_connection = not self._chunked and not length
        self.done = status in (204, 304) or (
            self._remaining == 0 and not self._chunked and not self.ends_with_connection
        )
        # A server that sends a length beside chunks may mean either.
        ambiguous = self.ends_with_connection or (self._chunked and bool(length))
        self.keeps = "close" not in headers.get("connection", "").lower() and not ambiguous
        self._encoding = headers.get("content-encoding", "").lower()
        self._inflating: _Inflating | None = None
        self._buffered: list[bytes] = []
        self._missing = 0
        # How many bytes of trailers came behind the last chunk; None before it.
        self._trailer: int | None = None

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`, of complete chunks only, so that an event is not split."""
        payload = self._unframed(data)
        if self._encoding in ("", "identity") or not payload:
            return payload
        if self._inflating is None:
            self._inflating = _Inflating(self._encoding, payload[0])
        return self._inflating.feed(payload)

    def _unframed(self, data: bytes) -> bytes:
        if self._chunked:
            return self._chunks(data)
        if self.ends_with_connection:
            return data
        payload = data[: self._remaining]
        self.keeps = self.keeps and len(payload) == len(data)
        self._remaining -= len(payload)
        self.done = self._remaining == 0
        return payload

    def _chunks(self, data: bytes) -> bytes:
        if self._buffered:
            self._buffered.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return b""
            data = b"".join(self._buffered)
            self._buffered.clear()
        start, payloads, missing = 0, [], 1
        while not self.done:
            end = data.find(END, start)
            line = (end if end >= 0 else len(data)) - start
            if line + (self._trailer or 0) > MAX_HEAD:
                raise BrokenAnswerError(
                    "invalid HTTP chunk: no size" if self._trailer is None else "invalid HTTP trailers: no end"
                )
            if end < 0:
                break
            if self._trailer is not None:
                self._trailer += line + 2
                self.done = line == 0
                start = end + 2
                continue
            size = _chunk_size(data[start:end])
            if size == 0:
                self._trailer, start = 0, end + 2
                continue
            after = end + 2 + size
            if (missing := after + 2 - len(data)) > 0:
                break
            if data[after : after + 2] != END:
                raise BrokenAnswerError(f"invalid HTTP chunk: longer than its size of {size} bytes")
            payloads.append(data[end + 2 : after])
            start, missing = after + 2, 1
        if self.done:
            # What comes after the end was not asked for, and would be taken for the next answer.
            self.keeps = self.keeps and start == len(data)
        elif start < len(data):
            self._buffered, self._missing = [data[start:]], max(1, missing)
        return payloads[0] if len(payloads) == 1 else b"".join(payloads)


def _chunk_size(line: bytes) -> int:
    match = _CHUNK_SIZE.fullmatch(line)
    if match is None:
        raise BrokenAnswerError(f"invalid HTTP chunk: no size in {line[:40]!r}")
    if (size := int(match[1], 16)) > MAX_CHUNK:
        raise BrokenAnswerError(f"an HTTP chunk of {size} bytes is above the limit of {MAX_CHUNK}")
    return size


class _Inflating:
    """Inflate gzip or deflate, at most MAX_CHUNK bytes per call."""

    def __init__(self, encoding: str, first: int) -> None:
        if encoding not in _WINDOWS:
            raise BrokenAnswerError(
                f"the answer is compressed by {encoding[:40]!r}, which is not supported: switch it off at the server"
            )
        self._encoding = encoding
        # Some send what zlib makes without its head, whose low half-byte is always 8.
        self._window = _WINDOWS[encoding] if encoding != "deflate" or first & 15 == 8 else -15
        self._inflater = zlib.decompressobj(self._window)

    def feed(self, data: bytes) -> bytes:
        inflated, allowance = [], MAX_CHUNK
        try:
            while data and allowance:
                if self._inflater.eof:
                    # Compressed files may be laid one behind the other.
                    self._inflater = zlib.decompressobj(self._window)
                inflated.append(self._inflater.decompress(data, allowance))
                allowance -= len(inflated[-1])
                data = self._inflater.unconsumed_tail or self._inflater.unused_data
        except zlib.error as exc:
            raise BrokenAnswerError(f"the answer is not {self._encoding}: {exc}") from None
        if not allowance:
            raise BrokenAnswerError(f"a piece of the answer inflates to more than {MAX_CHUNK} bytes")
        return b"".join(inflated)
