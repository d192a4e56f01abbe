"""One line of a file asked through the route that it names, as if a client had sent it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pydantic_core import from_json

from qvl.errors import BackendUnavailableError, QvlError
from qvl.log import logger
from qvl.media import fetch
from qvl.server.answers import dumps
from qvl.server.errors import InternalError, headers_of, status_of
from qvl.server.exchange import Exchange

if TYPE_CHECKING:
    from starlette.types import Message, Scope

    from qvl.server.batches.lines import BatchLine
    from qvl.server.route_table import Operation
    from qvl.server.state import ServerCore

# Refusals for overload and of an endpoint that is down end by themselves; an answer that failed is asked once or twice
# more, as a client would.
TRIES: Final = {429: 30, 503: 30, 529: 30, 408: 3, 500: 3, 502: 3, 504: 3}
LONGEST_PAUSE: Final = 60.0
log = logger("qvl.server")


class LineAnswer:
    """The answer of a route to one line: status, id and body, filled by `send`."""

    def __init__(self) -> None:
        self.status = 0
        self.request_id = ""
        self.pause: float | None = None
        self._pieces: list[bytes] = []

    async def send(self, event: Message) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
        else:
            self._pieces.append(event.get("body", b""))

    def body(self) -> object:
        return from_json(b"".join(self._pieces) or b"null")


async def ask(core: ServerCore, route: Operation, line: BatchLine, tenant: str) -> LineAnswer:
    """Return what `route` answers to one line in the name of `tenant`, an error of its own included."""
    body = dumps(line.body)
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            # The client of a line never goes away.
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    answer = LineAnswer()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope: Scope = {"type": "http", "method": "POST", "path": line.url, "headers": headers}
    exchange = Exchange(core, scope, receive, answer.send, line.url)
    exchange.tenant, exchange.errors = tenant, route.errors
    answer.request_id = exchange.request_id
    core.requests_under_way += 1
    fetch.counter.set(exchange.hold_fetched)
    try:
        core.refuse_if_closed()
        if not core.admission.running:
            core.readiness.note_progress()
        await route.handler(exchange)
    except QvlError as exc:
        core.note_error(exc)
        answer.pause = _pause(exc)
        await exchange.fail(exc)
    except Exception:
        log.exception("internal error", request_id=exchange.request_id)
        await exchange.fail(InternalError(exchange.request_id))
    finally:
        core.leave()
        core.held_bytes -= exchange.memory
    return answer


def _pause(error: QvlError) -> float | None:
    """Return how long the error asks to wait before the next try; None where it says nothing."""
    if status_of(error) != 429 and not isinstance(error, BackendUnavailableError):
        return None
    told = dict(headers_of(error)).get(b"retry-after-ms")
    return int(told) / 1000 if told is not None else None


async def ask_patiently(
    core: ServerCore, route: Operation, line: BatchLine, tenant: str, stopping: Callable[[], bool]
) -> LineAnswer | None:
    """Return the final answer to one line, after as many tries as its failures are worth.

    None: the server shuts down, or `stopping()` became true, before there was one; the line is to be asked again.
    """
    tries = 0
    while True:
        answer = await ask(core, route, line, tenant)
        tries += 1
        if answer.status < 400:
            return answer
        if core.draining or core.readiness.closed() is not None:
            return None
        if tries >= TRIES.get(answer.status, 1):
            return answer
        pause = max(answer.pause or 0.0, min(0.25 * 2.0**tries, LONGEST_PAUSE))
        waited = 0.0
        while waited < min(pause, LONGEST_PAUSE):
            if stopping():
                return None
            await asyncio.sleep(0.1)
            waited += 0.1
