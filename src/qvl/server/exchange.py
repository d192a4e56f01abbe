"""One HTTP request and its answer, over plain ASGI: size and time limits, JSON or events, client disconnects."""

from __future__ import annotations

import asyncio
import operator
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread

from qvl.errors import MediaError, QvlError, RateLimitError
from qvl.ids import new_request_id
from qvl.server.answers import data_event, dumps
from qvl.server.errors import (
    CLIENT_CLOSED_REQUEST,
    OPENAI_ERRORS,
    ClientGoneError,
    DeadlineError,
    DrainingError,
    ErrorForm,
    HttpError,
    error_of,
    headers_of,
)
from qvl.server.field_names import named_as_sent
from qvl.server.request_body import OF_MEDIA, READ_BODY, SMALL_BODY, checked_json, coding_of, inflated
from qvl.server.state import end_now

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.types import Message, Receive, Scope, Send

    from qvl.pipeline.parse_parts import UnreadPicture
    from qvl.server.known_body import KnownBody
    from qvl.server.lift_pictures import Lifted
    from qvl.server.request_body import BodyReader
    from qvl.server.state import ServerCore
    from qvl.server.tracing import Traced

Headers: TypeAlias = list[tuple[bytes, bytes]]
T = TypeVar("T")
JSON: Final = (b"content-type", b"application/json")
SSE: Final = (b"content-type", b"text/event-stream; charset=utf-8")
LINGER_SECONDS: Final = 2.0
# How long an absent client may go unnoticed.
WATCH_SECONDS: Final = 0.02
_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")


