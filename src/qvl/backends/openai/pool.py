"""The load balancer of a pool of endpoints.

Least outstanding picture tokens, round robin, or picture affinity; health from live traffic; a circuit breaker for
each endpoint: one that fails rests, each time longer, and one request then tries it. Independent of HTTP: a member
has any `target`, and the outcome of each request is reported through its ticket.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

from qvl.backends.openai.failures import Failed, Impact
from qvl.backends.openai.hash_ring import HashRing
from qvl.errors import BackendUnavailableError, ConfigError, RateLimitError, UnknownNameError

Policy = Literal["least_outstanding", "round_robin", "affinity"]
POLICIES: Final = ("least_outstanding", "round_robin", "affinity")
FIRST_REST: Final = 1.0
LONGEST_REST: Final = 60.0
FAULTS_IN_A_ROW: Final = 3
BUSY_REST: Final = 0.5
# How much busier than the others an endpoint may be before its pictures go to the next one.
BUSIER: Final = 1.25
SLACK: Final = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EndpointState:
    """The state of an endpoint: `state` is up, resting, trial, busy or draining; times in seconds.

    `picture_tokens` are the estimated prompt tokens of its running requests, the unit of load balancing.
    """

    url: str
    state: str
    weight: float
    limit: int | None
    running: int
    picture_tokens: float
    requests: int
    failures: int
    rest_seconds: float
    first_token: float
    last_error: str | None


@dataclass(slots=True, eq=False)
class Member(Generic[T]):
    """An endpoint of the pool, with its load and health."""

    name: str
    target: T
    weight: float = 1.0
    limit: int | None = None
    running: int = 0
    cost: float = 0.0
    requests: int = 0
    failures: int = 0
    faults: int = 0
    open_count: int = 0
    open_until: float = 0.0
    busy_until: float = 0.0
    resting: bool = False
    half_open: bool = False
    draining: bool = False
    turn: float = 0.0
    first_token: float = 0.0
    last_error: str | None = None
    empty: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def full(self) -> bool:
        return self.limit is not None and self.running >= self.limit


class Ticket(Generic[T]):
    """A slot of one request at one endpoint. `release` must always be called."""

    def __init__(self, pool: EndpointPool[T], member: Member[T], cost: float, *, half_open: bool) -> None:
        self._pool, self.member, self._cost, self._half_open = pool, member, cost, half_open
        self._started = pool.clock()
        self._released = False

    def first_token(self) -> None:
        """Record that the endpoint answers, which resets its failures."""
        self._pool.recovered(self.member)
        took = self._pool.clock() - self._started
        self.member.first_token += (took - self.member.first_token) * (0.2 if self.member.first_token else 1.0)

    def failed(self, failure: Failed) -> None:
        self._pool.record_failure(self.member, failure)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._pool.give_back(self.member, self._cost, half_open=self._half_open)


class EndpointPool(Generic[T]):
    """Chooses the endpoint of each request; see `acquire`. All methods must be called on one event loop."""

    def __init__(
        self,
        members: Iterable[Member[T]] = (),
        *,
        policy: Policy = "least_outstanding",
        max_waiting: int = 4096,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"unknown policy {policy!r}", hint=f"one of {', '.join(POLICIES)}", param="policy")
        self.clock = clock
        self.policy = policy
        self._members: dict[str, Member[T]] = {}
        self._ring = HashRing({})
        self._max_waiting = max_waiting
        self._turn = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._rng = rng or random.Random()
        for member in members:
            self.add(member)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def members(self) -> tuple[Member[T], ...]:
        return tuple(self._members.values())

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, member: Member[T]) -> None:
        """Add a member.

        Raises:
            ConfigError: the name is in the pool already, or the weight or limit is invalid.
        """
        if member.name in self._members:
            raise ConfigError(f"duplicate endpoint {member.name}", param="base_url")
        if not member.weight > 0:
            raise ConfigError(f"the weight {member.weight} of {member.name} must be above 0", param="weights")
        if member.limit is not None and member.limit < 1:
            raise ConfigError(f"the limit {member.limit} of {member.name} must be at least 1", param="limit")
        member.turn = self._turn
        self._members[member.name] = member
        self._reshape()

    def find(self, name: str) -> Member[T]:
        """Return the member called `name`.

        Raises:
            UnknownNameError: no endpoint of the pool has it.
        """
        if name not in self._members:
            from qvl.suggest import nearest

            raise UnknownNameError(f"unknown endpoint {name}", hint=nearest(name, self._members))
        return self._members[name]

    def adjust(self, name: str, *, weight: float, limit: int | None) -> Member[T]:
        """Set the weight and limit of a member and return it; cancels its removal if it was draining."""
        member = self.find(name)
        member.weight, member.limit, member.draining = weight, limit, False
        self._reshape()
        return member

    def drain(self, name: str) -> Member[T]:
        """Stop sending requests to a member."""
        member = self.find(name)
        member.draining = True
        self._reshape()
        return member

    async def remove(self, member: Member[T], *, timeout: float | None = None) -> bool:
        """Remove a draining member after its last request, or after `timeout` seconds.

        Returns False if its removal was cancelled meanwhile, or another caller has removed it.
        """
        if member.running:
            member.empty.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(member.empty.wait(), timeout)
        if not member.draining or self._members.get(member.name) is not member:
            return False
        del self._members[member.name]
        return True

    async def acquire(
        self, *, cost: float = 1.0, key: str | None = None, exclude: frozenset[str] = frozenset(), until: float
    ) -> Ticket[T] | None:
        """Return a ticket for the best endpoint not in `exclude`; waits while those that are up are at their limit.

        `cost` is the estimated prompt tokens, `key` the hash of the request's picture, for affinity. Returns None if no
        endpoint is available now (all are excluded, resting or busy).

        Raises:
            RateLimitError: `until` (by the pool's clock) passed while waiting, or too many requests wait.
        """
        while True:
            member, worth_waiting = self._choose(key, exclude)
            if member is not None:
                return self._take(member, cost)
            if not worth_waiting:
                return None
            await self._wait(until)

    def _choose(self, key: str | None, exclude: frozenset[str]) -> tuple[Member[T] | None, bool]:
        now, alone, worth_waiting = self.clock(), len(self._members) == 1, False
        free: list[Member[T]] = []
        due: list[Member[T]] = []
        for m in self._members.values():
            if m.draining or m.name in exclude:
                continue
            if alone or not (m.resting or m.busy_until > now):
                if m.full:
                    worth_waiting = True
                else:
                    free.append(m)
            elif m.half_open:
                # While one request tries the last endpoint, the others wait for what it finds.
                worth_waiting = True
            elif m.resting and m.open_until <= now and not m.full:
                due.append(m)
        # A rested endpoint is tried by one request, before those that are up, or it would never come back.
        if due:
            return min(due, key=lambda m: m.open_until), False
        return (self._best(free, key), False) if free else (None, worth_waiting)

    def _best(self, free: list[Member[T]], key: str | None) -> Member[T]:
        if len(free) == 1:
            return free[0]
        if self.policy == "affinity" and key is not None:
            # Consistent hashing with bounded loads (Mirrokni et al. 2018): a popular picture has more than one home.
            by_name = {member.name: member for member in free}
            share = BUSIER * sum(member.running for member in free) / sum(member.weight for member in free)
            order = (by_name[name] for name in self._ring.order(key) if name in by_name)
            first = next(order)
            if first.running <= share * first.weight + SLACK:
                return first
            return next((member for member in order if member.running <= share * member.weight + SLACK), first)
        if self.policy == "round_robin":
            return min(free, key=lambda m: m.turn)
        return min(free, key=lambda m: (m.cost / m.weight, m.turn))

    def _take(self, member: Member[T], cost: float) -> Ticket[T]:
        member.running += 1
        member.cost += cost
        member.requests += 1
        # Virtual time: a member of weight 2 comes round twice as often, and nobody catches up on time spent away.
        self._turn = max(member.turn, self._turn)
        member.turn = self._turn + 1.0 / member.weight
        if member.resting and len(self._members) > 1:
            member.half_open = True
        return Ticket(self, member, cost, half_open=member.half_open)

    async def _wait(self, until: float) -> None:
        if len(self._waiting) >= self._max_waiting:
            raise RateLimitError(f"queue is full: {self._max_waiting} requests wait for an endpoint", retry_after=1.0)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await asyncio.wait_for(future, max(0.0, until - self.clock()))
        except TimeoutError:
            raise RateLimitError("timed out waiting for a free endpoint", retry_after=1.0) from None
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._wake(1)
            raise
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def _wake(self, count: int) -> None:
        while count and self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                count -= 1

    def give_back(self, member: Member[T], cost: float, *, half_open: bool) -> None:
        member.running -= 1
        member.cost = max(0.0, member.cost - cost) if member.running else 0.0
        if half_open:
            member.half_open = False
        if not member.running:
            member.empty.set()
        self._wake(1)

    def recovered(self, member: Member[T]) -> None:
        """Close the circuit of a member that answered or passed a health check."""
        back = member.resting
        member.faults = member.open_count = 0
        member.open_until = member.busy_until = 0.0
        member.resting = member.half_open = False
        if back:
            self._wake(len(self._waiting))

    def try_now(self, member: Member[T]) -> None:
        """End the resting time of a member, so that the next request tries it."""
        member.open_until = 0.0
        self._wake(1)

    def record_failure(self, member: Member[T], failure: Failed) -> None:
        """Record a failure; the member rests if it is down, or after several faults in a row."""
        member.failures += 1
        member.last_error = str(failure.error.message)
        now = self.clock()
        if failure.impact is Impact.BUSY:
            wait = BUSY_REST if failure.retry_after is None else failure.retry_after
            member.busy_until = max(member.busy_until, now + min(wait, LONGEST_REST))
        elif failure.impact is not Impact.NONE:
            member.faults += 1
            if failure.impact is Impact.DOWN or member.resting or member.faults >= FAULTS_IN_A_ROW:
                self._rest(member, now)
        self._wake(len(self._waiting))

    def _rest(self, member: Member[T], now: float) -> None:
        if member.resting and member.open_until > now:
            return
        length = min(LONGEST_REST, FIRST_REST * 2.0 ** min(member.open_count, 16))
        member.open_count += 1
        member.resting = True
        member.open_until = now + length * (1 - 0.25 * self._rng.random())

    def next_chance(self, exclude: frozenset[str] = frozenset()) -> float:
        """Return the seconds until an endpoint ends its rest or busy time; 0 if one is available now."""
        now = self.clock()
        waits = [
            max(0.0, (m.open_until if m.resting else m.busy_until) - now)
            for m in self._members.values()
            if not m.draining and m.name not in exclude
        ]
        return min(waits, default=0.0)

    def unavailable_reason(self) -> str | None:
        """Return the reason why no endpoint is available, naming each; None if one is."""
        if any(not m.resting and not m.draining for m in self._members.values()):
            return None
        return "; ".join(f"{m.name}: {m.last_error or 'draining'}" for m in self._members.values()) or "no endpoint"

    def snapshot(self) -> list[EndpointState]:
        now = self.clock()
        return [
            EndpointState(
                url=m.name,
                state=_state(m, now),
                weight=m.weight,
                limit=m.limit,
                running=m.running,
                picture_tokens=round(m.cost, 1),
                requests=m.requests,
                failures=m.failures,
                rest_seconds=max(0.0, m.open_until - now) if m.resting else max(0.0, m.busy_until - now),
                first_token=m.first_token,
                last_error=m.last_error,
            )
            for m in self._members.values()
        ]

    def close(self) -> None:
        """End every wait with BackendUnavailableError."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(BackendUnavailableError("the backend was closed while the request was waiting"))

    def _reshape(self) -> None:
        self._ring = HashRing({m.name: m.weight for m in self._members.values() if not m.draining})
        self._wake(len(self._waiting))


def _state(member: Member[T], now: float) -> str:
    if member.draining:
        return "draining"
    if member.half_open:
        return "trial"
    if member.resting:
        return "resting"
    return "busy" if member.busy_until > now else "up"


def weights_by_url(urls: Iterable[str], weights: Mapping[str, float] | Iterable[float]) -> dict[str, float]:
    """Return the weight of each URL, from a mapping or in the order of the URLs; 1 by default.

    Raises:
        ConfigError: a mapping has an unknown URL, or the number of weights is not that of the URLs.
    """
    names = list(urls)
    if isinstance(weights, Mapping):
        if unknown := [name for name in weights if name not in names]:
            raise ConfigError(f"unknown URL {unknown[0]} in weights: it is not a base_url", param="weights")
        return {name: float(weights.get(name, 1.0)) for name in names}
    values = [float(weight) for weight in weights]
    if len(values) != len(names):
        raise ConfigError(f"expected {len(names)} weights, one for each endpoint, got {len(values)}", param="weights")
    return dict(zip(names, values, strict=True))
