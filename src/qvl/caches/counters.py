"""Thread-safe counters of a cache."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from qvl.caches.base import CacheStats

COUNTED: Final = ("hits", "misses", "writes", "evictions", "errors")


class Tally:
    """The counters of CacheStats since the cache was opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, number: int = 1) -> None:
        """Add `number` to the counter `name`, one of COUNTED."""
        with self._lock:
            self._counts[name] += number

    def stats(self, *, entries: int, size_bytes: int) -> CacheStats:
        with self._lock:
            return CacheStats(entries=entries, size_bytes=size_bytes, **{name: self._counts[name] for name in COUNTED})
