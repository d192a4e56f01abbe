"""Caches of others that were written with leases of their own, as every cache once had to be."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from qvl import Pipeline
from qvl.caches.base import Cache, CacheEntry, CacheStats, Lease
from qvl.errors import CacheError
from tests.pipeline.conftest import TalkingBackend


@dataclass(frozen=True)
class OwnLeases(Cache):
    """Has leases, which another process holds for the first `busy` times, and no way to tell of their end."""

    busy: int = 0
    tries: list[str] = field(default_factory=list)
    entries: dict[str, CacheEntry] = field(default_factory=dict)
    # A name that the base must leave to its heirs.
    _leases: None = None

    def get(self, key: str) -> CacheEntry | None:
        return self.entries.get(key)

    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        self.entries[key] = entry

    def delete(self, key: str) -> bool:
        return self.entries.pop(key, None) is not None

    def clear(self, **filters: Any) -> int:
        return 0

    def stats(self) -> CacheStats:
        return CacheStats()

    def lease(self, key: str, ttl: float) -> Lease | None:
        self.tries.append(key)
        return None if len(self.tries) <= self.busy else Lease(key, 1, time.time() + ttl)

    def renew(self, lease: Lease, ttl: float) -> bool:
        return True

    def release(self, lease: Lease) -> None:
        return


class BrokenReads(OwnLeases):
    """Reads fail, while leases and writes go well, as with a store whose disk is half broken."""

    def get(self, key: str) -> CacheEntry | None:
        raise CacheError("cannot be read")


def test_who_waits_for_a_lease_of_another_kind_does_not_ask_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("qvl.caches.base.time.sleep", pauses.append)
    cache = OwnLeases(busy=3)
    with Pipeline(backend=TalkingBackend(), cache=cache) as pipe:
        assert pipe.chat([{"role": "user", "content": "hi"}]).cache == "miss"
    cache.close()
    assert len(cache.tries) == 4
    assert pauses == [0.05] * 3


def test_reads_that_fail_are_one_outage_although_the_rest_goes_well() -> None:
    with Pipeline(backend=TalkingBackend(), cache=BrokenReads()) as pipe:
        for number in range(3):
            assert pipe.chat([{"role": "user", "content": f"hi {number}"}]).cache == "miss"
        assert pipe.stats()["cache_failures"] == 6
        assert pipe.pipeline.executor.store is not None
        assert pipe.pipeline.executor.store._failing == {"read"}
