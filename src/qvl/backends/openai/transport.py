"""The two transports to an endpoint: direct, over our own HTTP connection, or through the openai package's client.

Both send the openai client's headers: authentication, organisation and project, user agent, those of its environment
variables. The direct one is used wherever possible; proxies, redirects and users in the URL need the client.
"""

from __future__ import annotations

import contextlib
import json
import math
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import anyio

from qvl.backends.openai.failures import Failed, Impact, Repeat, broken, crossing, cut_off, down, from_status
from qvl.errors import ConfigError, MissingDependencyError
from qvl.http.connection import Connection, LateError, NoConnectionError, Pool, StaleError, TlsError
from qvl.http.framing import Body, BrokenAnswerError, TransportError
from qvl.http.trace_context import CARRIED

if TYPE_CHECKING:
    # openai 3.x brings httpx2 in the place of httpx; what is used here of both is the same.
    import httpx
    from openai import AsyncAPIResponse, AsyncOpenAI

    from qvl.types import JsonObject

MAX_ANSWER_BYTES: Final = 256 * 2**20
MAX_ERROR_BYTES: Final = 64 * 2**10
# An error's status says most of it; what its body says besides comes soon or is left out.
ERROR_SECONDS: Final = 2.0
T = TypeVar("T")
# A body: megabytes are not joined to be sent.
Pieces: TypeAlias = Sequence[bytes | memoryview]


class NotStraightError(Exception):
    """The direct transport cannot get an answer, and the endpoint has not begun any work."""


class Reply(ABC):
    """A successful response whose body is still to be read. `close` must always be called."""

    @abstractmethod
    async def read(self, deadline: float) -> bytes:
        """Return the next bytes of the body, b"" at the end. `deadline` is a time.monotonic().

        Raises:
            Failed: the connection broke off, or the answer is larger than MAX_ANSWER_BYTES.
            LateError: nothing arrived before the deadline.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release the connection if the body was read to its end; else close it, which aborts the endpoint's work."""


class Transport(ABC):
    """Sends requests to one base URL."""

    @abstractmethod
    async def chat(self, body: Pieces, request_id: str, deadline: float, *, repeatable: bool) -> Reply:
        """POST /chat/completions; return its reply. `deadline` (time.monotonic()) is for the head of the response.

        `repeatable`: the request may be sent once more if it is unknown whether it arrived.

        Raises:
            Failed: no connection, or a status of 400 and above.
            LateError: no response before the deadline.
        """

    @abstractmethod
    async def models(self, deadline: float) -> Reply:
        """GET /models; return its reply. Raises as `chat`."""

    @abstractmethod
    async def aclose(self) -> None:
        """Abort all requests; their readers get a `Failed`."""


