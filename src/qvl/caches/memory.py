"""A cache in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from qvl.caches.base import Cache, CacheEntry, CacheStats, chosen, encoded, matches
from qvl.caches.counters import Tally
from qvl.caches.leases import LeaseTable
from qvl.caches.urls import count, read_options, size
from qvl.errors import CacheError, ConfigError

# Reading the JSON of a larger entry takes milliseconds, which an event loop does not have.
MAX_PEEK: Final = 128 * 2**10


@dataclass(frozen=True, slots=True)
class _Slot:
    text: str
    size: int
    expires_at: float | None


class MemoryCache(Cache):
    """LRU cache of entries as JSON text, so that changes to an entry that `get` returned do not affect it.

    Args:
        max_entries: most entries; the least recently used is evicted first.
        max_bytes: most bytes of keys and JSON.
        clock: seconds since the epoch.
    """

    instant = True

    url = "memory:"

    def __init__(
        self, max_entries: int = 10_000, max_bytes: int = 256 * 2**20, *, clock: Callable[[], float] = time.time
    ) -> None:
        if max_entries < 1 or max_bytes < 1:
            raise ConfigError("invalid limits of a memory cache", hint="max_entries and max_bytes are 1 or more")
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.RLock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._lease_table = LeaseTable(clock)
        self._bytes = 0
        self._tally = Tally()

    @classmethod
    def from_url(cls, url: str, **options: object) -> MemoryCache:
        """Return the cache of a URL: `memory:`, `memory://` or `memory:?max_entries=100&max_bytes=64MiB`."""
        path, _, query = url.partition("?")
        if path.rstrip("/") != "memory:":
            raise ConfigError(f"invalid memory cache URL {url!r}", hint="write memory:")
        known = {"max_entries": count, "max_bytes": size}
        return cls(**read_options("memory", query, options, known, passed=("clock",)))

    def get(self, key: str) -> CacheEntry | None:
        with self._lock:
            slot = self._slots.get(key)
            if slot is None or self._expired(slot):
                self._tally.add("misses")
                return None
            self._slots.move_to_end(key)
            self._tally.add("hits")
        return CacheEntry.from_json(slot.text)

    def peek(self, key: str) -> CacheEntry | None:
        slot = self._slots.get(key)
        return None if slot is not None and slot.size > MAX_PEEK else super().peek(key)

    def lacks(self, key: str) -> bool:
        return super().lacks(key) and key not in self._slots

    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        self.keep(key, replace(entry, expires_at=None if ttl is None else self._clock() + ttl), ttl)

    def keep(self, key: str, entry: CacheEntry, ttl: float | None) -> None:
        """Store `entry` for `ttl` seconds (None: until evicted) without a change of its own `expires_at`."""
        expires_at = None if ttl is None else self._clock() + ttl
        try:
            text, length = encoded(entry)
            if (length := length + len(key)) > self.max_bytes:
                raise CacheError(f"an entry of {length} bytes is larger than the cache", hint="raise max_bytes")
        except CacheError:
            self._tally.add("errors")
            raise
        with self._lock:
            self._drop(key)
            if ttl is None or ttl > 0:
                self._slots[key] = _Slot(text, length, expires_at)
                self._bytes += length
                self._make_room()
            self._tally.add("writes")

    def delete(self, key: str) -> bool:
        with self._lock:
            slot = self._drop(key)
            return slot is not None and not self._expired(slot)

    def clear(self, *, older_than: float | None = None, **filters: str | None) -> int:
        chosen_by, now = chosen(filters), self._clock()
        keys = [key for key, entry in self.items() if matches(entry, chosen_by, older_than=older_than, now=now)]
        return sum(self.delete(key) for key in keys)

    def items(self) -> Iterator[tuple[str, CacheEntry]]:
        with self._lock:
            live = [(key, slot.text) for key, slot in self._slots.items() if not self._expired(slot)]
        entries = [(key, CacheEntry.from_json(text)) for key, text in reversed(live)]
        yield from sorted(entries, key=lambda item: item[1].created_at, reverse=True)

    def stats(self) -> CacheStats:
        with self._lock:
            self._drop_expired()
            return self._tally.stats(entries=len(self._slots), size_bytes=self._bytes)

    def close(self) -> None:
        super().close()
        with self._lock:
            self._slots.clear()
            self._bytes = 0

    def _expired(self, slot: _Slot) -> bool:
        return slot.expires_at is not None and slot.expires_at <= self._clock()

    def _drop(self, key: str) -> _Slot | None:
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._bytes -= slot.size
        return slot

    def _drop_expired(self) -> None:
        for key in [key for key, slot in self._slots.items() if self._expired(slot)]:
            self._drop(key)

    def _make_room(self) -> None:
        if not self._crowded():
            return
        self._drop_expired()
        while self._crowded():
            self._drop(next(iter(self._slots)))
            self._tally.add("evictions")

    def _crowded(self) -> bool:
        return len(self._slots) > self.max_entries or self._bytes > self.max_bytes


__all__ = ["MemoryCache"]