class Exchange:
    """One HTTP request and its answer, for handlers. `fields` are added to the request's log line."""

    def __init__(self, core: ServerCore, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        self.core = core
        self.scope = scope
        self.path = path
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.started = time.perf_counter()
        client_id = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = client_id if _PLAIN_ID.fullmatch(client_id) else new_request_id()
        self.tenant = ""
        self.status = 0
        self.streaming = False
        self.memory = 0
        self.fields: dict[str, object] = {}
        self.extra_headers: Headers = []
        self.traced: Traced | None = None
        self.lifted: Lifted | None = None
        self.known: KnownBody[BaseModel] | None = None
        self.picture_params: Callable[[], Sequence[str]] | None = None
        # The client's names of what the pipeline calls otherwise, for errors.
        self.field_names: Mapping[str, str] = {}
        self.errors: ErrorForm = OPENAI_ERRORS
        self.error_event: Callable[[QvlError], bytes] = error_event
        self.receive = receive
        self._send = send
        self._gone = False
        self._body_complete = False
        self._watcher: asyncio.Task[None] | None = None

    async def body(self) -> bytes:
        """Return the whole body, decompressed, and without a byte order mark if it is JSON.

        Raises:
            HttpError: as `raw_body`, and 400 not UTF-8 or too many fields.
        """
        body = await self.raw_body()
        return body if self.media_type.startswith(OF_MEDIA) else await checked_json(body)

    async def raw_body(self) -> bytes:
        """Return the whole body, decompressed.

        Raises:
            HttpError: 413 too large, 408 too slow, 415 an unknown Content-Encoding.
            RateLimitError: the bodies of all requests exceed `max_held_bytes`.
            ClientGoneError: the client went away before the end.
        """
        settings = self.core.settings
        announced = self.headers.get(b"content-length", b"")
        length = int(announced) if announced.isdigit() else None
        if length is not None and length > settings.max_body_bytes:
            raise self._too_large()
        reader: BodyReader | None = self.scope.get("extensions", {}).get(READ_BODY, {}).get("reader")
        if reader is not None and length is not None and (whole := reader.whole()) is not None:
            self._hold(len(whole))
            self._body_complete = True
            return await self._inflated(whole)
        now = asyncio.get_running_loop().time()
        size = 0

        def came(more: int) -> None:
            nonlocal size
            size += more
            self._hold(more)
            if size > settings.max_body_bytes:
                raise self._too_large()

        def due() -> float:
            return now + settings.body_timeout + size / settings.body_rate

        try:
            if reader is not None and length is not None and length > SMALL_BODY:
                body = await reader.read(length, came, due)
            else:
                body = await self._received(came, due)
        except TimeoutError as exc:
            raise self._too_slow() from exc
        self._body_complete = True
        return await self._inflated(body)

    async def _received(self, came: Callable[[int], None], due: Callable[[], float]) -> bytes:
        pieces: list[bytes] = []
        more = True
        async with asyncio.timeout_at(due()) as limit:
            while more:
                event = await self.receive()
                if event["type"] == "http.disconnect":
                    self._gone = True
                    raise ClientGoneError
                pieces.append(bytes(event.get("body", b"")))
                came(len(pieces[-1]))
                limit.reschedule(due())
                more = event.get("more_body", False)
        return b"".join(pieces)

    def as_sent(self, picture: UnreadPicture) -> UnreadPicture:
        """Return a picture of the body with its base64, which may have been taken out before the body was read."""
        return picture if self.lifted is None else self.lifted.put_back(picture)

    def all_as_sent(self, pictures: Sequence[UnreadPicture]) -> Sequence[UnreadPicture]:
        """Return all pictures of the body as they were sent.

        Raises:
            RuntimeError: base64 was taken out where no picture is read, a fault of this server.
        """
        if self.lifted is None:
            return pictures
        sent = [self.lifted.put_back(picture) for picture in pictures]
        if sum(map(operator.is_not, sent, pictures)) < len(self.lifted.found):
            raise RuntimeError("base64 was taken out of a body where no picture is read")
        return sent

    async def next_piece(self, size: int) -> tuple[bytes, bool]:
        """Return the next piece of a body of which `size` bytes came, and whether it is the last, for large uploads.

        Raises:
            HttpError: 408, the body is too slow.
            ClientGoneError: the client went away before the end.
        """
        settings = self.core.settings
        taken = time.perf_counter() - self.started
        try:
            event = await asyncio.wait_for(
                self.receive(), max(0.0, settings.body_timeout + size / settings.body_rate - taken)
            )
        except TimeoutError as exc:
            raise self._too_slow() from exc
        if event["type"] == "http.disconnect":
            self._gone = True
            raise ClientGoneError
        self._body_complete = not event.get("more_body", False)
        return bytes(event.get("body", b"")), self._body_complete

    def _too_slow(self) -> HttpError:
        return HttpError(408, "the body came too slowly", code="request_timeout", headers=((b"connection", b"close"),))

    async def _inflated(self, body: bytes) -> bytes:
        header = self.headers.get(b"content-encoding")
        coding = None if header is None else coding_of(header)
        if coding is not None:
            packed = len(body)
            limit = packed + self.core.settings.max_body_bytes

            def count(size: int) -> None:
                self._hold(size)
                if self.memory > limit:
                    raise self._too_large()

            def counted(size: int) -> None:
                anyio.from_thread.run_sync(count, size)

            # However small it is: what it becomes may be large.
            body = await anyio.to_thread.run_sync(inflated, body, coding, counted)
            self._hold(-packed)
        return body

    @property
    def media_type(self) -> bytes:
        """The media type of the body, in lower case and without parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()

    def _too_large(self) -> HttpError:
        return HttpError(
            413,
            f"the body is larger than {self.core.settings.max_body_bytes} bytes",
            hint="send smaller pictures, of videos fewer frames (nframes), or URLs",
            code="request_too_large",
            headers=((b"connection", b"close"),),
        )

    def hold_fetched(self, size: int) -> None:
        """Count `size` bytes of fetched pictures as if they had been in the body.

        Raises:
            HttpError: 413, body and pictures exceed `max_body_bytes`.
            RateLimitError: the bodies of all requests exceed `max_held_bytes`.
        """
        self._hold(size)
        if self.memory > (limit := self.core.settings.max_body_bytes):
            raise HttpError(
                413,
                f"the body and the pictures behind its URLs are larger than {limit} bytes",
                hint="use fewer or smaller pictures in one request",
                code="request_too_large",
            )

    def _hold(self, size: int) -> None:
        self.memory += size
        self.core.held_bytes += size
        if self.core.held_bytes > self.core.settings.max_held_bytes:
            self.core.metrics.rejections.inc(1, "memory")
            raise RateLimitError(
                "the server is busy: its memory for requests is full; try again later",
                code="engine_overloaded",
                retry_after=self.core.admission.retry_after(),
            )

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `work`; cancel it when the client disconnects, the deadline passes or draining ends.

        Raises:
            ClientGoneError: the client disconnected.
            DeadlineError: the deadline has passed.
            DrainingError: the server is shutting down.
        """
        loop, left = asyncio.get_running_loop(), self._seconds_left()
        try:
            async with asyncio.timeout(left if left <= WATCH_SECONDS else None) as limit:
                # Not from the start: most answers out of the cache are there before a task for watching would be.
                watching = loop.call_later(WATCH_SECONDS, self._begin_watching, limit, loop.time() + left)
                self.core.under_way.add(limit)
                try:
                    return await work()
                finally:
                    self.core.under_way.discard(limit)
                    watching.cancel()
                    if self._watcher is not None:
                        # What was cancelled keeps its frame, which has this exchange and with it the body.
                        self._watcher.cancel()
                        self._watcher = None
        except TimeoutError:
            if not limit.expired():
                raise
        if self._gone:
            raise ClientGoneError
        if self.core.draining:
            raise DrainingError("the server was shut down before the answer was complete", hint="ask again")
        raise DeadlineError("the answer took longer than its deadline", hint="raise X-Request-Timeout, or ask for less")

    def _seconds_left(self) -> float:
        allowed = self.core.settings.request_timeout
        header = self.headers.get(b"x-request-timeout")
        if header is not None:
            try:
                seconds = float(header)
            except ValueError:
                seconds = 0.0
            if not 0 < seconds < float("inf"):
                raise HttpError(400, "X-Request-Timeout must be a positive number of seconds", code="invalid_value")
            allowed = min(allowed, seconds)
        return max(0.0, allowed - (time.perf_counter() - self.started))

    def _begin_watching(self, limit: asyncio.Timeout, deadline: float) -> None:
        if limit.expired():
            return
        limit.reschedule(deadline)
        self._watcher = asyncio.get_running_loop().create_task(self._watch(limit))

    async def _watch(self, limit: asyncio.Timeout) -> None:
        while True:
            event = await self.receive()
            if event["type"] == "http.disconnect":
                self._gone = True
                end_now(limit)
                return
            if self._body_complete and not event.get("more_body", False) and not event.get("body"):
                # A server that repeats the end of the body instead of waiting would spin here.
                await asyncio.sleep(0.05)

    async def send(self, event: Message) -> None:
        """Send an ASGI message, adding the headers that every answer has."""
        if event["type"] == "http.response.start":
            self.status = event["status"]
            event["headers"] = [
                *event.get("headers", ()),
                (b"x-request-id", self.request_id.encode("latin-1")),
                *self.extra_headers,
            ]
            if self.errors.id_header is not None:
                event["headers"].append((self.errors.id_header, self.request_id.encode("latin-1")))
            if self.core.draining and not any(name == b"connection" for name, _ in event["headers"]):
                event["headers"].append((b"connection", b"close"))
        await self._send(event)

    async def respond(self, status: int, body: bytes, headers: Headers, *, early: bool = False) -> None:
        """Send a whole answer; `early`: the client is still sending, so read a little more before closing.

        If the connection were closed at once, the answer could be lost.
        """
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        if early:
            await self.write(body)
            body = b""
            with anyio.move_on_after(LINGER_SECONDS):
                while (await self.receive()).get("more_body", False):
                    pass
        await self.end(body)

    async def respond_json(self, value: object, headers: Headers | None = None, status: int = 200) -> None:
        await self.respond(status, dumps(value), [JSON, *(headers or ())])

    async def start_events(self, headers: Headers) -> None:
        """Send the headers of an answer of server-sent events."""
        self.streaming = True
        quiet = [SSE, (b"x-accel-buffering", b"no"), *headers]
        if not any(name == b"cache-control" for name, _ in quiet):
            quiet.append((b"cache-control", b"no-store"))
        await self.send({"type": "http.response.start", "status": 200, "headers": quiet})

    async def write(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, piece: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": False})

    async def fail(self, error: QvlError) -> None:
        """Send `error` to the client: as the answer, or as an event once the headers are sent."""
        if isinstance(error, MediaError) and error.picture is not None and self.picture_params is not None:
            param = self.picture_params()[error.picture]
            error = MediaError(f"{param}: {error.message}", hint=error.hint, param=param, code=error.code)
        else:
            error = named_as_sent(error, self.field_names)
        self.fields["error"] = error.code
        if not self.status:
            status, headers = self.errors.status(error), [JSON, *headers_of(error)]
            body = dumps(self.errors.body(error, self.request_id))
            early = not self._body_complete and self.method in ("POST", "PUT", "PATCH")
            if early:
                headers = [*(pair for pair in headers if pair[0] != b"connection"), (b"connection", b"close")]
            await self.respond(status, body, headers, early=early)
        elif self.streaming:
            self.fields["error_status"] = self.errors.status(error)
            await self.end(self.error_event(error))

    def gone(self) -> None:
        """Record that the client disconnected."""
        self.fields["aborted"] = True
        self.status = self.status or CLIENT_CLOSED_REQUEST


def error_event(error: QvlError) -> bytes:
    """Return the server-sent event of an error in a stream, as OpenAI's clients expect it."""
    return data_event(error_of(error))
