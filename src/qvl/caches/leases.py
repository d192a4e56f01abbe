"""In-process leases, for caches whose store has none of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MAX_DEAD_LEASES: Final = 1024


@dataclass(slots=True)
class Lease:
    """The right to compute the answer of one key; `token` (a fencing token) grows with every holder.

    It avoids double work but does not protect the entry: `Cache.set` takes entries from any caller. The pipeline checks
    an expired lease before it stores an answer, and does not overwrite the answer of a later holder.
    """

    key: str
    token: int
    expires_at: float


class LeaseTable:
    """The leases of one cache by key, with the methods `lease`, `renew`, `release` and `wait` of `Cache`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Not the condition, whose own acquiring is Python code: Ctrl-C within it would leave the lock held for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._leases: dict[str, Lease] = {}
        self._token = 0

    def __len__(self) -> int:
        return len(self._leases)

    def lease(self, key: str, ttl: float) -> Lease | None:
        with self._lock:
            now = self._clock()
            current = self._leases.get(key)
            if current is not None and current.expires_at > now:
                return None
            if len(self._leases) >= MAX_DEAD_LEASES:
                self._leases = {k: lease for k, lease in self._leases.items() if lease.expires_at > now}
            self._token += 1
            self._leases[key] = Lease(key, self._token, now + ttl)
            return Lease(key, self._token, now + ttl)

    def renew(self, lease: Lease, ttl: float) -> bool:
        with self._lock:
            current = self._leases.get(lease.key)
            if current is None or current.token != lease.token:
                return False
            current.expires_at = self._clock() + ttl
            return True

    def release(self, lease: Lease) -> None:
        with self._lock:
            current = self._leases.get(lease.key)
            if current is not None and current.token == lease.token:
                del self._leases[lease.key]
                self._changed.notify_all()

    def wait(self, key: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._lock:
            while (current := self._leases.get(key)) is not None:
                seconds = min(deadline - time.monotonic(), current.expires_at - self._clock())
                if seconds <= 0:
                    return
                self._changed.wait(seconds)

    def clear(self) -> None:
        """Drop all leases and wake all waiting threads."""
        with self._lock:
            self._leases.clear()
            self._changed.notify_all()
