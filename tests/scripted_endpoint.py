"""`ScriptedEndpoint`: a real OpenAI-compatible HTTP server on a free port, with scripted answers and scripted faults.

```python
with ScriptedEndpoint() as endpoint:
    endpoint.say(Status(429, headers={"Retry-After": "0"}), CutOff(after=2), Text("hello"))
    backend = OpenAIBackend("echo", base_url=endpoint.url, probe=False)
```

Each chat request takes the next answer of the script; without one it is answered by the echo (see `qvl.testing.echo`).
The server is written on bare sockets, because what it must be able to do (half a body, garbage, a reset) is what web
frameworks prevent.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeVar

from tests.scripted_wire import asked_in, echo_events

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Received:
    """A request that came; `body` is the parsed JSON, or None."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any = field(repr=False)


@dataclass(slots=True)
class ScriptedExchange:
    """A chat request and the wire to answer it on. Leaving an answer's `__call__` ends the response."""

    received: Received
    endpoint: ScriptedEndpoint
    writer: asyncio.StreamWriter
    chunked: bool = False

    async def head(self, status: int = 200, headers: Mapping[str, str] | None = None, *, chunked: bool = True) -> None:
        lines = [f"HTTP/1.1 {status} X"]
        fields = {"Content-Type": "text/event-stream", **(headers or {})}
        if chunked:
            fields["Transfer-Encoding"] = "chunked"
        lines += [f"{name}: {value}" for name, value in fields.items()]
        self.chunked = chunked
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        await self.writer.drain()

    async def send(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)
        await self.writer.drain()

    async def event(self, payload: object) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload, ensure_ascii=False).encode()
        await self.send(b"data: " + data + b"\n\n")

    async def whole(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        """A response with a length: a dict goes as JSON, text as HTML or plain text."""
        if isinstance(body, str | bytes):
            data = body.encode() if isinstance(body, str) else body
            kind = "text/html" if data.lstrip().startswith(b"<") else "text/plain"
        else:
            data, kind = json.dumps(body).encode(), "application/json"
        fields = {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}
        await self.head(status, fields, chunked=False)
        await self.send(data)

    def close(self, *, reset: bool = False) -> None:
        """Ends the connection now, in the middle of whatever was being said."""
        self.chunked = False
        if reset:
            self.writer.transport.abort()
        else:
            self.writer.close()


class ScriptedAnswer(Protocol):
    """The answer of a scripted endpoint to one chat request."""

    async def __call__(self, exchange: ScriptedExchange) -> None: ...


@dataclass(frozen=True, slots=True)
class Echo:
    """The default: what the echo says, `pause` seconds a token."""

    pause: float = 0.0

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await _stream(exchange, self.pause, None)


@dataclass(frozen=True, slots=True)
class Text:
    """A stream of this text, word by word."""

    text: str
    reasoning: str = ""

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await exchange.head()
        pieces = self.text.split(" ")
        deltas = [{"reasoning_content": self.reasoning}] if self.reasoning else []
        deltas += [{"content": piece if place == 0 else f" {piece}"} for place, piece in enumerate(pieces)]
        for delta in deltas:
            await exchange.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        await exchange.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 7 + len(pieces)}
        await exchange.event({"choices": [], "usage": usage})
        await exchange.event(b"[DONE]")


@dataclass(frozen=True, slots=True)
class Status:
    """An HTTP status with a body: a dict as JSON, a string as text or HTML, bytes as they are."""

    status: int
    body: object = field(default_factory=lambda: {"error": {"message": "scripted", "type": "server_error"}})
    headers: Mapping[str, str] = field(default_factory=dict)

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await exchange.whole(self.status, self.body, self.headers)


@dataclass(frozen=True, slots=True)
class Events:
    """A stream of exactly these events (values as JSON, bytes as they are); `done` adds `[DONE]`."""

    events: Iterable[object]
    done: bool = True

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await exchange.head()
        for event in self.events:
            await exchange.event(event)
        if self.done:
            await exchange.event(b"[DONE]")


@dataclass(frozen=True, slots=True)
class CutOff:
    """The echo's stream, broken off after `after` events: properly ended (`clean`), or the connection is reset."""

    after: int = 2
    clean: bool = False
    pause: float = 0.0

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await _stream(exchange, self.pause, self.after)
        if not self.clean:
            exchange.close(reset=True)


@dataclass(frozen=True, slots=True)
class Stall:
    """The echo's stream, which says nothing more after `after` events; 0 sends not even a header."""

    after: int = 0

    async def __call__(self, exchange: ScriptedExchange) -> None:
        if self.after:
            await _stream(exchange, 0.0, self.after)
        await exchange.endpoint.stopping()