class StraightTransport(Transport):
    """The direct transport, over our own connections; `where` names the endpoint in errors.

    Raises:
        ConfigError: a header is not valid in HTTP.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], *, connect_timeout: float, verify: ssl.SSLContext | bool, where: str
    ) -> None:
        self._pool = Pool(url, connect_timeout=connect_timeout, verify=verify)
        self._where = where
        self._chat = self._pool.head("POST", "/chat/completions", headers)
        self._models = self._pool.head("GET", "/models", headers) + b"\r\n"
        self._busy: set[Connection] = set()

    async def chat(self, body: Pieces, request_id: str, deadline: float, *, repeatable: bool) -> Reply:
        own = "".join([f"{name}: {value}\r\n" for name, value in _own_headers(request_id).items()])
        head = b"%s%sContent-Length: %d\r\n\r\n" % (self._chat, own.encode(), sum(map(len, body)))
        return await self._send((head, *body), deadline, repeatable=repeatable)

    async def models(self, deadline: float) -> Reply:
        return await self._send((self._models,), deadline, repeatable=True)

    async def _send(self, request: Pieces, deadline: float, *, repeatable: bool) -> Reply:
        """Return the reply to a request sent on an idle connection, or on a new one if that was closed meanwhile."""
        try:
            return await self._send_once(request, deadline)
        except StaleError as exc:
            if not repeatable:
                failed = down(f"the connection broke off: {exc}", self._where, untouched=False)
                failed.impact = Impact.NONE
                raise failed from exc
        # What made this one stale (a restart, a limit on idling) has most likely ended the others as well.
        self._pool.drop_idle()
        try:
            return await self._send_once(request, deadline)
        except Failed as failed:
            # Or the endpoint died of this very request, which then did arrive.
            if failed.impact is Impact.DOWN:
                failed.untouched, failed.broke = False, True
            raise

    async def _send_once(self, request: Pieces, deadline: float) -> Reply:
        try:
            connection = await self._pool.take(deadline)
        except NoConnectionError as exc:
            raise self._no_connection(exc) from exc
        self._busy.add(connection)
        try:
            connection.send(*request)
            _, status, headers = await connection.head(deadline)
            body = Body(status, headers)
            if status >= 400:
                raise from_status(status, await _error_body(connection, body, deadline), headers, self._where)
            if status >= 300:
                raise NotStraightError(f"status {status}")
        except BaseException as exc:
            self.let_go(connection)
            if isinstance(exc, BrokenAnswerError):
                raise broken(str(exc), self._where) from exc
            if isinstance(exc, TransportError) and not isinstance(exc, StaleError):
                raise down(f"the connection broke off: {exc}", self._where, untouched=False) from exc
            raise
        return StraightReply(self, connection, body, self._where)

    def let_go(self, connection: Connection) -> None:
        """Return a connection to the pool."""
        self._busy.discard(connection)
        self._pool.give_back(connection)

    async def aclose(self) -> None:
        self._pool.close()
        for connection in tuple(self._busy):
            connection.fail(TransportError("closed while a request was running"))

    def _no_connection(self, exc: NoConnectionError) -> Failed:
        if isinstance(exc, TlsError):
            failed = down(str(exc), self._where, hint="see verify=")
            failed.repeat = Repeat.ELSEWHERE
            return failed
        return down(str(exc), self._where, hint=None if exc.__cause__ else "see connect_timeout")


@dataclass(eq=False)
class StraightReply(Reply):
    """A response of the direct transport."""

    _transport: StraightTransport
    _connection: Connection
    _body: Body
    _where: str
    _remaining: int = MAX_ANSWER_BYTES

    async def read(self, deadline: float) -> bytes:
        try:
            piece = await self._connection.next_piece(self._body, deadline)
        except BrokenAnswerError as exc:
            raise broken(str(exc), self._where) from exc
        except TransportError as exc:
            raise cut_off(f"the connection broke off: {exc}", self._where) from exc
        if piece is None:
            return b""
        self._remaining -= len(piece[1])
        if self._remaining < 0:
            raise broken(f"more than {MAX_ANSWER_BYTES} bytes in one answer", self._where)
        return piece[1]

    async def close(self) -> None:
        self._transport.let_go(self._connection)


class SdkTransport(Transport):
    """The transport over the openai client, whose HTTP client has the hook `bounding`; `where` is for errors."""

    def __init__(self, client: AsyncOpenAI, where: str) -> None:
        self._client = client
        self._where = where
        self._scopes: set[anyio.CancelScope] = set()

    async def chat(self, body: Pieces, request_id: str, deadline: float, *, repeatable: bool) -> Reply:
        fields = json.loads(b"".join(body))
        return await self._begun(
            # As extra_body, the body is sent as it is: no walk through every part by the client's types.
            self._client.chat.completions.with_streaming_response.create(
                model=fields["model"],
                messages=(),
                stream=True,
                extra_body=fields,
                extra_headers=_own_headers(request_id),
            ),
            deadline,
        )

    async def models(self, deadline: float) -> Reply:
        return await self._begun(self._client.models.with_streaming_response.list(), deadline)

    async def ask(self, url: str, fields: JsonObject, deadline: float) -> object:
        """Return the JSON that the endpoint answers to `fields` at `url`, which need not be below the base URL.

        Raises:
            Failed: no connection, or a status of 400 and above.
            LateError: no answer before the deadline.
        """
        with crossing(self._where), self.until(deadline):
            return await self._client.post(url, cast_to=object, body=fields)

    async def _begun(
        self, sending: contextlib.AbstractAsyncContextManager[AsyncAPIResponse[T]], deadline: float
    ) -> Reply:
        stack = contextlib.AsyncExitStack()
        with crossing(self._where), self.until(deadline):
            response = await stack.enter_async_context(sending)
        return SdkReply(self, stack, response.iter_bytes(), self._where)

    @contextlib.contextmanager
    def until(self, moment: float) -> Iterator[None]:
        """Limit one await to `moment`; `aclose` ends it early. Never used across a yield, so no cancel scope leaks."""
        scope = anyio.CancelScope(deadline=anyio.current_time() + max(0.0, moment - time.monotonic()))
        self._scopes.add(scope)
        try:
            with scope:
                yield
        finally:
            self._scopes.discard(scope)
        if scope.cancelled_caught:
            raise LateError

    async def aclose(self) -> None:
        for scope in tuple(self._scopes):
            scope.cancel()
        await self._client.close()


@dataclass(eq=False)
class SdkReply(Reply):
    """A response of the openai client."""

    _transport: SdkTransport
    _stack: contextlib.AsyncExitStack
    _blocks: AsyncIterator[bytes]
    _where: str

    async def read(self, deadline: float) -> bytes:
        with crossing(self._where), self._transport.until(deadline):
            return await anext(self._blocks, b"")

    async def close(self) -> None:
        await self._stack.aclose()


def goes_straight(url: str) -> bool:
    """True if the direct transport can reach `url`: no proxy is configured for it, and it has no user."""
    return urlsplit(url).username is None and _proxy_of(url) is None


def _proxy_of(url: str) -> tuple[str, str] | None:
    """Return (environment variable, proxy) for `url`, as HTTP libraries find it."""
    parts, proxies = urlsplit(url), getproxies()
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return f"{scheme.upper()}_PROXY", proxies[scheme]


def through_proxies(client: Callable[..., T], *, url: str, **options: object) -> T:
    """Return `client(**options)` with the environment's proxies, for requests to `url`.

    A proxy that cannot be used (SOCKS without its package, an unknown scheme) is an error only if `url` needs it:
    HTTP libraries prepare all proxies at once, even for hosts in NO_PROXY.

    Raises:
        MissingDependencyError: a SOCKS proxy is configured, and its package is not installed.
        ConfigError: the URL of a proxy is invalid.
    """
    try:
        return client(**options)
    except Exception as exc:
        if not _is_of_a_proxy(exc):
            raise
        configured = _proxy_of(url)
    if configured is None:
        return client(trust_env=False, **options)
    name, proxy = configured
    try:
        return client(trust_env=False, proxy=proxy if "://" in proxy else f"http://{proxy}", **options)
    except Exception as exc:
        if not _is_of_a_proxy(exc):
            raise
        hint = "unset it, or name the host in NO_PROXY"
        scheme, separator, rest = proxy.rpartition("://")
        named = f"{name}={scheme}{separator}{rest.rpartition('@')[2]}"
        if isinstance(exc, ImportError):
            raise MissingDependencyError(
                f"the proxy of {named} needs the package socksio", hint=f"pip install socksio; or {hint}"
            ) from exc
        raise ConfigError(f"the proxy of {named} cannot be used: {exc}", hint=hint) from exc


def _is_of_a_proxy(exc: Exception) -> bool:
    # InvalidURL is not a ValueError, and of whichever HTTP library the client is.
    return isinstance(exc, ImportError | ValueError) or type(exc).__name__ == "InvalidURL"


def repeating(query: Sequence[tuple[str, str]]) -> Callable[[httpx.Request], Awaitable[None]]:
    """Return a request hook that restores repeated names of `query`, of which the openai client sends only the last."""

    async def repeat(request: httpx.Request) -> None:
        if len(dict(query)) < len(query) and parse_qsl(request.url.query.decode(), True) == [*dict(query).items()]:
            request.url = request.url.copy_with(query=urlencode(query).encode())

    return repeat


def headers_of(client: AsyncOpenAI) -> dict[str, str]:
    """Return the headers of every request of an `openai.AsyncOpenAI`, except those about itself (`X-Stainless-…`)."""
    headers: dict[str, tuple[str, str]] = {}
    for name, value in {**client.auth_headers, **client.default_headers}.items():
        if isinstance(value, str) and not name.lower().startswith("x-stainless-"):
            headers[name.lower()] = (name, value)
    return dict(headers.values())


def bounding(http: ModuleType) -> Callable[[httpx.Response], Awaitable[None]]:
    """Return a response hook that limits bodies, so that neither an error page nor an answer can fill the memory.

    Reading an error's body also ends after ERROR_SECONDS.
    """

    # The base class is known at run time alone.
    class BoundedStream(http.AsyncByteStream):  # type: ignore[name-defined, misc]
        def __init__(self, inner: httpx.AsyncByteStream, limit: int, *, fail: bool) -> None:
            self._inner, self._limit, self._fail = inner, limit, fail

        async def __aiter__(self) -> AsyncGenerator[bytes, None]:
            remaining, blocks = self._limit, aiter(self._inner)
            end = math.inf if self._fail else anyio.current_time() + ERROR_SECONDS
            while remaining > 0:
                block = None
                with anyio.CancelScope(deadline=end):
                    block = await anext(blocks, None)
                if block is None:
                    return
                if len(block) > remaining and self._fail:
                    raise http.DecodingError(f"more than {self._limit} bytes in one answer")
                yield block[:remaining]
                remaining -= len(block)

        async def aclose(self) -> None:
            await self._inner.aclose()

    async def bound(response: httpx.Response) -> None:
        stream, failing = response.stream, response.status_code >= 400
        assert isinstance(stream, http.AsyncByteStream)
        response.stream = BoundedStream(stream, MAX_ERROR_BYTES if failing else MAX_ANSWER_BYTES, fail=not failing)

    return bound


def tls_of(http: ModuleType, verify: bool | str) -> ssl.SSLContext:
    """Return the TLS context that the HTTP library `http` would use.

    Raises:
        ConfigError: the certificate file `verify` does not exist or is invalid.
    """
    try:
        if isinstance(verify, str):
            return ssl.create_default_context(cafile=verify)
        context: ssl.SSLContext = http.create_ssl_context(verify=verify)
    except OSError as exc:
        raise ConfigError(f"invalid verify={verify!r}: {exc}", param="verify") from exc
    return context


async def _error_body(connection: Connection, body: Body, deadline: float) -> bytes:
    """Return the beginning of an error's body, as much as arrives."""
    data, deadline = bytearray(), min(deadline, time.monotonic() + ERROR_SECONDS)
    with contextlib.suppress(TransportError, LateError):
        while len(data) < MAX_ERROR_BYTES and (piece := await connection.next_piece(body, deadline)) is not None:
            data += piece[1]
    return bytes(data[:MAX_ERROR_BYTES])


def _own_headers(request_id: str) -> dict[str, str]:
    """Return the headers of one request: its id, and the trace context."""
    headers = {name: value for name, value in CARRIED.get().items() if _plain(value)}
    if _plain(request_id):
        headers["X-Request-Id"] = request_id
    return headers


def _plain(request_id: str) -> bool:
    """True if the id is valid in a header."""
    return bool(request_id) and request_id.isascii() and request_id.isprintable()
