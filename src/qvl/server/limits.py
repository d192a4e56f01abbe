"""Admission control: a bounded queue in front of the backend, and rate limits per API key.

Both count in this process, or in Redis with those of other processes (`shared`); while Redis cannot be reached, in this
process again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Final, NoReturn

from qvl.errors import RateLimitError
from qvl.server.errors import HttpError
from qvl.server.settings import MAX_RETRY_AFTER

if TYPE_CHECKING:
    from qvl.pipeline.job import Job
    from qvl.server.shared_limits import SharedLimits

PIXELS_PER_TOKEN: Final = 32 * 32
# Pillow holds RGB in four.
BYTES_PER_PIXEL: Final = 4
_SMOOTHING: Final = 0.1
# How often the first who waits looks whether another process gave back a slot.
_LOOK_SECONDS: Final = 0.025


def picture_tokens(job: Job) -> int:
    """Return the number of picture tokens of `job`, estimated before the pictures are decoded."""
    budget = job.request.max_pixels
    return sum(
        -(-min(picture.width * picture.height, budget or picture.width * picture.height) // PIXELS_PER_TOKEN)
        for picture in job.request.pictures
    )


def decoded_bytes(job: Job, *, wants_pixels: bool) -> int:
    """Return the bytes of decoded pixels of `job` at the backend; pictures forwarded undecoded count 0."""
    taken = 0
    for picture in job.request.pictures:
        size = picture.width * picture.height
        fitting = min(size, job.request.max_pixels or size)
        if wants_pixels or not picture.untouched or fitting < size:
            taken += BYTES_PER_PIXEL * fitting
    return taken


class SharedSlots:
    """The slots at the backend of a `group` of processes: `max_running` in all, and places in the queue."""

    def __init__(self, shared: SharedLimits, group: str, max_running: int, max_waiting: int) -> None:
        self._shared = shared
        self._running, self._places = f"running:{group}", f"waiting:{group}"
        self._max_running = max_running
        self._max_waiting = max_waiting
        # First come, first served among those of this process; the others' turns come as they look.
        self._turn = asyncio.Lock()
        self.waiting = 0

    async def take(self) -> str | None:
        """Return a ticket for `give_back`, waiting for a slot; None while Redis cannot be reached.

        Raises:
            QueueFullError: too many wait already.
        """
        if not self.waiting:
            ticket = await self._shared.take(self._running, self._max_running)
            if ticket != "":
                return ticket
        place = await self._shared.take(self._places, self._max_waiting)
        if place == "":
            raise QueueFullError
        self.waiting += 1
        try:
            async with self._turn:
                while True:
                    ticket = await self._shared.take(self._running, self._max_running)
                    if ticket != "":
                        return ticket
                    await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self.waiting -= 1
            if place:
                self._shared.give_back(self._places, place)

    def give_back(self, ticket: str) -> None:
        """Free a slot."""
        self._shared.give_back(self._running, ticket)


class QueueFullError(Exception):
    """Too many requests wait in all processes together."""


class Admission:
    """Lets `max_running` jobs run and `max_waiting` jobs (with limited picture tokens) wait, and refuses further ones.

    `executor.admit` is set to `enter`, so cache hits and followers of a flight need no slot. Pictures are decoded
    after it: at most `max_bytes` of pixels for all running jobs, `max_job_bytes` for one.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        max_waiting_tokens: int,
        *,
        max_job_bytes: int,
        max_bytes: int,
        wants_pixels: bool,
    ) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.max_job_bytes = max_job_bytes
        self.max_bytes = max_bytes
        self.wants_pixels = wants_pixels
        self.running = 0
        self.running_bytes = 0
        self.waiting_tokens = 0
        self.service_seconds: float | None = None
        self.on_wait: Callable[[float], None] = lambda seconds: None
        self.on_refusal: Callable[[str], None] = lambda reason: None
        self.shared: SharedSlots | None = None
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue) + (self.shared.waiting if self.shared else 0)

    def retry_after(self) -> float:
        """Return the estimated seconds until a slot is free, from the measured service time."""
        one = self.service_seconds if self.service_seconds is not None else 1.0
        return min(max(one * (self.waiting + 1) / self.max_running, 0.1), MAX_RETRY_AFTER)

    def enter(self, job: Job) -> BackendSlot:
        """Return a context in which `job` holds a slot at the backend; entering it waits in the queue.

        Raises:
            HttpError: (when it is entered) 413, the pictures would take too much memory.
            RateLimitError: (when it is entered) the queue is full.
        """
        return BackendSlot(self, job)

    async def take(self, job: Job) -> tuple[int, str | None]:
        """Take a slot for `job`; return the bytes that its pixels will take, and the ticket of a shared slot."""
        size = decoded_bytes(job, wants_pixels=self.wants_pixels)
        if size > self.max_job_bytes:
            raise HttpError(
                413,
                f"the pictures have {size // BYTES_PER_PIXEL} pixels in all, more than the"
                f" {self.max_job_bytes // BYTES_PER_PIXEL} that one request may have",
                hint="send fewer or smaller pictures, a smaller max_pixels, or raise qvl-serve --max-decoded-mb",
                code="request_too_large",
            )
        ticket = None if self.shared is None else await self._take_shared(self.shared, picture_tokens(job))
        if ticket is None and (self._queue or not self._has_room(size)):
            await self._wait(picture_tokens(job), size)
        else:
            self.running += 1
            self.running_bytes += size
        return size, ticket

    def give_back(self, size: int, ticket: str | None, seconds: float | None) -> None:
        """Free the slot of a job, which took `seconds`; None if it failed."""
        if seconds is not None:
            known = self.service_seconds
            self.service_seconds = seconds if known is None else known + _SMOOTHING * (seconds - known)
        if ticket and self.shared is not None:
            self.shared.give_back(ticket)
        self._give_back(size)

    async def _take_shared(self, slots: SharedSlots, tokens: int) -> str | None:
        if slots.waiting and self.waiting_tokens + tokens > self.max_waiting_tokens:
            self._refuse("picture_tokens", f"{self.waiting_tokens} picture tokens are already waiting")
        self.waiting_tokens += tokens
        try:
            return await slots.take()
        except QueueFullError:
            self._refuse("queue_full", "too many requests are already waiting")
        finally:
            self.waiting_tokens -= tokens

    def _has_room(self, size: int) -> bool:
        # Alone every job passes, whatever the bounds are set to.
        return self.running < self.max_running and (self.running_bytes + size <= self.max_bytes or not self.running)

    async def _wait(self, tokens: int, size: int) -> None:
        if len(self._queue) >= self.max_waiting:
            self._refuse("queue_full", f"{len(self._queue)} requests are already waiting")
        if self._queue and self.waiting_tokens + tokens > self.max_waiting_tokens:
            self._refuse("picture_tokens", f"{self.waiting_tokens} picture tokens are already waiting")
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((ticket, size))
        self.waiting_tokens += tokens
        try:
            await ticket
        except BaseException:
            if ticket.done() and not ticket.cancelled():
                self._give_back(size)
            else:
                if (ticket, size) in self._queue:
                    self._queue.remove((ticket, size))
                # Who stood behind may need less room.
                self._fill()
            raise
        finally:
            self.waiting_tokens -= tokens

    def _give_back(self, size: int) -> None:
        """Free a slot and `size` bytes, and admit waiting jobs."""
        self.running -= 1
        self.running_bytes -= size
        self._fill()

    def _fill(self) -> None:
        """Give free slots to the jobs that have waited longest."""
        while self._queue:
            ticket, size = self._queue[0]
            if not ticket.done():
                if not self._has_room(size):
                    return
                self.running += 1
                self.running_bytes += size
                ticket.set_result(None)
            self._queue.popleft()

    def _refuse(self, reason: str, message: str) -> NoReturn:
        self.on_refusal(reason)
        raise RateLimitError(message, hint="try again later", code="engine_overloaded", retry_after=self.retry_after())