@dataclass(frozen=True, slots=True)
class Flood:
    """A body of `size` bytes, all of them `fill`, with this status; it stops when nobody reads."""

    size: int = 2**30
    status: int = 200
    fill: bytes = b"x"
    kind: str = "text/event-stream"

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await exchange.head(self.status, {"Content-Type": self.kind})
        block = self.fill * (65536 // len(self.fill))
        for _ in range(self.size // len(block)):
            await exchange.send(block)


@dataclass(frozen=True, slots=True)
class Hang:
    """The connection is closed without a word."""

    async def __call__(self, exchange: ScriptedExchange) -> None:
        exchange.close()


async def _stream(exchange: ScriptedExchange, pause: float, events: int | None) -> None:
    body, endpoint = exchange.received.body, exchange.endpoint
    made = echo_events(body, ignores=endpoint.ignores)
    if not body.get("stream"):
        await exchange.whole(200, made.whole)
        return
    await exchange.head()
    for place, event in enumerate(made.events):
        if events is not None and place >= events:
            return
        if pause:
            await asyncio.sleep(pause)
        await exchange.event(event)
    if events is None:
        await exchange.event(b"[DONE]")


class ScriptedEndpoint:
    """A server on 127.0.0.1 in a thread of its own; a context manager.

    Args:
        answers: the script; `say` adds to it.
        models: what GET /models lists; a chat request for another model is answered 404.
        ignores: names of request fields that are ignored in silence.
        refuses: names of request fields that are refused with 400.
        api_key: required as a bearer token when given.
        default: how to answer when the script is at its end.
        max_model_len: of every model, as vLLM tells it.
        tls: a server context for https.
        route: of the requests that the script answers.
    """

    def __init__(
        self,
        *answers: ScriptedAnswer,
        models: Iterable[str] = ("echo",),
        ignores: Iterable[str] = (),
        refuses: Iterable[str] = (),
        api_key: str | None = None,
        default: ScriptedAnswer | None = None,
        max_model_len: int = 100_000,
        tls: ssl.SSLContext | None = None,
        route: str = "/chat/completions",
    ) -> None:
        self.route = route
        self.script: deque[ScriptedAnswer] = deque(answers)
        self.models = tuple(models)
        self.ignores, self.refuses = frozenset(ignores), frozenset(refuses)
        self.refusal = "Unrecognized request argument supplied: {}"
        self.api_key = api_key
        self.default = default or Echo()
        self.max_model_len = max_model_len
        self.requests: list[Received] = []
        self.connections = 0
        self.running = 0
        self.port = 0
        self._tls = tls
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """The base URL, with `/v1`."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[Received]:
        """The chat requests that came, but for empty ones."""
        return [received for received in self.requests if received.path.partition("?")[0].endswith("/chat/completions")]

    def say(self, *answers: ScriptedAnswer) -> ScriptedEndpoint:
        """Adds to the script."""
        self.script.extend(answers)
        return self

    def start(self) -> ScriptedEndpoint:
        """Listens; after `stop`, on the same port again."""
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="scripted-endpoint", daemon=True)
        self._thread.start()
        ready.wait(10)
        return self

    def stop(self) -> None:
        """Close the port and reset every connection, as kill -9 looks from outside."""
        if self._loop is None or self._thread is None:
            return
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop = self._thread = None

    def __enter__(self) -> ScriptedEndpoint:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    async def stopping(self) -> None:
        """Waits until the server is stopped."""
        assert self._stop is not None
        await self._stop.wait()

    def _call(self, work: Coroutine[object, None, T]) -> T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _run(self, ready: threading.Event) -> None:
        loop = self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        loop.run_until_complete(self._listen())
        loop.call_soon(ready.set)
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        assert self._server is not None
        assert self._stop is not None
        self._server.close()
        self._stop.set()
        for writer in tuple(self._writers):
            writer.transport.abort()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
                while (received := await _read(reader)) is not None:
                    if received.body != {}:
                        self.requests.append(received)
                    exchange = ScriptedExchange(received, self, writer)
                    self.running += 1
                    try:
                        await self._respond(exchange)
                    finally:
                        self.running -= 1
                    if writer.transport.is_closing():
                        return
                    if exchange.chunked:
                        writer.write(b"0\r\n\r\n")
                        await writer.drain()
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _respond(self, exchange: ScriptedExchange) -> None:
        received = exchange.received
        if self.api_key is not None and received.headers.get("authorization") != f"Bearer {self.api_key}":
            error = {
                "message": "Incorrect API key provided",
                "type": "invalid_request_error",
                "code": "invalid_api_key",
            }
            await exchange.whole(401, {"error": error})
        elif received.method == "GET" and received.path.partition("?")[0].endswith("/models"):
            listed = [{"id": name, "object": "model", "max_model_len": self.max_model_len} for name in self.models]
            await exchange.whole(200, {"object": "list", "data": listed})
        elif received.path.partition("?")[0].endswith(self.route):
            await self._chat(exchange)
        else:
            await exchange.whole(404, {"detail": "Not Found"})

    async def _chat(self, exchange: ScriptedExchange) -> None:
        body = exchange.received.body
        if body == {}:
            # By which a client finds out whether there is the route.
            error = {"message": "messages is missing", "type": "invalid_request_error", "param": "messages"}
            await exchange.whole(400, {"error": error})
            return
        if self.script:
            await self.script.popleft()(exchange)
            return
        if body.get("model") not in self.models:
            error = {"message": f"The model `{body.get('model')}` does not exist.", "code": "model_not_found"}
            await exchange.whole(404, {"error": {**error, "type": "invalid_request_error", "param": "model"}})
            return
        refused = next((name for name in body if name in self.refuses), None)
        if refused is not None:
            error = {"message": self.refusal.format(refused), "param": refused}
            await exchange.whole(400, {"error": {**error, "type": "invalid_request_error"}})
            return
        prompt = asked_in(body, self.ignores).prompt_tokens
        if prompt > self.max_model_len:
            text = f"This model's maximum context length is {self.max_model_len} tokens, your prompt has {prompt}."
            await exchange.whole(400, {"error": {"message": text, "type": "BadRequestError", "code": 400}})
            return
        await self.default(exchange)


async def _read(reader: asyncio.StreamReader) -> Received | None:
    try:
        first_byte = await reader.readexactly(1)
        if not first_byte.isalpha():
            # A TLS handshake at a plain port.
            return None
        head = first_byte + await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }
    data = await reader.readexactly(int(headers.get("content-length", 0)))
    try:
        body = json.loads(data) if data else None
    except ValueError:
        body = None
    return Received(method, path, headers, body)
