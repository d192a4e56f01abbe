"""Parses server-sent events from a byte stream, with a limit on the size of an event.

Only the subset that chat completions use: `data:` lines, a blank line ends an event, comments are keep-alives. A plain
JSON object instead of a stream is read as a stream of one event.
Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import Final

from qvl.errors import BackendResponseError

MAX_EVENT_BYTES: Final = 16 * 2**20
_FIELDS: Final = (b"event:", b"id:", b"retry:", b":")


def shorten(text: str, limit: int = 300) -> str:
    """Return `text` as one line of at most `limit` characters, for an error message."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def readable(data: bytes, limit: int = 300) -> str:
    """Return bytes as one short line of text, for an error message."""
    return shorten(data[: limit * 8].decode("utf-8", "replace"), limit)


class EventReader:
    """Splits streamed bytes into the payloads of complete events.

    Raises:
        BackendResponseError: (from `feed` and `end`) an event is above `limit` bytes, or the bytes are not events.
    """

    def __init__(self, *, limit: int = MAX_EVENT_BYTES) -> None:
        self._buffer = bytearray()
        self._data: list[bytes] = []
        self._limit = limit
        self._plain = False
        self._started = False
        self._scanned = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that `data` completes."""
        self._buffer += data
        if not self._started and not self._start():
            return []
        events: list[bytes] = []
        if not self._plain:
            self._take_lines(events)
        if len(self._buffer) + (sum(map(len, self._data)) if self._data else 0) > self._limit:
            raise BackendResponseError(
                f"the endpoint sent more than {self._limit} bytes in one piece: {readable(bytes(self._buffer[:4096]))}"
            )
        return events

    def end(self) -> list[bytes]:
        """Return the payloads completed by the end of the stream: plain JSON, or a last event without blank line."""
        if self._plain:
            body, self._buffer = bytes(self._buffer), bytearray()
            return [body]
        events: list[bytes] = []
        if self._started and self._buffer:
            self._buffer += b"\n"
            self._take_lines(events)
        if self._data:
            events.append(b"\n".join(self._data))
            self._data = []
        return events

    def _start(self) -> bool:
        head = self._buffer.lstrip()
        if head.startswith(b"\xef\xbb\xbf"):
            head = head[3:].lstrip()
        if not head:
            return False
        self._buffer = head
        self._started = True
        self._plain = head[:1] == b"{"
        return True

    def _take_lines(self, events: list[bytes]) -> None:
        end = self._buffer.rfind(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._buffer)
            return
        lines = bytes(self._buffer[:end]).split(b"\n")
        del self._buffer[: end + 1]
        self._scanned = 0
        for raw in lines:
            line = raw.rstrip(b"\r")
            if line[:5] == b"data:":
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line or line.isspace():
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
            elif not line.startswith(_FIELDS):
                problem = f"expected server-sent events from the endpoint, got {readable(line)}"
                raise BackendResponseError(problem, hint="check the base URL and that the server streams")