class BackendSlot:
    """The slot of one job at the backend, held for the duration of the context."""

    __slots__ = ("_admission", "_job", "_size", "_started", "_ticket")

    def __init__(self, admission: Admission, job: Job) -> None:
        self._admission = admission
        self._job = job

    async def __aenter__(self) -> None:
        began = time.perf_counter()
        self._size, self._ticket = await self._admission.take(self._job)
        self._started = time.perf_counter()
        self._job.stages.queue += self._started - began
        self._admission.on_wait(self._started - began)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        took = None if kind is not None else time.perf_counter() - self._started
        self._admission.give_back(self._size, self._ticket, took)


class KeyLimits:
    """Limits per API key: requests per minute (a token bucket) and concurrent requests."""

    def __init__(
        self, per_minute: int | None, concurrent: int | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_minute = per_minute
        self.concurrent = concurrent
        self.on_refusal: Callable[[str], None] = lambda reason: None
        self.shared: SharedLimits | None = None
        self.processes = 1
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._under_way: dict[str, int] = {}

    def enter(self, tenant: str) -> AbstractAsyncContextManager[None]:
        """Return a context in which one request of `tenant` counts.

        Raises:
            RateLimitError: (when it is entered) too many requests per minute or at a time.
        """
        return nullcontext() if self.concurrent is None and self.per_minute is None else self._counted(tenant)

    @asynccontextmanager
    async def _counted(self, tenant: str) -> AsyncIterator[None]:
        ticket = None
        if self.concurrent is not None:
            if self.shared is not None:
                ticket = await self.shared.take(f"key:{tenant}", self.concurrent)
            if ticket == "" or (ticket is None and self._under_way.get(tenant, 0) >= self._part(self.concurrent)):
                self.on_refusal("key_concurrency")
                raise RateLimitError(
                    f"{self.concurrent} requests of this key are running",
                    hint="wait for one to finish",
                    retry_after=1.0,
                )
            self._under_way[tenant] = self._under_way.get(tenant, 0) + 1
        try:
            if self.per_minute is not None:
                await self._draw(tenant, self.per_minute)
            yield
        finally:
            if self.concurrent is not None:
                under_way = self._under_way.pop(tenant) - 1
                if under_way:
                    self._under_way[tenant] = under_way
            if ticket and self.shared is not None:
                self.shared.give_back(f"key:{tenant}", ticket)

    def _part(self, limit: int) -> int:
        """Return this process's part of `limit`, which is all of it unless others count in the same Redis."""
        return max(1, limit // self.processes) if self.shared is not None else limit

    async def _draw(self, tenant: str, per_minute: int) -> None:
        """Take a token from the tenant's bucket; raise RateLimitError if there is none."""
        now = self._clock()
        left = None if self.shared is None else await self.shared.draw(tenant, per_minute)
        if left is None:
            rate = self._part(per_minute)
            tokens, then = self._buckets.get(tenant, (float(rate), now))
            tokens = min(float(rate), tokens + (now - then) * rate / 60)
            left = tokens - 1
        else:
            rate = per_minute
        self._buckets[tenant] = (left if left >= 0 else left + 1, now)
        if left < 0:
            self.on_refusal("key_rate")
            raise RateLimitError(
                f"more than {per_minute} requests a minute with this key",
                hint="wait, or send fewer",
                retry_after=-left * 60 / rate,
            )

    def headers(self, tenant: str) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's `x-ratelimit-…` headers for `tenant`; [] if no requests-per-minute limit is set."""
        if self.per_minute is None:
            return []
        tokens, _ = self._buckets.get(tenant, (float(self.per_minute), 0.0))
        reset = (self.per_minute - tokens) * 60 / self.per_minute
        return [
            (b"x-ratelimit-limit-requests", b"%d" % self.per_minute),
            (b"x-ratelimit-remaining-requests", b"%d" % max(0, int(tokens))),
            (b"x-ratelimit-reset-requests", b"%.3fs" % reset),
        ]
