"""The exchange of one HTTP request: sending, reading of the stream, and its times on one clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from qvl.backends.openai.failures import Failed, Repeat, from_event, from_status
from qvl.bench.apis import APIS, BenchApi
from qvl.bench.timed_answer import TimedAnswer
from qvl.errors import BackendResponseError, ConfigError
from qvl.http.connection import Pool
from qvl.http.framing import Body, BrokenAnswerError, TransportError
from qvl.http.sse import MAX_EVENT_BYTES, EventReader, readable

OVERLOAD: Final = frozenset({"http_429", "http_503", "http_529", "timeout"})
CACHE_STATES: Final = ("hit", "miss", "coalesced", "bypass")


@dataclass(eq=False)
class AttemptFailedError(Exception):
    """One attempt failed. `again` is True if the request may be retried; `hint` is the remedy, if known.

    `kind` is the category in which the error is counted: `http_429`, `connect`, `timeout`, `cut_off`, `error_event`,
    `bad_response`, `empty`, `picture`.
    """

    kind: str
    message: str
    again: bool = field(kw_only=True)
    status: int | None = None
    retry_after: float | None = None
    hint: str | None = None
    code: str | None = None

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class LoadedEndpoint:
    """The client of one endpoint of a run.

    Args:
        url: the base URL; see `base_url`.
        model: the model name; None: the first that the endpoint lists.
        api: the API that is asked; None is chat.
        timeout: seconds for one attempt from sending to the last byte.
        verify: True to verify TLS certificates.

    Raises:
        ConfigError: the URL is invalid.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api: BenchApi | None = None,
        timeout: float = 600.0,
        headers: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> None:
        url = base_url(url)
        self.url = url.partition("?")[0].rstrip("/")
        self.model = model or ""
        self.api = api or BenchApi()
        self.timeout = timeout
        self._pool = Pool(url, connect_timeout=min(timeout, 10.0), verify=verify)
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "qvl-bench",
            **(headers or {}),
        }
        if any(character in f"{name}{value}" for name, value in self._headers.items() for character in "\r\n"):
            raise ConfigError("a header has a line break", hint="see --header and --api-key")

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()

    async def find_model(self) -> str:
        """Return the name of the model: `model`, else the first that the endpoint lists.

        Raises:
            AttemptFailedError: the endpoint does not answer, or lists no models.
        """
        if self.model:
            return self.model
        answer, body = TimedAnswer(), bytearray()
        request = self._pool.request("GET", "/models", self._headers)
        await self._exchange(request, min(self.timeout, 10.0), answer, lambda now, data: body.extend(data))
        try:
            self.model = str(json.loads(body)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as exc:
            raise AttemptFailedError(
                "bad_response",
                f"{self.url}/models lists no models",
                again=False,
                hint="use --model NAME, and check that --url ends in /v1",
            ) from exc
        return self.model

    async def find_route(self) -> None:
        """Look whether the endpoint has the route of the API, by an empty request, which one that has it refuses.

        Raises:
            AttemptFailedError: the endpoint has no such route, or does not answer.
        """
        request = self._pool.request("POST", self.api.path, self._headers, b"{}")
        try:
            await self._exchange(request, min(self.timeout, 10.0), TimedAnswer(), lambda now, data: None)
        except AttemptFailedError as exc:
            if exc.status is None:
                raise
            if exc.status in (404, 405, 501) and exc.code != "model_not_found":
                hint = "choose another --target, or another endpoint"
                raise AttemptFailedError(
                    "no_route", f"{self.url} has no {self.api.path}", again=False, hint=hint
                ) from exc

    async def ask(self, body: bytes, request_id: str) -> TimedAnswer:
        """Send one request and return the whole answer.

        Raises:
            AttemptFailedError: any outcome but a complete, non-empty answer.
        """
        answer = TimedAnswer()
        reader = EventReader()
        request = self._pool.request("POST", self.api.path, {**self._headers, "X-Request-Id": request_id}, body)

        def read(now: float, data: bytes) -> None:
            answer.end = now if not answer.done else answer.end
            for payload in reader.feed(data):
                self._event(payload, now, answer)

        await self._exchange(request, self.timeout, answer, read)
        try:
            for payload in reader.end():
                self._event(payload, answer.end, answer)
        except BackendResponseError as exc:
            raise AttemptFailedError("bad_response", f"{self.url}: {exc}", again=False) from exc
        if not answer.done and answer.finish_reason is None:
            raise AttemptFailedError("cut_off", "the stream ended before the answer did", again=answer.first is None)
        if not answer.pieces:
            raise AttemptFailedError("empty", "status 200 with an empty answer", again=False, status=200)
        return answer

    async def _exchange(
        self, request: bytes, timeout: float, answer: TimedAnswer, read: Callable[[float, bytes], None]
    ) -> None:
        """Send the request and call `read(time, bytes)` with every piece of a successful answer."""
        try:
            connection = await self._pool.take()
        except TransportError as exc:
            raise AttemptFailedError("connect", f"{self.url}: {_reason(exc)}", again=True) from exc
        late = asyncio.get_running_loop().call_later(timeout, connection.fail, TimeoutError())
        try:
            connection.send(request)
            answer.headers_at, status, headers = await connection.head()
            body = Body(status, headers)
            if status != 200:
                refusal = bytearray()
                while (piece := await connection.next_piece(body)) is not None and len(refusal) < MAX_EVENT_BYTES:
                    refusal += piece[1]
                raise self._refused(status, bytes(refusal), headers)
            _read_headers(headers, answer)
            while (piece := await connection.next_piece(body)) is not None:
                read(*piece)
        except TimeoutError as exc:
            raise AttemptFailedError("timeout", f"no answer within {timeout:g} s", again=False) from exc
        except (BackendResponseError, BrokenAnswerError) as exc:
            raise AttemptFailedError("bad_response", f"{self.url}: {exc}", again=False) from exc
        except TransportError as exc:
            kind = "cut_off" if answer.headers_at else "connect"
            raise AttemptFailedError(kind, f"{self.url}: {_reason(exc)}", again=answer.first is None) from exc
        finally:
            late.cancel()
            self._pool.give_back(connection)

    def _event(self, payload: bytes, now: float, answer: TimedAnswer) -> None:
        if payload.strip() == b"[DONE]":
            answer.done, answer.end = True, now
            return
        try:
            event = json.loads(payload)
            problem = event.get("error")
            if problem or "error" in (event.get("object"), event.get("type")):
                raise _as_attempt(from_event(problem or event, self.url), "error_event", answer.first is None)
            self.api.read(event, now, answer)
        except (ValueError, TypeError, AttributeError, KeyError) as exc:
            raise AttemptFailedError(
                "bad_response", f"invalid event in the stream: {readable(payload)}", again=False
            ) from exc

    def _refused(self, status: int, data: bytes, headers: Mapping[str, str]) -> AttemptFailedError:
        try:
            body: object = json.loads(data)
        except ValueError:
            body = data.decode("utf-8", "replace")
        failed = from_status(max(status, 400), body, headers, self.url)
        return _as_attempt(failed, f"http_{status}", True, status)


def base_url(text: str) -> str:
    """Return the base URL that `text` means: `http://` where it has no scheme, `/v1` where it has no path.

    The path of one API at the end (`/chat/completions`, `/responses` …) is left out.
    """
    text = text.strip()
    if text and "://" not in text and not text.startswith("/"):
        text = f"http://{text}"
    parts = urlsplit(text)
    path = parts.path.rstrip("/")
    for api in (*(known.path for known in APIS.values()), "/models"):
        path = path.removesuffix(api)
    return urlunsplit(parts._replace(path=path or "/v1")) if parts.netloc else text


def _read_headers(headers: Mapping[str, str], answer: TimedAnswer) -> None:
    answer.streamed = "application/json" not in headers.get("content-type", "")
    answer.cache = cache_state(headers)
    stages = server_timing(headers.get("server-timing", ""))
    answer.server_queue = stages.get("queue")
    answer.server_total = stages.get("total")


def cache_state(headers: Mapping[str, str]) -> str | None:
    """Return "hit", "miss", "coalesced" or "bypass" from response headers (lower-case names); None without one."""
    own = headers.get("x-qvl-cache", "").lower()
    if own in CACHE_STATES:
        return own
    standard = headers.get("cache-status", "")
    if "hit" in (word.strip() for word in standard.replace(",", ";").split(";")):
        return "hit"
    if "fwd=" in standard:
        return "bypass" if "fwd=bypass" in standard else "miss"
    gateway = headers.get("x-litellm-cache-hit", "").lower()
    return {"true": "hit", "false": "miss"}.get(gateway)


def server_timing(header: str) -> dict[str, float]:
    """Return seconds by stage from a `Server-Timing` header (its `dur` is in milliseconds)."""
    stages = {}
    for entry in header.split(","):
        name, *parts = (part.strip() for part in entry.split(";"))
        for part in parts:
            if part.startswith("dur="):
                with suppress(ValueError):
                    stages[name] = float(part[4:]) / 1000
    return stages


def _as_attempt(failed: Failed, kind: str, clean: bool, status: int | None = None) -> AttemptFailedError:
    error = failed.error
    return AttemptFailedError(
        kind,
        error.message,
        again=clean and failed.repeat is Repeat.ANYWHERE,
        status=status,
        retry_after=failed.retry_after,
        hint=error.hint,
        code=error.code,
    )


def _reason(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__
