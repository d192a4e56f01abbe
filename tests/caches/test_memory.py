"""What only the memory cache promises."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qvl.caches.base import CacheEntry
from qvl.caches.leases import MAX_DEAD_LEASES
from qvl.caches.memory import MemoryCache
from qvl.caches.tiered import TieredCache
from qvl.errors import CacheError, ConfigError
from qvl.pipeline.cache_store import Store
from qvl.testing.cache_contract import entry


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = MemoryCache(max_entries=3)
    for key in "abc":
        cache.set(key, entry())
    cache.get("a")
    cache.set("d", entry())
    assert {key for key, _ in cache.items()} == {"a", "c", "d"}
    assert cache.stats().evictions == 1


def test_bytes_are_bounded_too() -> None:
    cache = MemoryCache(max_bytes=20_000)
    for number in range(20):
        cache.set(f"k{number}", entry(text="x" * 3000))
    stats = cache.stats()
    assert stats.size_bytes <= 20_000
    assert stats.evictions == 20 - stats.entries > 0
    assert cache.get("k19") is not None


def test_expired_entries_go_before_live_ones() -> None:
    now = [0.0]
    cache = MemoryCache(max_entries=2, clock=lambda: now[0])
    cache.set("live", entry())
    cache.set("dead", entry(), ttl=1)
    now[0] = 2
    cache.set("new", entry())
    assert {key for key, _ in cache.items()} == {"live", "new"}
    assert cache.stats().evictions == 0


def test_an_entry_larger_than_the_cache_is_refused_and_evicts_nothing() -> None:
    cache = MemoryCache(max_bytes=5000)
    cache.set("small", entry())
    with pytest.raises(CacheError, match="raise max_bytes"):
        cache.set("big", entry(text="x" * 6000))
    assert cache.get("small") is not None
    assert cache.stats().errors == 1


def test_leases_that_nobody_gave_back_do_not_pile_up() -> None:
    now = [0.0]
    cache = MemoryCache(clock=lambda: now[0])
    for number in range(3 * MAX_DEAD_LEASES):
        now[0] += 1
        assert cache.lease(f"k{number}", 5) is not None
    assert len(cache._lease_table) <= MAX_DEAD_LEASES
    assert cache.lease(f"k{number}", 5) is None


@pytest.mark.parametrize("url", ["memory:", "memory://", "memory:?max_entries=10&max_bytes=64KiB"])
def test_urls_open_it(url: str) -> None:
    cache = MemoryCache.from_url(url)
    assert (cache.max_entries, cache.max_bytes) == ((10, 65_536) if "?" in url else (10_000, 256 * 2**20))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory:x", "write memory:"),
        ("memory:?max_entry=1", "max_bytes, max_entries"),
        ("memory:?max_entries=many", "whole number"),
        ("memory:?max_entries=0", "1 or more"),
    ],
)
def test_bad_urls_say_the_way_out(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MemoryCache.from_url(url)


@pytest.mark.parametrize("tiered", [True, False])
def test_a_large_entry_is_not_read_on_the_event_loop(tiered: bool) -> None:
    threads: list[int] = []

    class Watched(MemoryCache):
        def get(self, key: str) -> CacheEntry | None:
            threads.append(threading.get_ident())
            return super().get(key)

    async def main() -> None:
        hot = Watched()
        cache = TieredCache(MemoryCache(), front=hot) if tiered else hot
        store = Store(cache)
        for key, text in (("small", "x"), ("large", "x" * 200_000)):
            cache.set(key, entry(text=text))
            cache.get(key)
        for key, here in (("small", True), ("large", False)):
            threads.clear()
            _, found = await store.lease_or_entry(key, read=True)
            assert found == cache.get(key)
            assert (threads[0] == threading.get_ident()) is here

    asyncio.run(main())
