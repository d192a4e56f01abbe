"""HTTP/1.1 for one purpose: a request out, and its answer in with the moment at which every piece came off the socket.

A general client spends more time on a small streamed answer than there is between two requests at 2,000 a second, and
notes when its reader woke up instead of when data came. Pieces are stamped here as the event loop hands them over.
No proxies, no redirects, no compression.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping
from time import perf_counter
from typing import Final, cast
from urllib.parse import urlsplit

from qvl.errors import ConfigError

MAX_HEAD: Final = 65_536
MAX_CHUNK: Final = 16 * 2**20
MAX_HELD: Final = 4 * 2**20
_END: Final = b"\r\n"


class HttpError(Exception):
    """The connection cannot be made, breaks off, or speaks no HTTP."""


class BrokenAnswerError(HttpError):
    """What came is no HTTP answer, or one above the limits."""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._came: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._paused = False
        self._ended = False
        self._problem: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._rest = b""

    @property
    def closed(self) -> bool:
        return self._ended or self._transport is None or self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._came.append((perf_counter(), data))
        self._held += len(data)
        if self._held > MAX_HELD and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._problem = self._problem or exc
        self._wake()

    def fail(self, problem: Exception) -> None:
        """Ends the exchange: whoever waits gets `problem`."""
        self._problem, self._ended = problem, True
        self._wake()
        self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def send(self, data: bytes) -> None:
        """Writes a request."""
        assert self._transport is not None
        self.reusable = False
        self._transport.write(data)

    async def head(self) -> tuple[float, int, dict[str, str]]:
        """(when its first byte came, status, headers in lower case) of the answer.

        Raises:
            HttpError: the connection broke off, or this is no HTTP.
        """
        data, first = b"", 0.0
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > MAX_HEAD:
                raise BrokenAnswerError("the answer has a head without an end")
            when, more = await self._next("the connection was closed without an answer")
            first = first or when
            data += more
        self._rest = data[end + 4 :]
        lines = data[:end].decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1") or not status[:3].isdigit():
            raise BrokenAnswerError(f"the answer is no HTTP: {lines[0][:60]!r}")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return first, int(status[:3]), headers

    async def next_piece(self, body: Body) -> tuple[float, bytes] | None:
        """The next bytes of the body with the moment they came at; None at its end.

        Raises:
            HttpError: the connection broke off within the body.
        """
        while not body.done:
            if self._rest:
                when, data, self._rest = perf_counter(), self._rest, b""
            else:
                try:
                    when, data = await self._next("the connection was closed within the answer")
                except HttpError:
                    if body.ends_with_connection and self._problem is None:
                        body.done = True
                        return None
                    raise
            payload = body.feed(data)
            if payload:
                return when, payload
        self.reusable = body.keeps and not self._came and not self._ended
        return None

    async def _next(self, otherwise: str) -> tuple[float, bytes]:
        while not self._came:
            if self._ended:
                if isinstance(self._problem, TimeoutError | asyncio.TimeoutError):
                    raise self._problem
                raise HttpError(str(self._problem or "") or otherwise)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        when, data = self._came.popleft()
        self._held -= len(data)
        if self._paused and self._held < MAX_HELD // 2 and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return when, data

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Body:
    """Takes the framing off a body: chunks, a length, or the end of the connection."""

    __slots__ = ("_chunked", "_left", "_tail", "_trailer", "done", "ends_with_connection", "keeps")

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length", "")
        self._left = int(length) if length.isdigit() else 0
        self.ends_with_connection = not self._chunked and not length.isdigit()
        self.done = status in (204, 304) or (length.isdigit() and self._left == 0 and not self._chunked)
        self.keeps = "close" not in headers.get("connection", "").lower() and not self.ends_with_connection
        self._tail = b""
        self._trailer = False

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Whole chunks only, so that an event comes in one piece."""
        if self._chunked:
            return self._chunks(data)
        if self.ends_with_connection:
            return data
        taken = data[: self._left]
        self._left -= len(taken)
        self.done = self._left == 0
        return taken

    def _chunks(self, data: bytes) -> bytes:
        data = self._tail + data if self._tail else data
        place, found = 0, []
        while not self.done:
            end = data.find(_END, place)
            if end < 0:
                break
            if self._trailer:
                self.done = end == place
                place = end + 2
                continue
            try:
                size = int(data[place:end].split(b";")[0], 16)
            except ValueError:
                raise BrokenAnswerError(f"a chunk without a size: {data[place:end][:40]!r}") from None
            if not 0 <= size <= MAX_CHUNK:
                raise BrokenAnswerError(f"a chunk of {size} bytes")
            if size == 0:
                self._trailer, place = True, end + 2
                continue
            if len(data) < end + 2 + size + 2:
                break
            found.append(data[end + 2 : end + 2 + size])
            place = end + 4 + size
        self._tail = data[place:]
        if len(self._tail) > MAX_CHUNK + MAX_HEAD:
            raise BrokenAnswerError("a chunk without an end")
        return found[0] if len(found) == 1 else b"".join(found)


class Pool:
    """Connections to one base URL; as many as are wanted, each used again.

    Raises:
        ConfigError: the URL is none of http or https.
    """

    def __init__(self, url: str, *, connect_timeout: float = 10.0, verify: bool = True) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of an endpoint", hint="as http://127.0.0.1:8000/v1")
        secure = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if secure else 80)
        self.path = parts.path.rstrip("/")
        self.authority = parts.netloc.rpartition("@")[2]
        self.connect_timeout = connect_timeout
        self._tls: ssl.SSLContext | None = None
        if secure:
            self._tls = ssl.create_default_context()
            if not verify:
                self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self._idle: list[Connection] = []

    async def take(self) -> Connection:
        """An open connection.

        Raises:
            HttpError: nobody listens, or TLS fails.
        """
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        making = asyncio.get_running_loop().create_connection(Connection, self.host, self.port, ssl=self._tls)
        try:
            _, connection = await asyncio.wait_for(making, self.connect_timeout)
        except (asyncio.TimeoutError, TimeoutError) as exc:
            raise HttpError(f"no connection to {self.authority} within {self.connect_timeout:g} s") from exc
        except OSError as exc:
            raise HttpError(f"cannot connect to {self.authority}: {exc.strerror or exc}") from exc
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keeps a connection whose answer was read to its end, and ends any other."""
        if connection.reusable and not connection.closed:
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
        """A request as it goes on the wire."""
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {self.authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
