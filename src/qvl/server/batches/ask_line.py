"""One line of a file asked through the route that it names, as if a client had sent it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pydantic_core import from_json

from qvl.errors import BackendUnavailableError, QvlError, RefusalError, RequestError
from qvl.log import logger
from qvl.media import fetch
from qvl.server.answers import dumps
from qvl.server.errors import InternalError, headers_of, status_of
from qvl.server.exchange import Exchange
from qvl.server.readiness import CANARY_SECONDS

if TYPE_CHECKING:
    from starlette.types import Message, Scope

    from qvl.server.batches.lines import BatchLine
    from qvl.server.route_table import Operation
    from qvl.server.state import ServerCore

# After so many tries, it is looked whether the backend answers at all.
TRIES: Final = 3
AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504, 529})
# What a backend that is down or full answers, whatever it is asked.
OUTAGES: Final = frozenset({429, 502, 503, 504, 529})
FULL: Final = frozenset({429, 529})
LONGEST_PAUSE: Final = 60.0
# A batch ends earlier; where nothing else ends a run, an outage does not keep it for good.
LONGEST_OUTAGE: Final = 24 * 3600.0
log = logger("qvl.server")


class LineAnswer:
    """The answer of a route to one line: status, id and body, filled by `send`."""

    def __init__(self) -> None:
        self.status = 0
        self.request_id = ""
        self.pause: float | None = None
        self.error = ""
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
    core.requests_under_way += 1
    fetch.counter.set(exchange.hold_fetched)
    try:
        core.refuse_if_closed()
        if not core.admission.running:
            core.readiness.note_progress()
        await route.handler(exchange)
    except QvlError as exc:
        core.note_error(exc)
        answer.pause, answer.error = _pause(exc), str(exc)
        await exchange.fail(exc)
    except Exception:
        log.exception("internal error", request_id=exchange.request_id)
        await exchange.fail(InternalError(exchange.request_id))
    finally:
        # Not before: the line may name its own.
        answer.request_id = exchange.request_id
        core.leave()
        core.held_bytes -= exchange.memory
    return answer


def _pause(error: QvlError) -> float | None:
    """Return how long the error asks to wait before the next try; None where it says nothing."""
    if status_of(error) != 429 and not isinstance(error, BackendUnavailableError):
        return None
    told = dict(headers_of(error)).get(b"retry-after-ms")
    return int(told) / 1000 if told is not None else None


class Outage:
    """Tells all lines under way whether the backend is down."""

    def __init__(self) -> None:
        self._said = False

    def over(self) -> None:
        if self._said:
            self._said = False
            log.info("the backend answers again")

    def say(self, error: str) -> None:
        """Log once that batches wait, however many lines learn it."""
        if not self._said:
            self._said = True
            log.warning("the backend does not answer, batches wait for it", error=error)


async def _answers(core: ServerCore) -> bool:
    """Return whether the backend answers a question of a few words."""
    asking = core.pipeline.chat([{"role": "user", "content": "Answer with 1."}], cache="off", max_tokens=1)
    try:
        await asyncio.wait_for(asking, CANARY_SECONDS)
    except (RequestError, RefusalError):
        return True
    except (TimeoutError, QvlError):
        return False
    return True


async def ask_patiently(
    core: ServerCore, route: Operation, line: BatchLine, tenant: str, stopping: Callable[[], bool], outage: Outage
) -> LineAnswer | None:
    """Return the final answer to one line: an error only if it is the line's own.

    A backend that is down or full is waited for, for a day at most. It is not down if the line fails between two small
    questions of our own that are answered.

    None: the server shuts down, or `stopping()` became true, before there was one; the line is to be asked again.
    """
    tries, began, was_up = 0, time.monotonic(), False
    while True:
        answer = await ask(core, route, line, tenant)
        tries += 1
        if answer.status < 400:
            outage.over()
            return answer
        if core.draining or core.readiness.closed() is not None:
            return None
        if answer.status not in AGAIN:
            return answer
        down = core.pipeline.backend.unready() if answer.status in OUTAGES else None
        if down is not None:
            outage.say(down)
        if tries >= TRIES:
            if answer.status not in OUTAGES or time.monotonic() - began > LONGEST_OUTAGE:
                return answer
            if answer.status in FULL:
                outage.say(answer.error)
            else:
                # One that rests after this very line's failures is not down: what it answers now tells.
                up = await _answers(core)
                if up and was_up:
                    return answer
                was_up = up
                if not up:
                    outage.say(answer.error)
        pause = max(answer.pause or 0.0, min(0.25 * 2.0**tries, LONGEST_PAUSE))
        waited = 0.0
        while waited < min(pause, LONGEST_PAUSE):
            if stopping():
                return None
            await asyncio.sleep(0.1)
            waited += 0.1
