"""Limits of several server processes, counted in Redis: tickets that expire, and token buckets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from qvl.caches.circuit_breaker import Circuit
from qvl.caches.redis_url import SCHEMES, RedisAddress, import_redis
from qvl.ids import new_id
from qvl.log import logger

# The tickets of a process that was killed count for so long.
TICKET_SECONDS: Final = 10.0
RENEW_SECONDS: Final = 3.0
log = logger("qvl.server")

_NOW: Final = "local t = redis.call('TIME') local now = tonumber(t[1]) + tonumber(t[2]) / 1e6\n"
TAKE: Final = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[2])
redis.call('PEXPIRE', KEYS[1], math.ceil(tonumber(ARGV[3]) * 1000))
return 1
"""
)
RENEW: Final = (
    _NOW
    + """
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + tonumber(ARGV[1]), ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(tonumber(ARGV[1]) * 1000))
return 1
"""
)
# Returns how many tokens are left; below 0 none was taken, and so much is missing.
DRAW: Final = (
    _NOW
    + """
local rate = tonumber(ARGV[1])
local saved = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = rate
if saved[1] then tokens = math.min(rate, tonumber(saved[1]) + (now - tonumber(saved[2])) * rate / 60) end
local left = tokens - 1
if left >= 0 then tokens = left end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.9f', tokens), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], 120)
return string.format('%.9f', left)
"""
)


def is_redis(url: str | None) -> bool:
    """True if the cache at `url` is in Redis."""
    return url is not None and url.partition("://")[0] in SCHEMES and "://" in url


class SharedLimits:
    """Counts of all processes with the same Redis and `scope`.

    Every method returns None while Redis cannot be reached, which is logged once; callers then count for themselves.
    """

    def __init__(self, url: str, scope: str) -> None:
        self._address = RedisAddress.parse(url, {})
        # One hash slot of a cluster.
        self._prefix = f"{self._address.own.get('prefix', 'qvl:')}{{limits:{scope}}}:"
        self._foreign = (import_redis().RedisError, OSError)
        self._client: Any = None
        self._circuit = Circuit()
        self._held: dict[str, set[str]] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._returns: set[asyncio.Task[object]] = set()

    async def take(self, gate: str, limit: int) -> str | None:
        """Return a new ticket if fewer than `limit` are out, else ""; it must be given back."""
        ticket = new_id()
        try:
            got = await self._call(TAKE, gate, limit, ticket, TICKET_SECONDS)
        except BaseException:
            self.give_back(gate, ticket)
            raise
        if got is None:
            return None
        if not got:
            return ""
        self._held.setdefault(gate, set()).add(ticket)
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        return ticket

    def give_back(self, gate: str, ticket: str) -> None:
        """Give back a ticket, in the background."""
        held = self._held.get(gate, set())
        held.discard(ticket)
        if not held:
            self._held.pop(gate, None)
        task: asyncio.Task[object] = asyncio.ensure_future(self._run(lambda redis: redis.zrem(self._key(gate), ticket)))
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)

    async def draw(self, bucket: str, per_minute: int) -> float | None:
        """Return the tokens that are left of `per_minute`, after one was taken; below 0 none was taken."""
        left = await self._call(DRAW, f"rate:{bucket}", per_minute)
        return None if left is None else float(left)  # type: ignore[arg-type]  # text, from Lua

    async def aclose(self) -> None:
        """Give back what is held, and close the connections."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        for gate, tickets in list(self._held.items()):
            for ticket in list(tickets):
                self.give_back(gate, ticket)
        await asyncio.gather(*self._returns, return_exceptions=True)
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            for gate, tickets in list(self._held.items()):
                await self._call(RENEW, gate, TICKET_SECONDS, *tickets)

    def _key(self, gate: str) -> str:
        return f"{self._prefix}{gate}"

    async def _call(self, script: str, gate: str, *arguments: object) -> object:
        return await self._run(lambda redis: redis.eval(script, 1, self._key(gate), *arguments))

    async def _run(self, ask: Callable[[Any], object]) -> object:
        """Return what Redis answers; None if it cannot be reached."""
        return await asyncio.to_thread(self._ask, ask)

    def _ask(self, ask: Callable[[Any], object]) -> object:
        if self._circuit.enter():
            return None
        failure: str | None = "interrupted"
        try:
            if self._client is None:
                self._client = self._address.connect()
            answer = ask(self._client)
            failure = None
            return answer
        except self._foreign as exc:
            failure = str(exc) or type(exc).__name__
            return None
        finally:
            if self._circuit.leave(failure):
                if failure is None:
                    log.info("limits are shared again", redis=self._address.shown)
                else:
                    log.warning("limits are not shared: Redis fails", redis=self._address.shown, error=failure)
