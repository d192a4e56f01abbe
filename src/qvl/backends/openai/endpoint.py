"""One OpenAI-compatible endpoint: single attempts at requests, with a timeout on every wait and limits on bodies."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from qvl.backends.openai.answer_reader import AnswerReader
from qvl.backends.openai.failures import (
    Failed,
    Impact,
    Repeat,
    broken,
    down,
    http_library,
    import_openai,
    names_dead_engine,
    too_slow,
)
from qvl.backends.openai.transport import (
    MAX_ERROR_BYTES,
    NotStraightError,
    Pieces,
    Reply,
    SdkTransport,
    StraightTransport,
    Transport,
    bounding,
    goes_straight,
    headers_of,
    repeating,
    through_proxies,
    tls_of,
)
from qvl.backends.openai.wire import ListedModel
from qvl.errors import BackendResponseError, BackendUnavailableError, ConfigError
from qvl.http.connection import LateError
from qvl.http.sse import EventReader, readable
from qvl.log import logger
from qvl.types import Chunk, JsonObject, Timing

# Seconds before each look whether an engine that broke an answer off is still there.
DYING_PAUSES: Final = (0.0, 0.05, 0.2, 0.5)
MAX_IDLE_BYTES: Final = 4 * 2**20
LINGER: Final = 0.5
OPENAI_URL: Final = "https://api.openai.com/v1"
_SCHEME: Final = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
log = logger("qvl.backends.openai")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts in seconds: connecting, first token, between tokens, total with retries."""

    connect: float = 5.0
    first_token: float = 120.0
    token: float = 60.0
    total: float = 600.0

    def __post_init__(self) -> None:
        for name in ("connect", "first_token", "token", "total"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"invalid {name}_timeout={value}", hint="seconds above 0", param=f"{name}_timeout")


@dataclass(slots=True)
class Times:
    """When a request began (monotonic), its seconds in the queue, and those until its answer began; 0 before that."""

    began: float
    queue: float = 0.0
    first_token: float = 0.0

    def timing(self) -> Timing:
        """Return the times of an answer that ends now."""
        total = time.monotonic() - self.began
        return Timing(queue=self.queue, first_token=self.first_token or total, total=total)


def read_url(url: str) -> str:
    """Return the normalised base URL: no slash at its end, `/v1` if it has no path.

    Raises:
        ConfigError: it is not an http(s) URL.
    """
    # What stands before an @ or behind a ? may be a secret, also where it is not a URL.
    invalid = ConfigError(
        f"invalid endpoint URL {url.rpartition('@')[2].partition('?')[0]!r}",
        hint="such as http://host:8000/v1",
        param="base_url",
    )
    try:
        parts = urlsplit(url.strip())
        _ = parts.port
    except ValueError:
        raise invalid from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise invalid
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", parts.query, ""))


def split_urls(text: str) -> list[str]:
    """Return the URLs of a comma-separated list; a comma within a query does not separate."""
    urls: list[str] = []
    for piece in text.split(","):
        if urls and "?" in urls[-1] and not _SCHEME.match(piece):
            urls[-1] += f",{piece}"
        else:
            urls.append(piece)
    return [url for url in urls if url.strip()]


