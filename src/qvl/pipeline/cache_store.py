"""Access to a cache from the event loop, in worker threads; a cache failure never fails a request."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.to_thread

from qvl.caches import key as keys
from qvl.caches.base import Cache, CacheEntry, Lease
from qvl.errors import CacheError
from qvl.log import logger
from qvl.pipeline.job import Confidence, Outcome

if TYPE_CHECKING:
    from qvl.pipeline.job import Job

WORKERS: Final = 8
LEASE_SECONDS: Final = 20.0
# A lease is renewed so many times in its length, so that a beat may come late.
BEATS: Final = 3
# For a holder that renews its lease and never ends.
LONGEST_WAIT: Final = 1800.0
T = TypeVar("T")
log = logger("qvl.cache")


@dataclass(slots=True)
class _RenewedLease:
    """A lease that is renewed regularly, and its expiry by time.monotonic()."""

    lease: Lease
    until: float


class Store:
    """A cache behind worker threads. A failure is counted and treated as a miss; an outage is logged once.

    Args:
        ttl: seconds to keep entries; None keeps them until they are evicted.
        lease_seconds: seconds after which the lease of a dead process expires; a live one renews its leases.
        owned: True if closing the store closes the cache.
    """

    def __init__(
        self, cache: Cache, *, ttl: float | None = None, lease_seconds: float = LEASE_SECONDS, owned: bool = True
    ) -> None:
        self.cache = cache
        self.ttl = ttl
        self.lease_seconds = lease_seconds
        self.owned = owned
        self.failures = 0
        # What failed last time: reads, writes or leases. An outage ends when all of it has gone well again.
        self._failing: set[str] = set()
        self._leases: dict[tuple[str, int], _RenewedLease] = {}
        self._beat: asyncio.TimerHandle | None = None
        self._renewing: asyncio.Task[None] | None = None
        # What goes on although nobody waits for it any more.
        self._ending: set[asyncio.Task[None]] = set()
        self._limiters: dict[str, anyio.CapacityLimiter] = {}
        # Not a semaphore, which is Python code: Ctrl-C in its midst would leave it held for ever.
        self._reading = [threading.Lock() for _ in range(WORKERS)]
        self._turns = itertools.count()

    async def _call(self, what: str, function: Callable[[], T], otherwise: T) -> T:
        """Return the value of `function`, called in a worker thread, or `otherwise` if the cache fails."""
        side = what if what in ("read", "write") else "lease"
        try:
            # Those who wait for another process sit in threads of their own, so that they never hold up a read; and
            # nothing holds up those who keep a lease.
            kind = what if what in ("wait", "renewal") else "work"
            if kind not in self._limiters:
                self._limiters[kind] = anyio.CapacityLimiter(WORKERS)
            value = await anyio.to_thread.run_sync(function, limiter=self._limiters[kind])
        except CacheError as exc:
            self._failed(what, side, exc)
            return otherwise
        self._worked(side)
        return value

    def _failed(self, what: str, side: str, exc: CacheError) -> None:
        self.failures += 1
        tell = log.info if self._failing else log.warning
        self._failing.add(side)
        tell(f"cache {what} failed, continuing without it", error=str(exc), cache=self.cache.url)

    def _worked(self, side: str) -> None:
        if self._failing:
            self._failing.discard(side)
            if not self._failing:
                log.info("cache works again", cache=self.cache.url)

    def keep_hot(self, seconds: float) -> None:
        """Keep entries in memory too for `seconds` after they were read, if the cache is on a disk or a network.

        For as long, entries are served that another process has deleted or replaced.
        """
        from qvl.caches.tiered import TieredCache

        if not self.cache.instant and not isinstance(self.cache, TieredCache):
            self.cache = TieredCache(self.cache, front_ttl=seconds)

    def peek(self, key: str, *, max_age: float | None = None) -> tuple[bool, CacheEntry | None]:
        """Return (True, entry, or None for a miss) if the cache can tell without I/O; else (False, None)."""
        try:
            entry = self.cache.peek(key)
            if entry is None:
                return self.cache.lacks(key), None
        except CacheError as exc:
            self._failed("read", "read", exc)
            return True, None
        if _too_old(entry, max_age):
            return not self.cache.layered, None
        return True, entry

    def get(self, key: str, *, max_age: float | None = None) -> CacheEntry | None:
        """Return the entry of `key` if it is at most `max_age` seconds old; blocks the calling thread."""
        try:
            with self._reading[next(self._turns) % WORKERS]:
                entry = self._fresh(key, max_age)
        except CacheError as exc:
            self._failed("read", "read", exc)
            return None
        if not self.cache.instant:
            self._worked("read")
        return entry

    def _fresh(self, key: str, max_age: float | None) -> CacheEntry | None:
        entry = self.cache.get(key)
        if self.cache.layered and _too_old(entry, max_age):
            entry = self.cache.reread(key)
        return None if _too_old(entry, max_age) else entry

    async def set(self, key: str, entry: CacheEntry, *, lease: Lease | None = None) -> None:
        """Store `entry`; if its `lease` may have expired, do not overwrite an entry stored meanwhile."""
        if lease is not None and await self._outrun(key, lease):
            log.info("answer not stored: a later lease holder has stored one", key=key, cache=self.cache.url)
            return
        await self._call("write", lambda: self.cache.set(key, entry, ttl=self.ttl), None)

    async def _outrun(self, key: str, lease: Lease) -> bool:
        renewed = self._leases.get((lease.key, lease.token))
        if renewed is not None and time.monotonic() < renewed.until:
            return False
        entry = await self._call("read", lambda: self.cache.reread(key), None)
        return entry is not None and entry.created_at >= lease.expires_at - self.lease_seconds

    async def lease_or_entry(
        self, key: str, *, read: bool, max_age: float | None = None
    ) -> tuple[Lease | None, CacheEntry | None]:
        """Return a lease (the right to compute `key`) or, if `read`, the entry that another process computed meanwhile.

        The lease is renewed until `release`. Both are None if the cache failed or the lease's holder took too long.
        """
        end = time.monotonic() + LONGEST_WAIT
        while True:
            failures = self.failures
            lease = await self._lease(key)
            try:
                entry = await self._read(key, max_age) if read else None
            except BaseException:
                if lease is not None:
                    await self.release(lease)
                raise
            if entry is not None:
                if lease is not None:
                    await self.release(lease)
                return None, entry
            if lease is not None or self.failures > failures or time.monotonic() > end:
                return lease, None
            await self._call("wait", lambda: self.cache.wait(key, 1.0), None)

    async def _read(self, key: str, max_age: float | None) -> CacheEntry | None:
        known, entry = self.peek(key, max_age=max_age)
        return entry if known else await self._call("read", partial(self._fresh, key, max_age), None)

    async def _lease(self, key: str) -> Lease | None:
        """Return the lease of `key` if it is free. One granted after the caller was cancelled is released."""
        until = time.monotonic() + self.lease_seconds
        request = asyncio.ensure_future(self._call("lease", lambda: self.cache.lease(key, self.lease_seconds), None))
        try:
            lease = await asyncio.shield(request)
        except asyncio.CancelledError:
            # The thread that asks goes on, and nobody else would know of what it brings.
            await self._surely(self._undo(request))
            raise
        if lease is not None:
            self._leases[lease.key, lease.token] = _RenewedLease(lease, until)
            self._arm()
        return lease

    async def _undo(self, request: asyncio.Future[Lease | None]) -> None:
        if (lease := await request) is not None:
            await self._call("release", lambda: self.cache.release(lease), None)

    async def _surely(self, work: Coroutine[object, object, None]) -> None:
        """Run `work` to completion even if the caller is cancelled."""
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)

    def _arm(self) -> None:
        if self._beat is None and self._renewing is None:
            self._beat = asyncio.get_running_loop().call_later(self.lease_seconds / BEATS, self._renew_soon)

    def _disarm(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    def _renew_soon(self) -> None:
        self._beat = None
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        """Renew the leases of all running work, WORKERS at a time, so that none expires in a slow store."""
        try:
            await asyncio.gather(*map(self._renew_one, list(self._leases.values())))
        finally:
            self._renewing = None
            if self._leases:
                self._arm()

    async def _renew_one(self, renewed: _RenewedLease) -> None:
        """Renew a lease. A lost one is dropped from renewal, but its work is not stopped."""
        lease = renewed.lease
        name = lease.key, lease.token

        def renew() -> bool:
            # It may have been given back while this waited for a thread.
            if name not in self._leases:
                return True
            until = time.monotonic() + self.lease_seconds
            if kept := self.cache.renew(lease, self.lease_seconds):
                renewed.until = until
            return kept

        if not await self._call("renewal", renew, True) and self._leases.pop(name, None) is not None:
            log.info("lease lost: another process may compute the same answer", key=lease.key, cache=self.cache.url)

    async def release(self, lease: Lease) -> None:
        self._leases.pop((lease.key, lease.token), None)
        if not self._leases:
            self._disarm()
        await self._surely(self._call("release", lambda: self.cache.release(lease), None))

    async def aclose(self) -> None:
        self._leases.clear()
        self._disarm()
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
        await asyncio.gather(*self._ending, return_exceptions=True)
        if self.owned:
            await self._call("close", self.cache.close, None)

    def close(self) -> None:
        """Close the cache if it is owned; for a store that never ran on an event loop."""
        if self.owned:
            self.cache.close()


def _too_old(entry: CacheEntry | None, max_age: float | None) -> bool:
    return entry is not None and max_age is not None and time.time() - entry.created_at > max_age


def to_entry(job: Job, outcome: Outcome) -> CacheEntry:
    """Return the cache entry of a job and its outcome."""
    result = outcome.result
    # By the file rather than by its first frame, whose hash nobody knows.
    shown = job.request.videos or job.request.pictures
    return CacheEntry(
        result={**keys.result_to_json(result), "confidence": dict(outcome.confidence)},
        manifest=job.manifest or {},
        image_hash=shown[0].sha256 if shown else "",
        task=job.task,
        language=job.language,
        model=result.model,
        namespace=job.namespace,
        text=result.text,
        analysis=outcome.analysis,
        usage=dataclasses.asdict(result.usage),
        created_at=result.created_at or time.time(),
    )


def from_entry(entry: CacheEntry) -> Outcome | None:
    """Return the outcome stored in an entry; log a warning and return None if it cannot be parsed."""
    try:
        result = keys.result_from_json(entry.result)
    except CacheError as exc:
        log.warning("unreadable cached answer ignored", error=str(exc))
        return None
    return Outcome(result, entry.analysis, entry.result.get("confidence") or Confidence(), "cache")
