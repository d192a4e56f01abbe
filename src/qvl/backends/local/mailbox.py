"""Thread-safe queues between event loops and the engine: requests and aborts in, chunks and errors out."""

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
    """The new requests and aborts since the last `collect`."""

    arrived: list[EngineRequest]
    aborted: list[EngineRequest]
    closing: bool


class Mailbox:
    """Holds all unfinished requests, and the queues in both directions.

    `submit`, `abort` and `close` may be called from any thread; all else only from the engine's.

    Args:
        waiting: returns the number of requests in the engine without a KV row.
        max_queue: most waiting requests, those not yet collected included; more are refused.
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
            EngineDeadError, BackendUnavailableError: the engine failed or is closed.
        """
        with self._wake:
            if self.error is not None:
                raise self.error
            if self._closing:
                raise BackendUnavailableError("the engine is closed", hint="make a new backend")
            if len(self._arrived) + len(self._waiting) >= self._max_queue:
                raise RateLimitError(
                    f"queue is full: {self._max_queue} requests are waiting", hint="try again later", retry_after=1.0
                )
            self._requests.add(request)
            self._arrived.append(request)
            self._wake.notify()

    def abort(self, request: EngineRequest) -> None:
        """Ask the engine to end a request before its next step; does nothing if it has ended."""
        with self._wake:
            if request in self._requests:
                self._aborted.append(request)
                self._wake.notify()

    def close(self, error: EngineDeadError | None = None) -> None:
        """Refuse further requests, with `error` or, by default, a BackendUnavailableError."""
        with self._wake:
            self._closing, self.error = True, self.error or error
            self._wake.notify()

    def collect(self) -> Mail:
        """Return the new mail; while the engine has no request, wait for one or for `close`."""
        with self._wake:
            if not (self._requests or self._closing):
                self._wake.wait_for(lambda: self._requests or self._closing)
                self.busy_since = time.monotonic()
            mail = Mail(self._arrived, self._aborted, self._closing)
            self._arrived, self._aborted = [], []
        return mail

    def requests(self) -> list[EngineRequest]:
        """Return the unfinished requests."""
        with self._wake:
            return list(self._requests)

    def discard(self, request: EngineRequest) -> None:
        """Remove a request that has ended."""
        with self._wake:
            self._requests.discard(request)

    def send(self, request: EngineRequest, item: Chunk | QvlError) -> None:
        """Queue a chunk or error for the request's event loop; `flush` delivers it."""
        self._outgoing[request.loop].append((request, item))

    def flush(self) -> None:
        """Deliver the queued chunks and errors, with one wake-up for each event loop."""
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
