"""Single flight: identical concurrent requests share one task.

Each flight is a task of its own, so that the first caller can leave without cancelling it for the others; when the
last one leaves, the task is cancelled and the backend aborts. What nobody can join needs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable
from typing import Final, TypeAlias

from qvl.errors import BackendUnavailableError
from qvl.log import logger
from qvl.pipeline.job import Outcome
from qvl.types import Chunk

# For work that does not end when it is cancelled.
CLOSE_SECONDS: Final = 30.0
log = logger("qvl.pipeline")


class Written:
    """The buffer of streamed chunks, which any number of followers read from the beginning."""

    __slots__ = ("_awaited", "chunks", "shown")

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        # The number of chunks that were shown to somebody.
        self.shown = 0
        self._awaited: asyncio.Event | None = None

    def __call__(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.wake()

    def news(self) -> asyncio.Event:
        """Return the event that is set when there is more to read, or nothing more will come."""
        if self._awaited is None:
            self._awaited = asyncio.Event()
        return self._awaited

    def wake(self) -> None:
        """Wake all who wait for news."""
        if self._awaited is not None:
            self._awaited.set()
            self._awaited = None

    def __len__(self) -> int:
        return len(self.chunks)

    def take_back(self, length: int) -> bool:
        """Drop all chunks after the first `length`; return False, without a change, if a follower has read more."""
        if self.shown > length:
            return False
        del self.chunks[length:]
        return True


Work: TypeAlias = Callable[[Written], Awaitable[Outcome]]


class Flight:
    """One shared task and its followers. Chunks are buffered, so a late follower misses none."""

    def __init__(self, work: Work, on_end: Callable[[Flight], None]) -> None:
        self.followers = 0
        self._written = Written()
        self._task = asyncio.create_task(self._run(work))
        # Not at the end of the coroutine, which never begins when it is cancelled at once.
        self._task.add_done_callback(lambda task: self._ended(task, on_end))
        self._abandoned = False

    @property
    def joinable(self) -> bool:
        """True if the task is running and not being cancelled because every follower has left."""
        return not self._task.done() and not self._abandoned

    async def _run(self, work: Work) -> Outcome:
        try:
            return await work(self._written)
        finally:
            self._written.wake()

    def _ended(self, task: asyncio.Task[Outcome], on_end: Callable[[Flight], None]) -> None:
        if not task.cancelled():
            # Looked at now, since those who left before the end will not, and asyncio complains about that.
            task.exception()
        on_end(self)

    async def outcome(self) -> Outcome:
        """Return the outcome, waiting for the end.

        Raises:
            QvlError: the error that ended the task; the same for every follower.
        """
        self.followers += 1
        try:
            if not self._task.done():
                await self._until_done()
            return self._result()
        finally:
            await self._leave()

    async def _until_done(self) -> None:
        """Wait for the end of the task, without awaiting it: a cancelled follower must not cancel the task."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake(task: asyncio.Task[Outcome]) -> None:
            if not waiter.done():
                waiter.set_result(None)

        self._task.add_done_callback(wake)
        try:
            await waiter
        finally:
            self._task.remove_done_callback(wake)

    async def chunks(self) -> AsyncGenerator[Chunk | Outcome, None]:
        """Yield every chunk from the beginning, then the outcome. Closing the generator leaves the flight."""
        self.followers += 1
        try:
            written, position = self._written, 0
            while True:
                while position < len(written):
                    position += 1
                    written.shown = max(written.shown, position)
                    yield written.chunks[position - 1]
                if self._task.done():
                    break
                waiter = asyncio.ensure_future(written.news().wait())
                try:
                    await asyncio.wait((waiter, self._task), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waiter.cancel()
            yield self._result()
        finally:
            await self._leave()

    async def aclose(self) -> None:
        """Cancel the task; remaining followers get a BackendUnavailableError."""
        self._abandoned = True
        self._task.cancel()
        await asyncio.wait((self._task,), timeout=CLOSE_SECONDS)

    def _result(self) -> Outcome:
        if self._task.cancelled():
            raise _closed()
        return self._task.result()

    async def _leave(self) -> None:
        self.followers -= 1
        if self.followers == 0 and not self._task.done():
            await self.aclose()


class FlightBoard:
    """The running flights; those with a key can be joined."""

    def __init__(self) -> None:
        self._flights: set[Flight] = set()
        self._by_key: dict[Hashable, Flight] = {}
        self._alone: set[asyncio.Timeout] = set()
        # Done when the last of those that run alone has ended, while the board is being closed.
        self._last: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._flights) + len(self._alone)

    async def alone(self, work: Work) -> Outcome:
        """Return the outcome of `work` that nobody can join, in the caller's own task.

        Raises:
            QvlError: the error of the work; BackendUnavailableError if the board is closed meanwhile.
        """
        try:
            async with asyncio.timeout(None) as until_closed:
                self._alone.add(until_closed)
                try:
                    return await work(Written())
                finally:
                    self._alone.discard(until_closed)
                    if self._last is not None and not self._alone:
                        self._last.set_result(None)
        except TimeoutError:
            if not until_closed.expired():
                raise
        raise _closed()

    def join(self, key: Hashable | None, work: Work) -> tuple[Flight, bool]:
        """Return the running flight of `key` and True, or a new flight of `work` and False (always for None)."""
        if key is not None and (flight := self._by_key.get(key)) is not None and flight.joinable:
            return flight, True
        flight = Flight(work, lambda ended: self._land(key, ended))
        self._flights.add(flight)
        if key is not None:
            self._by_key[key] = flight
        return flight, False

    async def aclose(self) -> None:
        """Cancel every flight and what runs alone, and wait for their end."""
        if self._alone and self._last is None:
            self._last = asyncio.get_running_loop().create_future()
            for until_closed in self._alone:
                until_closed.reschedule(0)
        await asyncio.gather(*(flight.aclose() for flight in list(self._flights)))
        if self._last is not None:
            await asyncio.wait((self._last,), timeout=CLOSE_SECONDS)
            self._last = None

    def _land(self, key: Hashable | None, ended: Flight) -> None:
        self._flights.discard(ended)
        if key is not None and self._by_key.get(key) is ended:
            del self._by_key[key]


def _closed() -> BackendUnavailableError:
    return BackendUnavailableError("the pipeline was closed before the answer was complete")


async def within(seconds: float, closing: Coroutine[object, object, None]) -> None:
    """Wait at most `seconds` for `closing` to end, then cancel and leave it, even if it ignores the cancellation."""
    task = asyncio.ensure_future(closing)
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        task.cancel()
    if task.done():
        task.result()
    else:
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        log.warning("the backend did not close in time and is abandoned", seconds=seconds)
