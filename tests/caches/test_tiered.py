"""A small cache in memory in front of a shared one: what it saves, and what it must not hide."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from qvl.caches.base import CacheEntry
from qvl.caches.memory import MemoryCache
from qvl.caches.redis import RedisCache, open_redis
from qvl.caches.tiered import TieredCache
from qvl.errors import CacheError
from qvl.pipeline.cache_store import Store
from qvl.testing.cache_contract import entry

from .redis_server import RedisServer

Serve = Callable[..., RedisServer]


def test_a_hot_key_costs_no_round_trip_and_outlives_the_server(redis_server: Serve) -> None:
    server = redis_server()
    with open_redis(server.url) as cache:
        cache.set("hot", entry())
        cache.get("hot")
        server.kill()
        for _ in range(100):
            assert cache.get("hot") == entry()
        with pytest.raises(CacheError):
            cache.set("new", entry(), ttl=60)
        found = cache.get("new")
        assert found is not None
        assert found.text == entry().text
        assert cache.stats().hits == 102


@pytest.mark.parametrize("change", ["set", "delete", "clear"])
def test_what_was_read_while_it_changed_does_not_stay_in_front(change: str) -> None:
    class Back(MemoryCache):
        """Answers with what was there when the question began."""

        def get(self, key: str) -> CacheEntry | None:
            found = super().get(key)
            if between:
                between.pop()()
            return found

    between: list[Callable[[], object]] = []
    old, new = entry(), replace(entry(), text="new")
    cache = TieredCache(Back())
    cache.set("k", old)
    changes = {"set": lambda: cache.set("k", new), "delete": lambda: cache.delete("k"), "clear": cache.clear}
    between.append(changes[change])
    assert cache.get("k") == old
    assert cache.get("k") == (new if change == "set" else None)


def test_what_another_process_cleared_leaves_the_front_with_its_time(redis_url: str) -> None:
    now = [1000.0]
    with RedisCache(redis_url) as back, RedisCache(redis_url) as elsewhere:
        cache = TieredCache(back, front_ttl=30, clock=lambda: now[0])
        cache.set("k", entry())
        assert cache.get("k") == entry()
        elsewhere.clear()
        assert cache.get("k") == entry()
        now[0] += 31
        assert cache.get("k") is None


@pytest.mark.parametrize("peeking", [True, False])
def test_who_wants_a_young_answer_gets_the_one_that_another_process_made_meanwhile(peeking: bool) -> None:
    back = MemoryCache()
    store = Store(TieredCache(back))

    def text(age: float | None) -> str | None:
        known, found = store.peek("k", max_age=age) if peeking else (False, None)
        found = found if known else store.get("k", max_age=age)
        return found and found.text

    back.set("k", entry(text="old", created_at=time.time() - 1000))
    assert text(None) == "old"
    back.set("k", entry(text="new", created_at=time.time()))
    assert text(None) == "old"
    assert text(500) == "new"
    assert (text(None), text(-1)) == ("new", None)