def shown_url(url: str) -> str:
    """Return the URL for errors, logs and metrics, without user and password; a query, often secret, as its hash."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", _digest(parts.query)[:8]))


def _digest(query: str) -> str:
    return hashlib.sha256(query.encode()).hexdigest() if query else ""


class Endpoint:
    """Client of one base URL. It raises only `Failed`, except that `open` may raise ConfigError."""

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
        self._sdk: SdkTransport | None = None
        self._straight: StraightTransport | None = None
        self._leads = True
        self._closed = False
        # Learned from its last answer: streams then keep text back until the block has ended.
        self.opens_thought = False

    @property
    def identity(self) -> str:
        """Return the `url` for cache keys, with a longer hash of its query."""
        return self.url.partition("#")[0] + (
            f"#{digest[:16]}" if (digest := _digest(urlsplit(self.base_url).query)) else ""
        )

    async def open(self) -> None:
        """Make the transports, without connecting yet.

        Raises:
            MissingDependencyError: the openai package is not installed.
            ConfigError: the certificate file `verify` or a header is invalid.
        """
        if self._sdk is not None:
            return
        openai, http = import_openai(), http_library()
        tls = tls_of(http, self._verify)
        base_url, _, query = self.base_url.partition("?")
        names = parse_qsl(query, keep_blank_values=True)
        client = openai.AsyncOpenAI(
            base_url=base_url,
            default_query=dict(names),
            api_key=self._api_key,
            max_retries=0,
            default_headers=self._headers,
            http_client=through_proxies(
                openai.DefaultAsyncHttpxClient,
                url=self.base_url,
                verify=tls,
                timeout=http.Timeout(None, connect=self.timeouts.connect),
                limits=http.Limits(max_connections=None, max_keepalive_connections=256),
                event_hooks={"request": [repeating(names)], "response": [bounding(http)]},
            ),
        )
        if goes_straight(self.base_url):
            self._straight = StraightTransport(
                self.base_url, headers_of(client), connect_timeout=self.timeouts.connect, verify=tls, where=self.url
            )
        self._sdk = SdkTransport(client, self.url)
        self._closed = False

    async def aclose(self) -> None:
        """Abort running requests, then close the connections."""
        self._closed = True
        ways: tuple[Transport | None, ...] = (self._straight, self._sdk)
        self._straight = self._sdk = None
        for way in filter(None, ways):
            await way.aclose()

    async def answer(
        self,
        body: Pieces,
        *,
        n: int = 1,
        deadline: float | None = None,
        request_id: str = "",
        repeatable: bool = True,
        thinks: bool = False,
        times: Times | None = None,
    ) -> RunningAnswer:
        """Return the beginning answer to `body`, which has `"stream": true`: `n` choices, until `deadline` (monotonic).

        `request_id` is sent as `X-Request-Id`, to correlate the logs of both sides. A request that is not `repeatable`
        is never sent twice, even if it is unknown whether it arrived. `thinks`: the model is known to begin with
        reasoning, whose opening tag may be in its chat template. `times` are the request's, for the last chunk.
        """
        began = time.monotonic()
        end = began + self.timeouts.total
        if deadline is not None and deadline < end:
            end = deadline
        by = min(end, began + self.timeouts.first_token)
        reader = AnswerReader(n=n, where=self.url, opened=thinks or self.opens_thought)
        reply = await self._reply(lambda way: way.chat(body, request_id, by, repeatable=repeatable), began)
        return RunningAnswer(self, reply, reader, times or Times(began), by=by, end=end)

    async def _reply(self, send: Callable[[Transport], Awaitable[Reply]], began: float) -> Reply:
        """Return the reply of the direct transport, or of the openai client if that cannot get one."""
        if self._sdk is None:
            raise Failed(
                BackendUnavailableError(f"{self.url}: the backend is not open", hint="await backend.open()"),
                Repeat.NEVER,
                Impact.NONE,
            )
        try:
            if self._straight is not None and self._leads:
                try:
                    return await send(self._straight)
                except NotStraightError as exc:
                    log.info("the openai client takes over", endpoint=self.url, reason=str(exc))
                    # Others may still read from it; it is closed with the endpoint.
                    self._leads = False
            return await send(self._sdk)
        except Failed as exc:
            raise self.closing(exc) from exc.__cause__
        except LateError as exc:
            raise self.late("no first token", began) from exc

    def closing(self, failed: Failed) -> Failed:
        """Return `failed`, or if the backend was closed a failure that says so."""
        if not self._closed:
            return failed
        closed = down("closed while a request was running", self.url, untouched=False)
        closed.repeat, closed.impact = Repeat.NEVER, Impact.NONE
        return closed

    def late(self, what: str, began: float) -> Failed:
        """Return the failure of a wait since `began` that took too long."""
        return self.closing(
            too_slow(f"{what} in {time.monotonic() - began:.1f} s", self.url, hint="see first_token_timeout")
        )

    async def ask(self, path: str, fields: JsonObject) -> JsonObject:
        """Return the JSON object that the endpoint answers to `fields` at `path`, which stands beside its `/v1`."""
        assert self._sdk is not None
        parts = urlsplit(self.base_url)
        url = urlunsplit(parts._replace(path=parts.path.rstrip("/").removesuffix("/v1") + path))
        began = time.monotonic()
        try:
            answer = await self._sdk.ask(url, fields, began + self.timeouts.connect + self.timeouts.first_token)
        except Failed as exc:
            raise self.closing(exc) from exc.__cause__
        except LateError as exc:
            raise self.late("no answer", began) from exc
        if not isinstance(answer, dict):
            raise broken(f"{path} gave no JSON object", self.url)
        return answer

    async def died(self, failed: Failed) -> bool:
        """Return True if the engine died in the middle of an answer: it says so, or does not listen any more."""
        if names_dead_engine(failed):
            return True
        if not failed.broke:
            return False
        # A process that is ending may still accept a connection, and break it off.
        for pause in DYING_PAUSES:
            await asyncio.sleep(pause)
            try:
                await self.models()
            except Failed as asked:
                if asked.impact is Impact.DOWN:
                    return True
                if not asked.broke:
                    return False
            else:
                return False
        return True

    async def models(self) -> list[ListedModel]:
        """Return the models that GET /models lists."""
        data = bytearray()
        began = time.monotonic()
        by = began + self.timeouts.connect + min(10.0, self.timeouts.first_token)
        reply = await self._reply(lambda way: way.models(by), began)
        try:
            while block := await reply.read(by):
                data += block
                if len(data) > MAX_ERROR_BYTES * 64:
                    raise broken("the list of models is too long", self.url)
            listed = json.loads(data)
            entries: list[ListedModel] | None = listed.get("data") if isinstance(listed, dict) else None
        except Failed as exc:
            raise self.closing(exc) from exc.__cause__
        except LateError as exc:
            raise self.late("no list of models", began) from exc
        except ValueError as exc:
            raise broken(f"the list of models is not JSON: {readable(bytes(data))}", self.url) from exc
        finally:
            await reply.close()
        return [entry for entry in entries or () if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


class RunningAnswer:
    """An answer that an endpoint is giving, until `end` (monotonic), and its first chunk before `by`.

    `aclose` must always be called.
    """

    def __init__(
        self, endpoint: Endpoint, reply: Reply, reader: AnswerReader, times: Times, *, by: float, end: float
    ) -> None:
        self._endpoint, self._reply, self._reader, self._times = endpoint, reply, reader, times
        self._by, self._end = by, end
        self._events = EventReader()
        self._payloads: Iterator[bytes] = iter(())
        self._idle = 0
        self._came = self._started = self._ended = self._whole = False

    async def read(self) -> Sequence[Chunk]:
        """Return the next chunks, those of one event; none once the answer is whole.

        The last chunk has finish_reason, usage and timing.
        """
        reader = self._reader
        while not self._whole:
            for payload in self._payloads:
                if chunks := reader.read(payload):
                    if not self._started:
                        self._started = True
                        self._times.first_token = self._times.first_token or time.monotonic() - self._times.began
                    self._idle = 0
                    return chunks
                self._idle += len(payload)
                if self._idle > MAX_IDLE_BYTES:
                    raise broken("endless stream without content", self._endpoint.url)
            if reader.done or self._ended:
                self._whole = True
                last = reader.end(self._times.timing())
                self._endpoint.opens_thought = reader.opened_by_template
                return (last,)
            if self._came and self._started:
                self._by = min(self._end, time.monotonic() + self._endpoint.timeouts.token)
            await self._next()
        if not self._ended:
            self._ended = True
            await _finish(self._reply)
        return ()

    async def _next(self) -> None:
        """Read the next bytes, and take the payloads of the events that they complete."""
        began = time.monotonic()
        try:
            data = await self._reply.read(self._by)
            payloads = self._events.feed(data) if data else self._events.end()
        except BackendResponseError as exc:
            raise broken(exc.message, self._endpoint.url, hint=exc.hint) from exc
        except Failed as exc:
            raise self._endpoint.closing(exc) from exc.__cause__
        except LateError as exc:
            what = "no further token" if self._started else "no first token"
            raise self._endpoint.late(what, began) from exc
        self._ended = not data
        self._came = bool(payloads)
        self._payloads = iter(payloads)

    async def aclose(self) -> None:
        """Release the connection if the answer was read to its end; else close it, which aborts the endpoint's work."""
        await self._reply.close()


async def _finish(reply: Reply) -> None:
    """Read the body after `[DONE]` to its end, so that the connection can be reused."""
    by = time.monotonic() + LINGER
    with suppress(Failed, LateError):
        while await reply.read(by):
            pass
