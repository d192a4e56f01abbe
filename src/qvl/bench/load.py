"""Load generation: closed loop, open loop, ramp, adaptive concurrency and retries; one record per request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter
from typing import Final

from qvl.bench.exchange import OVERLOAD, AttemptFailedError, LoadedEndpoint
from qvl.bench.plan import LoadPlan
from qvl.bench.prepare import Feeder, PreparedBody
from qvl.bench.record import RequestRecord, RunFolder
from qvl.bench.timed_answer import TimedAnswer

TICK: Final = 0.05
PACED: Final = 100  # fewest requests for a share of the rate


class Limit:
    """The adaptive limit of requests in flight: raised by one on success if it is reached, halved on overload.

    Requests sent before the last halving do not halve it again.
    """

    def __init__(self, most: int, *, adaptive: bool) -> None:
        self.most = most
        self.now = 1 if adaptive else most
        self.running = 0
        self.halved_at = float("-inf")
        self.trace: deque[tuple[float, int]] = deque(maxlen=10_000)
        self._adaptive = adaptive
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait until fewer requests than the limit are in flight, then count one more."""
        while self.running >= self.now:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.running += 1

    def leave(self) -> None:
        """Count one request less in flight, and let a waiting one start."""
        self.running -= 1
        self._wake()

    def adjust(self, sent_at: float, *, overloaded: bool) -> None:
        """Raise or halve the limit after the outcome of a request sent at `sent_at`."""
        if not self._adaptive:
            return
        now = perf_counter()
        if overloaded:
            if sent_at <= self.halved_at:
                return
            self.now, self.halved_at = max(1, self.now // 2), now
        elif self.now < self.most and self.running >= self.now:
            self.now += 1
        else:
            return
        self.trace.append((now, self.now))
        self._wake()

    def _wake(self) -> None:
        free = self.now - self.running
        while free > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1


class Load:
    """Sends the requests of a feeder and records their outcomes; calls `on_record` with each finished one's record."""

    def __init__(
        self,
        plan: LoadPlan,
        endpoints: Sequence[LoadedEndpoint],
        folder: RunFolder,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self.plan = plan
        self.endpoints = endpoints
        self.folder = folder
        self.on_record = on_record
        self.origin = perf_counter()
        self.in_flight = 0
        self.interrupted = False
        self.behind = 0.0
        # Of the open loop: requests, the seconds in which they were meant to be sent, and in which they were.
        self.paced: tuple[int, float, float] = (0, 0.0, 0.0)
        self.lags: list[float] = []
        self.limits: list[tuple[float, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def interrupt(self) -> None:
        """Stop at once: running requests are cancelled and not recorded."""
        self.interrupted = True
        for task in tuple(self._tasks):
            task.cancel()

    async def closed(
        self,
        feeder: Feeder,
        endpoint: int,
        clients: int,
        *,
        stage: int = 0,
        ramp: float = 0.0,
        deadline: float | None = None,
        phase: str = "measure",
    ) -> tuple[float, float]:
        """Run `clients` clients, each sending its next request after its answer; return the steady part (start, end).

        The steady part is from the start of the last client to the time when the first one has no more requests.
        `endpoint` is an index; `ramp` is in seconds; nothing is sent after `deadline` (by perf_counter()).
        """
        limit = Limit(clients, adaptive=self.plan.adaptive and phase == "measure")
        begun = perf_counter()
        steady = begun + ramp
        idle_since: list[float] = []
        sent = 0

        async def client(number: int) -> None:
            nonlocal sent
            if ramp and number:
                await asyncio.sleep(ramp * number / max(1, clients - 1))
            while True:
                await limit.enter()
                try:
                    late = deadline is not None and perf_counter() >= deadline
                    prepared = None if late else await feeder.take()
                    if prepared is None:
                        idle_since.append(perf_counter())
                        return
                    sent += 1
                    now = perf_counter()
                    kind = "ramp" if phase == "measure" and now < steady else phase
                    await self._one(prepared, endpoint, now, kind, stage, limit)
                finally:
                    limit.leave()

        await self._together([client(number) for number in range(clients)])
        self.limits += [(when - self.origin, level) for when, level in limit.trace]
        return steady, min(idle_since, default=perf_counter()) if sent >= clients else steady

    async def open(
        self, feeder: Feeder, endpoint: int, *, part: int = 0, ramp: float = 0.0, deadline: float | None = None
    ) -> tuple[float, float]:
        """Send requests at the plan's rate (`part` seeds the gaps), not waiting for answers; return the steady part."""
        limit = Limit(self.plan.concurrency, adaptive=False)
        begun = perf_counter()
        steady = begun + ramp
        last = [begun]

        async def one(prepared: PreparedBody, intended: float) -> None:
            try:
                await self._one(prepared, endpoint, intended, "ramp" if intended < steady else "measure", 0, limit)
            finally:
                limit.leave()

        sent, meant, taken = 0, 0.0, 0.0

        async def schedule() -> None:
            nonlocal sent, meant, taken
            for after in self.plan.arrivals(part, ramp=ramp):
                intended = begun + after
                if deadline is not None and intended >= deadline:
                    last[0] = deadline
                    return
                prepared = await feeder.take()
                if prepared is None:
                    return
                last[0] = intended
                wait = intended - perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                await limit.enter()
                now = perf_counter()
                self.behind = max(self.behind, now - intended)
                sent, meant, taken = sent + 1, after, now - begun
                task = asyncio.get_running_loop().create_task(one(prepared, intended))
                self._tasks.add(task)
                started.append(task)
                task.add_done_callback(self._tasks.discard)
                if len(started) > 4096:
                    started[:] = [earlier for earlier in started if not earlier.done() or _broke(earlier)]

        started: list[asyncio.Task[None]] = []
        await self._together([schedule()])
        await self._settled(started)
        self.paced = (self.paced[0] + sent, self.paced[1] + meant, self.paced[2] + taken)
        return steady, last[0]

    @property
    def pace(self) -> float:
        """The achieved share of the planned rate, from 0 to 1; 1 for too few requests."""
        sent, meant, taken = self.paced
        return meant / taken if sent >= PACED and taken > meant else 1.0

    async def watch(self) -> None:
        """Measure the wake-up delay of this process, below which measured times say nothing about the endpoint."""
        while True:
            before = perf_counter()
            await asyncio.sleep(TICK)
            self.lags.append(perf_counter() - before - TICK)
            if len(self.lags) > 20_000:
                del self.lags[::2]

    async def _together(self, works: list[Coroutine[None, None, None]]) -> None:
        tasks = [asyncio.get_running_loop().create_task(work) for work in works]
        self._tasks.update(tasks)
        try:
            await self._settled(tasks)
        finally:
            self._tasks.difference_update(tasks)

    async def _settled(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Wait for all tasks; an unexpected exception in one cancels the others."""
        try:
            for ended in asyncio.as_completed(tasks):
                try:
                    await ended
                except asyncio.CancelledError:
                    if not self.interrupted:
                        raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(
        self, prepared: PreparedBody, number: int, intended: float, phase: str, stage: int, limit: Limit
    ) -> None:
        endpoint, item = self.endpoints[number], prepared.item
        record = RequestRecord(
            id=item.id,
            request_id=f"bench-{number}-{item.index}" if phase != "warmup" else f"bench-{number}-{item.id}",
            index=item.index,
            endpoint=number,
            url=endpoint.url,
            model=endpoint.model,
            phase=phase,
            stage=stage,
            session=self.folder.session,
            start=intended - self.origin,
            wait=perf_counter() - intended,
            pictures=prepared.pictures,
            pixel_tokens=prepared.pixel_tokens,
            expected=item.expected,
        )
        if prepared.error is not None:
            record.error, record.error_kind = prepared.error, "picture"
            record.end, record.wait = record.start, 0.0
        else:
            self.in_flight += 1
            try:
                await self._ask(endpoint, prepared, record, intended, limit)
            finally:
                self.in_flight -= 1
        self.folder.add(record)
        self.on_record(record)

    async def _ask(
        self, endpoint: LoadedEndpoint, prepared: PreparedBody, record: RequestRecord, intended: float, limit: Limit
    ) -> None:
        body = prepared.body(endpoint.model)
        while True:
            sent_at = perf_counter()
            try:
                answer = await endpoint.ask(body, record.request_id)
            except AttemptFailedError as exc:
                limit.adjust(sent_at, overloaded=exc.kind in OVERLOAD)
                if exc.again and record.retry_count < self.plan.retries.max_retries:
                    pause = self.plan.retries.delay(record.retry_count, exc.retry_after)
                    record.retried_for.append(exc.kind)
                    record.retry_count += 1
                    record.retry_wait += await _pause(pause)
                    continue
                ended = perf_counter()
                record.error, record.error_kind, record.status = str(exc), exc.kind, exc.status
                record.latency, record.end = ended - intended, ended - self.origin
                return
            limit.adjust(sent_at, overloaded=False)
            _note(record, answer, intended, sent_at, self.origin)
            return


async def _pause(seconds: float) -> float:
    """Wait for at least `seconds` (uvloop's timers round down) and return the actual time."""
    begun = now = perf_counter()
    while now - begun < seconds:
        await asyncio.sleep(begun + seconds - now)
        now = perf_counter()
    return now - begun


def _note(record: RequestRecord, answer: TimedAnswer, intended: float, sent_at: float, origin: float) -> None:
    """Fill the record with the times, tokens and text of an answer; times are relative to `origin`."""
    assert answer.first is not None
    usage = answer.usage
    record.success, record.status = True, 200
    record.url = answer.url or record.url
    record.response = "".join(answer.text)
    record.latency = answer.end - intended
    record.end = answer.end - origin
    record.ttft = answer.first - intended if answer.streamed else None
    record.first_byte = answer.headers_at - sent_at
    record.itl = answer.gaps
    record.finish_reason = answer.finish_reason
    record.counted = bool(usage and usage.completion_tokens)
    record.completion_tokens = usage.completion_tokens if usage and usage.completion_tokens else answer.pieces
    if usage is not None:
        record.prompt_tokens, record.image_tokens = usage.prompt_tokens, usage.image_tokens
        record.cached_tokens = usage.cached_tokens
    record.tokens_used = record.prompt_tokens + record.completion_tokens
    if record.ttft is not None and answer.pieces > 1 and record.completion_tokens > 1:
        record.tpot = (record.latency - record.ttft) / (record.completion_tokens - 1)
    record.cache, record.server_queue, record.server_total = answer.cache, answer.server_queue, answer.server_total


def _broke(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is not None
