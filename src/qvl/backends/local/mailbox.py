"""What crosses between event loops and the engine's thread: requests and aborts inwards, chunks and errors outwards."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from qvl.errors import BackendUnavailableError, EngineDeadError, QvlError, RateLimitError
from qvl.types import Chunk

if TYPE_CHECKING:
    from qvl.backends.local.engine_request import EngineRequest

Letter: TypeAlias = "tuple[EngineRequest, Chunk | QvlError]"


@dataclass(frozen=True, slots=True)
class Mail:
    """The letters that came in since the mailbox was last emptied."""

    arrived: list[EngineRequest]
    aborted: list[EngineRequest]
    closing: bool


class Mailbox:
    """Holds every request that the engine has not ended, and the posts in both directions.

    `submit`, `abort` and `close` may be called from any thread; all else from the engine's alone.

    Args:
        waiting: requests that the engine has taken and that have no row yet.
        max_queue: how many may wait, those not yet taken included; more are refused.
    """

    def __init__(self, waiting: Sized, max_queue: int) -> None:
        self.error: EngineDeadError | None = None
        self.busy_since = time.monotonic()
        self._waiting = waiting
        self._max_queue = max_queue
        self._wake = threading.Condition()
        self._requests: set[EngineRequest] = set()
        self._arrived: list[EngineRequest] = []
        self._aborted: list[EngineRequest] = []
        self._closing = False
        self._outgoing: dict[asyncio.AbstractEventLoop, list[Letter]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: EngineRequest) -> bool:
        return request in self._requests

    def submit(self, request: EngineRequest) -> None:
        """Post a request to the engine.

        Raises:
            RateLimitError: the queue is full.
            EngineDeadError, BackendUnavailableError: the loop has ended.
        """
        with self._wake:
            if self.error is not None:
                raise self.error
            if self._closing:
                raise BackendUnavailableError("the engine is closed")
            if len(self._arrived) + len(self._waiting) >= self._max_queue:
                raise RateLimitError(
                    f"{self._max_queue} requests are waiting already", hint="try again later", retry_after=1.0
                )
            self._requests.add(request)
            self._arrived.append(request)
            self._wake.notify()

    def abort(self, request: EngineRequest) -> None:
        """Have a request ended before the next step; harmless when it has ended."""
        with self._wake:
            if request in self._requests:
                self._aborted.append(request)
                self._wake.notify()

    def close(self, error: EngineDeadError | None = None) -> None:
        """Take nothing more; `error` is what callers get from now on."""
        with self._wake:
            self._closing, self.error = True, self.error or error
            self._wake.notify()

    def collect(self) -> Mail:
        """Return what came in; without any request, wait for one or for `close`."""
        with self._wake:
            if not (self._requests or self._closing):
                self._wake.wait_for(lambda: self._requests or self._closing)
                self.busy_since = time.monotonic()
            mail = Mail(self._arrived, self._aborted, self._closing)
            self._arrived, self._aborted = [], []
        return mail

    def requests(self) -> list[EngineRequest]:
        """Return the requests that have not ended."""
        with self._wake:
            return list(self._requests)

    def discard(self, request: EngineRequest) -> None:
        """Forget a request that has ended."""
        with self._wake:
            self._requests.discard(request)

    def send(self, request: EngineRequest, item: Chunk | QvlError) -> None:
        """Keep an item for the request's event loop until `flush`."""
        self._outgoing[request.loop].append((request, item))

    def flush(self) -> None:
        """Deliver what was sent, with one wake-up for each event loop."""
        for loop, letters in self._outgoing.items():
            try:
                loop.call_soon_threadsafe(_deliver, letters)
            except RuntimeError:
                # That loop is closed: nobody waits any more.
                for request, _ in letters:
                    self.abort(request)
        self._outgoing.clear()


def _deliver(letters: list[Letter]) -> None:
    for request, item in letters:
        request.inbox.put_nowait(item)
