"""One OpenAI-compatible URL: one attempt at one request, with every wait bounded and every body bounded.

Requests go through the openai package, so its authentication, headers and connection pool are the ones users know; the
events are read by us, because its own reader has no bound on what an endpoint may send.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import anyio

from qvl.backends.failures import Blame, Failed, Repeat, broken, crossing, down, http_library, import_openai, too_slow
from qvl.backends.sse import EventReader, readable
from qvl.backends.wire import AnswerReader
from qvl.errors import BackendUnavailableError, ConfigError
from qvl.types import Chunk

MAX_ANSWER_BYTES: Final = 256 * 2**20
MAX_ERROR_BYTES: Final = 64 * 2**10
MAX_IDLE_BYTES: Final = 4 * 2**20
LINGER: Final = 0.5
OPENAI_URL: Final = "https://api.openai.com/v1"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: until connected, until the first token, between tokens, and for everything, retries included."""

    connect: float = 5.0
    first_token: float = 120.0
    token: float = 60.0
    total: float = 600.0

    def __post_init__(self) -> None:
        for name in ("connect", "first_token", "token", "total"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name}_timeout={value} is no time", hint="seconds above 0", param=f"{name}_timeout")


def read_url(url: str) -> str:
    """The base URL as it is used: no slash at its end, `/v1` where no path is given.

    Raises:
        ConfigError: it is no http(s) URL.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no endpoint", hint="such as http://host:8000/v1", param="base_url")
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", parts.query, ""))


def shown_url(url: str) -> str:
    """The URL without user, password and query, for errors, logs and cache keys."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Endpoint:
    """Talks to one base URL. Everything it raises is `Failed`, except that `open` may raise ConfigError."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool | str = True,
    ) -> None:
        self.base_url = read_url(url)
        self.url = shown_url(self.base_url)
        self.timeouts = timeouts or Timeouts()
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        self._verify = verify
        self._client: Any = None
        self._closed = False
        self._scopes: set[anyio.CancelScope] = set()

    async def open(self) -> None:
        """Makes the client; connects to nothing yet.

        Raises:
            MissingDependencyError: the openai package is not installed.
            ConfigError: `verify` names no certificate file.
        """
        if self._client is not None:
            return
        openai, http = import_openai(), http_library()
        try:
            client = openai.DefaultAsyncHttpxClient(
                verify=_certificates(self._verify),
                timeout=http.Timeout(None, connect=self.timeouts.connect),
                limits=http.Limits(max_connections=None, max_keepalive_connections=256),
                event_hooks={"response": [_bounding(http)]},
            )
        except OSError as exc:
            raise ConfigError(f"verify={self._verify!r}: {exc}", param="verify") from exc
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._api_key,
            max_retries=0,
            default_headers=self._headers,
            http_client=client,
        )
        self._closed = False

    async def aclose(self) -> None:
        """Ends reads in flight at once, then closes the connections."""
        self._closed = True
        for scope in tuple(self._scopes):
            scope.cancel()
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def stream(
        self, body: Mapping[str, Any], *, n: int = 1, deadline: float | None = None, request_id: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to a chat completion body with `"stream": true`; `deadline` by time.monotonic().

        `request_id` goes along as `X-Request-Id`, so that the logs of both sides can be laid side by side.

        The last chunk has finish_reason and usage.
        """
        client = self._opened()
        now = time.monotonic()
        end = min(deadline if deadline is not None else now + self.timeouts.total, now + self.timeouts.total)
        first_by = min(end, now + self.timeouts.first_token)
        answer, events = AnswerReader(n=n, where=self.url), EventReader()
        async with AsyncExitStack() as stack:
            with crossing(self.url), self._until(first_by, "no first token"):
                response = await stack.enter_async_context(
                    # As extra_body, the body is sent as it is: no walk through every part by the client's types.
                    client.chat.completions.with_streaming_response.create(
                        model=body["model"],
                        messages=(),
                        stream=True,
                        extra_body=dict(body),
                        extra_headers={"X-Request-Id": request_id} if request_id else None,
                    )
                )
            blocks = response.iter_bytes()
            by, started, ended, idle = first_by, False, False, 0
            while not ended:
                with crossing(self.url), self._until(by, "no further token" if started else "no first token"):
                    data = await anext(blocks, None)
                    payloads = events.end() if data is None else events.feed(data)
                ended = data is None
                for payload in payloads:
                    idle += len(payload)
                    for chunk in answer.read(payload):
                        started, idle = True, 0
                        yield chunk
                    if idle > MAX_IDLE_BYTES:
                        raise broken("an endless stream without content", self.url)
                ended = ended or answer.done
                if payloads and started:
                    by = min(end, time.monotonic() + self.timeouts.token)
            yield answer.end()
            if data is not None:
                await self._finish(blocks)

    async def _finish(self, blocks: AsyncIterator[bytes]) -> None:
        """Reads what comes after `[DONE]`, so that the connection can be used again."""
        with suppress(Failed), crossing(self.url), self._until(time.monotonic() + LINGER, "no end"):
            async for _ in blocks:
                pass

    async def models(self) -> list[dict[str, Any]]:
        """What GET /models lists; empty when the endpoint has no such list."""
        client = self._opened()
        data = bytearray()
        by = time.monotonic() + self.timeouts.connect + min(10.0, self.timeouts.first_token)
        with crossing(self.url), self._until(by, "no list of models"):
            async with client.models.with_streaming_response.list() as response:
                async for block in response.iter_bytes():
                    data += block
                    if len(data) > MAX_ERROR_BYTES * 64:
                        raise broken("the list of models is endless", self.url)
        try:
            listed = json.loads(data)
            models = listed.get("data") if isinstance(listed, dict) else None
        except ValueError as exc:
            raise broken(f"the list of models is no JSON: {readable(bytes(data))}", self.url) from exc
        return [model for model in models or () if isinstance(model, dict) and isinstance(model.get("id"), str)]

    def _opened(self) -> Any:
        if self._client is None:
            raise Failed(
                BackendUnavailableError(f"{self.url}: the backend is not open", hint="await backend.open()"),
                Repeat.NEVER,
                Blame.NONE,
            )
        return self._client

    @contextmanager
    def _until(self, moment: float, what: str) -> Iterator[None]:
        """Bounds one await; `aclose` ends it early. Never held across a yield, so no cancel scope leaks to a caller."""
        began = time.monotonic()
        scope = anyio.CancelScope(deadline=anyio.current_time() + max(0.0, moment - began))
        self._scopes.add(scope)
        try:
            with scope:
                yield
        except Exception:
            # Closing the client makes a read fail in its own words; what happened is that we were closed.
            if self._closed and not scope.cancel_called:
                raise self._was_closed() from None
            raise
        finally:
            self._scopes.discard(scope)
        if scope.cancelled_caught:
            if self._closed:
                raise self._was_closed()
            raise too_slow(f"{what} in {time.monotonic() - began:.1f} s", self.url, hint="see first_token_timeout")

    def _was_closed(self) -> Failed:
        failed = down("closed while a request was running", self.url, untouched=False)
        failed.repeat, failed.blame = Repeat.NEVER, Blame.NONE
        return failed


def _certificates(verify: bool | str) -> Any:
    if not isinstance(verify, str):
        return verify
    import ssl

    return ssl.create_default_context(cafile=verify)


def _bounding(http: Any) -> Any:
    """A response hook: bodies end at a bound, so that neither an error page nor an answer can fill the memory."""

    class Bounded(http.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, inner: Any, limit: int, *, fail: bool) -> None:
            self._inner, self._limit, self._fail = inner, limit, fail

        async def __aiter__(self) -> AsyncGenerator[bytes, None]:
            left = self._limit
            async for block in self._inner:
                if len(block) > left and self._fail:
                    raise http.DecodingError(f"more than {self._limit} bytes in one answer")
                yield block[:left]
                left -= len(block)
                if left <= 0:
                    return

        async def aclose(self) -> None:
            await self._inner.aclose()

    async def bound(response: Any) -> None:
        failing = response.status_code >= 400
        response.stream = Bounded(response.stream, MAX_ERROR_BYTES if failing else MAX_ANSWER_BYTES, fail=not failing)

    return bound
