"""Admission control: a bounded queue in front of the backend, and rate limits per API key."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

from qvl.errors import RateLimitError
from qvl.server.errors import HttpError
from qvl.server.settings import MAX_RETRY_AFTER

if TYPE_CHECKING:
    from qvl.pipeline.job import Job

PIXELS_PER_TOKEN: Final = 32 * 32
# Pillow holds RGB in four.
BYTES_PER_PIXEL: Final = 4
_SMOOTHING: Final = 0.1


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
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def retry_after(self) -> float:
        """Return the estimated seconds until a slot is free, from the measured service time."""
        one = self.service_seconds if self.service_seconds is not None else 1.0
        return min(max(one * (self.waiting + 1) / self.max_running, 0.1), MAX_RETRY_AFTER)

    @asynccontextmanager
    async def enter(self, job: Job) -> AsyncIterator[None]:
        """Hold a slot at the backend for the duration of the context, waiting in the queue for it.

        Raises:
            HttpError: 413, the pictures would take too much memory.
            RateLimitError: the queue is full.
        """
        size = decoded_bytes(job, wants_pixels=self.wants_pixels)
        if size > self.max_job_bytes:
            raise HttpError(
                413,
                f"the pictures have {size // BYTES_PER_PIXEL} pixels in all, more than the"
                f" {self.max_job_bytes // BYTES_PER_PIXEL} that one request may have",
                hint="send fewer or smaller pictures, a smaller max_pixels, or raise qvl-serve --max-decoded-mb",
                code="request_too_large",
            )
        began = time.perf_counter()
        await self._take(picture_tokens(job), size)
        started = time.perf_counter()
        job.stages.queue += started - began
        self.on_wait(started - began)
        try:
            yield
            took = time.perf_counter() - started
            known = self.service_seconds
            self.service_seconds = took if known is None else known + _SMOOTHING * (took - known)
        finally:
            self._give_back(size)

    def _has_room(self, size: int) -> bool:
        # Alone every job passes, whatever the bounds are set to.
        return self.running < self.max_running and (self.running_bytes + size <= self.max_bytes or not self.running)

    async def _take(self, tokens: int, size: int) -> None:
        if not self._queue and self._has_room(size):
            self.running += 1
            self.running_bytes += size
            return
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

    def _refuse(self, reason: str, message: str) -> None:
        self.on_refusal(reason)
        raise RateLimitError(message, hint="try again later", code="engine_overloaded", retry_after=self.retry_after())


class KeyLimits:
    """Limits per API key: requests per minute (a token bucket) and concurrent requests."""

    def __init__(
        self, per_minute: int | None, concurrent: int | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_minute = per_minute
        self.concurrent = concurrent
        self.on_refusal: Callable[[str], None] = lambda reason: None
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._under_way: dict[str, int] = {}

    @contextmanager
    def enter(self, tenant: str) -> Iterator[None]:
        """Count one request of `tenant` for the duration of the context.

        Raises:
            RateLimitError: too many requests per minute or at a time.
        """
        if self.concurrent is not None and self._under_way.get(tenant, 0) >= self.concurrent:
            self.on_refusal("key_concurrency")
            raise RateLimitError(
                f"{self.concurrent} requests of this key are running", hint="wait for one to finish", retry_after=1.0
            )
        if self.per_minute is not None:
            self._take_from_bucket(tenant, self.per_minute)
        if self.concurrent is None:
            yield
            return
        self._under_way[tenant] = self._under_way.get(tenant, 0) + 1
        try:
            yield
        finally:
            under_way = self._under_way.pop(tenant) - 1
            if under_way:
                self._under_way[tenant] = under_way

    def _take_from_bucket(self, tenant: str, per_minute: int) -> None:
        now = self._clock()
        tokens, then = self._buckets.get(tenant, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - then) * per_minute / 60)
        if tokens < 1:
            self._buckets[tenant] = (tokens, now)
            self.on_refusal("key_rate")
            raise RateLimitError(
                f"more than {per_minute} requests a minute with this key",
                hint="wait, or send fewer",
                retry_after=(1 - tokens) * 60 / per_minute,
            )
        self._buckets[tenant] = (tokens - 1, now)

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
