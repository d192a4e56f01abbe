"""An HTTP/1.1 client that records the time at which every piece of a response arrived at the socket.

Used by the load client and the `openai` backend. A general client takes longer for a small streamed answer than the
time between two requests at 2,000 a second, and its times are those of the reader's wake-up. Here pieces get their
time when the event loop delivers them. No proxies, no redirects.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from contextvars import Context
from time import monotonic, perf_counter
from typing import Final, cast
from urllib.parse import urlsplit

from qvl.errors import ConfigError
from qvl.http.framing import END, MAX_HEAD, Body, BrokenAnswerError, TransportError, read_head

MAX_BUFFERED: Final = 4 * 2**20
# Most servers close a connection that idles for 5 s, and a request sent into that moment would be lost.
KEEP_SECONDS: Final = 4.0
MAX_IDLE: Final = 256
# Until the next address of a name is tried beside the one that does not answer (RFC 8305).
STAGGER_SECONDS: Final = 0.25
# What listens but speaks no TLS hangs up on the greeting; a refused connection is another error.
_TLS_FAILURES: Final = (ssl.SSLError, ConnectionResetError, ConnectionAbortedError)


class NoConnectionError(TransportError):
    """Cannot connect: connection refused, unknown host, TLS failure or timeout."""


class StaleError(TransportError):
    """A reused connection broke off before any response byte: most likely the server closed it while it was idle."""


class TlsError(NoConnectionError):
    """The TLS handshake failed: an untrusted certificate, or a server without TLS."""


class LateError(Exception):
    """The deadline passed during a wait."""


class Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self.reusable = False
        self.idle_since: float | None = None
        self._transport: asyncio.Transport | None = None
        self._came: deque[tuple[float, bytes]] = deque()
        self._buffered = 0
        self._paused = False
        self._ended = False
        self._problem: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: float | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self._rest = b""

    @property
    def closed(self) -> bool:
        """True if the connection is closed for sending."""
        return self._ended or self._transport is None or self._transport.is_closing()

    @property
    def fresh(self) -> bool:
        """True if the connection can be reused: it is open, and received no unexpected data."""
        return not self.closed and not self._came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._came.append((perf_counter(), data))
        self._buffered += len(data)
        if self._buffered > MAX_BUFFERED and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        if exc is not None and self._problem is None:
            # A TimeoutError of the network's is not a deadline of ours.
            self._problem = TransportError(str(exc) or type(exc).__name__)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._wake()

    def fail(self, problem: Exception) -> None:
        """End the exchange: the waiting reader gets `problem`."""
        self._problem, self._ended = problem, True
        self._wake()
        self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def send(self, *pieces: bytes | memoryview) -> None:
        """Queue the bytes of a request for sending, without waiting. Pieces are not joined, since one may be large."""
        assert self._transport is not None
        self.reusable = False
        self._transport.writelines(pieces)

    async def head(self, deadline: float | None = None) -> tuple[float, int, Mapping[str, str]]:
        """Return (time of the first byte, status, headers in lower case); `deadline` is a time.monotonic().

        Raises:
            StaleError: the connection was reused, and broke off without a byte.
            TransportError: the connection broke off, or the response is not HTTP.
            LateError: it did not arrive before the deadline.
        """
        data, first = b"", 0.0
        while True:
            while (end := data.find(b"\r\n\r\n")) < 0:
                if len(data) > MAX_HEAD:
                    raise BrokenAnswerError(f"headers longer than {MAX_HEAD} bytes (check the server and its proxies)")
                try:
                    when, more = await self._next("the connection was closed without an answer", deadline)
                except TransportError as exc:
                    if self.idle_since is None or first:
                        raise
                    raise StaleError(str(exc)) from exc
                first = first or when
                data += more
            status, headers = read_head(data[:end])
            data = data[end + 4 :]
            # 100 Continue and 103 Early Hints come before the answer.
            if status >= 200:
                self._rest = data
                return first, status, headers

    async def next_piece(self, body: Body, deadline: float | None = None) -> tuple[float, bytes] | None:
        """Return (time of arrival, next bytes of the body), None at its end. `deadline` is a time.monotonic().

        Raises:
            TransportError: the connection broke off within the body.
            LateError: they did not arrive before the deadline.
        """
        while not body.done:
            if self._rest:
                when, data, self._rest = perf_counter(), self._rest, b""
            else:
                try:
                    when, data = await self._next("the connection was closed within the answer", deadline)
                except TransportError:
                    if body.ends_with_connection and self._problem is None:
                        body.done = True
                        return None
                    raise
            payload = body.feed(data)
            if payload:
                return when, payload
        self.reusable = body.keeps and not self._rest and not self._came and not self._ended
        return None

    async def _next(self, otherwise: str, deadline: float | None) -> tuple[float, bytes]:
        while not self._came:
            if self._ended:
                if isinstance(self._problem, TimeoutError | asyncio.TimeoutError):
                    raise self._problem
                raise TransportError(str(self._problem or "") or otherwise) from self._problem
            if deadline is not None:
                if deadline <= monotonic():
                    # Not by the alarm: what comes without a pause would be there before it every time.
                    raise LateError
                if self._alarm is None or self._alarm_at > deadline:
                    self._set_alarm(deadline)
            self._deadline = deadline
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        when, data = self._came.popleft()
        self._buffered -= len(data)
        if self._paused and self._buffered < MAX_BUFFERED // 2 and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return when, data

    def _set_alarm(self, at: float) -> None:
        """Have `_ring` called at a moment. A timer for every wait would cost more than the waits."""
        if self._alarm is not None:
            self._alarm.cancel()
        # It outlives this request, and would keep all that is in its context.
        loop, self._alarm_at = asyncio.get_running_loop(), at
        self._alarm = loop.call_later(max(0.0, at - monotonic()), self._ring, context=Context())

    def _ring(self) -> None:
        self._alarm = None
        if self._waiter is None or self._deadline is None:
            return
        if self._deadline <= monotonic():
            self._wake()
        else:
            self._set_alarm(self._deadline)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pool:
    """A pool of connections to one base URL: one for each concurrent request, kept alive and reused.

    Args:
        url: base URL, with `/v1` or the like; user and password are not sent, a query is added to every path.
        connect_timeout: seconds until connected, TLS included.
        verify: False trusts any TLS certificate; or a TLS context.
        keep: seconds after which an idle connection is not reused.

    Raises:
        ConfigError: the URL is neither http nor https.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float = 10.0,
        verify: bool | ssl.SSLContext = True,
        keep: float = KEEP_SECONDS,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"invalid endpoint URL {url!r}", hint="write http://127.0.0.1:8000/v1")
        secure = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if secure else 80)
        self.path = parts.path.rstrip("/")
        self.query = f"?{parts.query}" if parts.query else ""
        self.authority = parts.netloc.rpartition("@")[2]
        self.connect_timeout = connect_timeout
        self._tls = _tls_context(verify) if secure else None
        self._keep = keep
        self._idle: list[Connection] = []
        self._dialing: set[asyncio.Task[Connection]] = set()
        self._closed = False

    async def take(self, deadline: float | None = None) -> Connection:
        """Return an open connection, idle or new; `deadline` is a time.monotonic().

        Raises:
            NoConnectionError: connection refused, TLS failure, or longer than `connect_timeout`.
            LateError: it takes longer than `deadline`.
        """
        if self._closed:
            raise NoConnectionError("closed while connecting")
        oldest = monotonic() - self._keep
        while self._idle:
            connection = self._idle.pop()
            if connection.fresh and (connection.idle_since or 0.0) >= oldest:
                return connection
            connection.abort()
        allowed = (
            self.connect_timeout if deadline is None else min(self.connect_timeout, max(0.0, deadline - monotonic()))
        )
        # It outlives this request, and would keep all that is in its context.
        dialing = asyncio.get_running_loop().create_task(self._dial(), context=Context())
        self._dialing.add(dialing)
        taken = False
        try:
            await asyncio.wait((dialing,), timeout=allowed)
            if not dialing.done():
                if allowed < self.connect_timeout:
                    raise LateError
                raise NoConnectionError(f"no connection to {self.authority} within {allowed:g} s")
            if dialing.cancelled() or self._closed:
                raise NoConnectionError("closed while connecting")
            taken = True
            return dialing.result()
        except (OSError, UnicodeError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            if self._tls is not None and isinstance(exc, _TLS_FAILURES):
                raise TlsError(f"TLS with {self.authority} failed: {reason}") from exc
            raise NoConnectionError(f"cannot connect to {self.authority}: {reason}") from exc
        finally:
            self._dialing.discard(dialing)
            if not taken:
                dialing.add_done_callback(_let_go)
                dialing.cancel()

    async def _dial(self) -> Connection:
        """Return a connection to the first address that accepts; the next is tried when one fails or is slow."""
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        tries: list[asyncio.Task[Connection]] = []
        try:
            for address in dict.fromkeys(str(item[4][0]) for item in addresses):
                tries.append(loop.create_task(self._dial_at(address)))
                if (connection := await _first(tries, STAGGER_SECONDS)) is not None:
                    return connection
            while any(not task.done() for task in tries):
                if (connection := await _first(tries, None)) is not None:
                    return connection
            return tries[0].result()
        finally:
            for task in tries:
                task.add_done_callback(_let_go)
                task.cancel()

    async def _dial_at(self, address: str) -> Connection:
        name = self.host if self._tls is not None else None
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, address, self.port, ssl=self._tls, server_hostname=name
        )
        return connection

    def give_back(self, connection: Connection) -> None:
        """Return a connection to the pool if its response was read to the end; close it otherwise."""
        if connection.reusable and not self._closed and not connection.closed and len(self._idle) < MAX_IDLE:
            connection.idle_since = monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Close idle connections and abort those being made; connections in use are closed when they are given back."""
        self._closed = True
        for dialing in self._dialing:
            dialing.cancel()
        self.drop_idle()

    def drop_idle(self) -> None:
        """Close all idle connections, so that the next request uses a new one."""
        while self._idle:
            self._idle.pop().abort()

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """Return the head of a request without its last line, for callers that send the same one many times.

        Raises:
            ConfigError: a header is not valid in HTTP.
        """
        lines = [f"{method} {self.path}{path}{self.query} HTTP/1.1", f"Host: {self.authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        text = "\r\n".join(lines)
        if text.count("\r") != len(lines) - 1 or text.count("\n") != len(lines) - 1:
            raise ConfigError("invalid header: it has a line break", hint="check the extra headers and the API key")
        try:
            return text.encode("latin-1") + END
        except UnicodeEncodeError as exc:
            raise ConfigError("invalid header: it has characters outside Latin-1", hint="check the API key") from exc

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
        """Return a request encoded as bytes; nothing is sent."""
        length = b"Content-Length: %d\r\n" % len(body) if body else b""
        return self.head(method, path, headers) + length + END + body


def _tls_context(verify: bool | ssl.SSLContext) -> ssl.SSLContext:
    if isinstance(verify, ssl.SSLContext):
        return verify
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def _first(tries: list[asyncio.Task[Connection]], seconds: float | None) -> Connection | None:
    """Return the first connection made within `seconds`, removed from `tries`; None after a timeout or a failure."""
    pending = [task for task in tries if not task.done()]
    done, _ = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if not task.cancelled() and task.exception() is None:
            tries.remove(task)
            return task.result()
    return None


def _let_go(task: asyncio.Task[Connection]) -> None:
    """Close a connection that was made after another one won."""
    if not task.cancelled() and task.exception() is None:
        task.result().abort()
