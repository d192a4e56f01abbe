"""A small cache in memory in front of a slower, shared one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from qvl.caches.base import Cache, CacheEntry, CacheStats, Lease
from qvl.caches.memory import MemoryCache
from qvl.errors import CacheError, ConfigError


class TieredCache(Cache):
    """Two-tier cache: a small one in memory in front of `back`, which grants the leases.

    An entry that another process deletes from `back` may still be a hit for `front_ttl` seconds. An entry that `back`
    fails to store is kept in front for that long, and the error is raised too.

    Args:
        back: the shared cache; closed with this one.
        front: the cache in memory; by default 1,024 entries and 32 MiB.
        front_ttl: seconds an entry stays in front.
        clock: seconds since the epoch.
    """

    layered = True

    def __init__(
        self,
        back: Cache,
        *,
        front: MemoryCache | None = None,
        front_ttl: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if front_ttl <= 0:
            raise ConfigError(f"invalid front_ttl={front_ttl!r}", hint="a number of seconds above 0, or front=0")
        self.back = back
        self.front = MemoryCache(1024, 32 * 2**20, clock=clock) if front is None else front
        self.front_ttl = front_ttl
        self.url = back.url
        self._clock = clock
        self._changing = threading.Lock()
        self._changes = 0

    def get(self, key: str) -> CacheEntry | None:
        entry = self.front.get(key)
        return self.reread(key) if entry is None else entry

    def reread(self, key: str) -> CacheEntry | None:
        before = self._changes
        if (entry := self.back.get(key)) is not None:
            with self._changing:
                # What was read while something changed may be what was there before.
                if before == self._changes:
                    self._keep(key, entry)
        return entry

    def peek(self, key: str) -> CacheEntry | None:
        return self.front.peek(key)

    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        try:
            self.back.set(key, entry, ttl=ttl)
        except CacheError:
            self._forget(key)
            self._keep(key, replace(entry, expires_at=None if ttl is None else self._clock() + ttl))
            raise
        self._forget(key)

    def delete(self, key: str) -> bool:
        try:
            return self.back.delete(key)
        finally:
            self._forget(key)

    def clear(self, *, older_than: float | None = None, **filters: str | None) -> int:
        try:
            return self.back.clear(older_than=older_than, **filters)
        finally:
            with self._changing:
                self._changes += 1
                self.front.clear(older_than=older_than, **filters)

    def items(self) -> Iterator[tuple[str, CacheEntry]]:
        return self.back.items()

    def find(
        self, *, prefix: str = "", limit: int | None = None, **filters: str | None
    ) -> list[tuple[str, CacheEntry]]:
        return self.back.find(prefix=prefix, limit=limit, **filters)

    def count_by(self, *fields: str) -> dict[str, dict[str, int]]:
        return self.back.count_by(*fields)

    def stats(self) -> CacheStats:
        """Return the statistics of `back`, with the hits in front added."""
        stats = self.back.stats()
        return replace(stats, hits=stats.hits + self.front.stats().hits)

    def lease(self, key: str, ttl: float) -> Lease | None:
        return self.back.lease(key, ttl)

    def renew(self, lease: Lease, ttl: float) -> bool:
        return self.back.renew(lease, ttl)

    def release(self, lease: Lease) -> None:
        self.back.release(lease)

    def wait(self, key: str, timeout: float) -> None:
        self.back.wait(key, timeout)

    def close(self) -> None:
        self.front.close()
        self.back.close()

    def _forget(self, key: str) -> None:
        with self._changing:
            self._changes += 1
            self.front.delete(key)

    def _keep(self, key: str, entry: CacheEntry) -> None:
        seconds = self.front_ttl if entry.expires_at is None else min(self.front_ttl, entry.expires_at - self._clock())
        # Too large for the front is not a failure of the cache.
        with suppress(CacheError):
            self.front.keep(key, entry, seconds)


__all__ = ["TieredCache"]
