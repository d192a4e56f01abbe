"""Single flight: identical requests that are under way at the same time share one piece of work.

Each piece of work runs in a task of its own, so that the one who asked first can leave without taking it away from
the others; when the last one leaves, the task is cancelled and the backend aborts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from qvl.types import Chunk, Result


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished piece of work leaves: the answer, its analysis if there is one, and where it came from."""

    result: Result
    analysis: Mapping[str, Any] | None = None
    confidence: Mapping[str, Any] = field(default_factory=dict)
    origin: Literal["backend", "cache"] = "backend"


Work: TypeAlias = Callable[[Callable[[Chunk], None]], Awaitable[Outcome]]


class Flight:
    """One piece of work and those who follow it. Chunks are kept, so a late follower misses nothing."""

    def __init__(self, work: Work, on_end: Callable[[], None]) -> None:
        self.followers = 0
        self._chunks: list[Chunk] = []
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run(work, on_end))

    @property
    def done(self) -> bool:
        return self._task.done()

    async def _run(self, work: Work, on_end: Callable[[], None]) -> Outcome:
        try:
            return await work(self._emit)
        finally:
            on_end()
            self._news.set()

    def _emit(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def outcome(self) -> Outcome:
        """Waits for the end.

        Raises:
            QvlError: whatever ended the work; the same for every follower.
        """
        self.followers += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            await self._leave()

    async def chunks(self) -> AsyncGenerator[Chunk | Outcome, None]:
        """Every chunk from the first on, and the outcome as the last item. Closing it leaves the flight."""
        self.followers += 1
        try:
            position = 0
            while True:
                news = self._news
                while position < len(self._chunks):
                    yield self._chunks[position]
                    position += 1
                if news is not self._news:
                    continue
                if self._task.done():
                    break
                waiter = asyncio.ensure_future(news.wait())
                try:
                    await asyncio.wait((waiter, self._task), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waiter.cancel()
            yield await asyncio.shield(self._task)
        finally:
            await self._leave()

    async def _leave(self) -> None:
        self.followers -= 1
        if self.followers == 0 and not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,))


class FlightBoard:
    """The flights under way, by key."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: str | None, work: Work) -> tuple[Flight, bool]:
        """The flight of `key` and whether it was already under way. Without a key it is always a new one."""
        if key is not None and (flight := self._flights.get(key)) is not None and not flight.done:
            return flight, True
        flight = Flight(work, lambda: self._land(key))
        if key is not None:
            self._flights[key] = flight
        return flight, False

    def _land(self, key: str | None) -> None:
        if key is not None:
            self._flights.pop(key, None)
