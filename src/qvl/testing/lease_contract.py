"""The part of the cache contract about leases and waiting; `CacheContract` includes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from qvl.caches.base import Cache, CacheEntry, Lease
from qvl.types import JsonObject

PATIENCE: Final = 30.0


def entry(**changes: object) -> CacheEntry:
    """Return a full entry as `analyze` makes it, with `changes`."""
    fields: JsonObject = {
        "result": {"choices": [{"index": 0, "text": "一双红色的鞋 👟", "finish_reason": "stop"}], "model": "tiny"},
        "manifest": {"pictures": [{"sha256": "ab" * 32, "role": "user"}], "sampling": {"temperature": 0.0}},
        "image_hash": "sha256:" + "ab" * 32,
        "task": "analyze",
        "language": "zh",
        "model": "tiny",
        "namespace": "shop",
        "text": "一双红色的鞋 👟",
        "analysis": {"brand": "Acme", "category": "shoe", "attributes": {"colour": "red"}, "confidence": None},
        "usage": {"prompt_tokens": 30, "completion_tokens": 12, "image_tokens": 16},
        "created_at": 1_700_000_000.25,
    }
    return CacheEntry(**{**fields, **changes})


def eventually(promise: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until `promise()` is true; fail the test if it is not within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not promise():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def live_keys(cache: Cache, *keys: str) -> set[str]:
    """Return those of `keys` that have an entry; a cache that lists its entries must list these and no others."""
    live = {key for key in keys if cache.get(key) is not None}
    if type(cache).items is not Cache.items:
        assert {key for key, _ in cache.items()} == live
    return live


def take_lease(cache: Cache, key: str, seconds: float) -> Lease:
    """Return the lease of `key`, which must be free."""
    lease = cache.lease(key, seconds)
    assert lease is not None
    return lease


def stored(cache: Cache, key: str) -> CacheEntry:
    """Return the entry of `key`, which must exist."""
    entry = cache.get(key)
    assert entry is not None
    return entry


def lease_when_free(cache: Cache, key: str) -> Lease:
    """Return the lease of `key` as soon as it expires."""
    deadline = time.monotonic() + PATIENCE
    while (lease := cache.lease(key, 60)) is None:
        assert time.monotonic() < deadline, "the lease never ended"
        time.sleep(0.005)
    return lease


class LeaseContract:
    """One suite for the leases of all caches; `cache` is a fixture of `CacheContract`."""

    def test_a_lease_has_one_holder(self, cache: Cache) -> None:
        lease = take_lease(cache, "k", 60)
        assert lease.key == "k"
        assert cache.lease("k", 60) is None
        assert cache.lease("other", 60) is not None

    def test_a_released_lease_can_be_had_with_a_greater_token(self, cache: Cache) -> None:
        first = take_lease(cache, "k", 60)
        cache.release(first)
        second = take_lease(cache, "k", 60)
        assert second.token > first.token

    def test_a_lease_ends_by_time(self, cache: Cache) -> None:
        first = take_lease(cache, "k", 0.05)
        taken = lease_when_free(cache, "k")
        assert taken.token > first.token

    def test_a_late_holder_does_not_release_the_next_ones_lease(self, cache: Cache) -> None:
        late = take_lease(cache, "k", 0.02)
        taken = lease_when_free(cache, "k")
        cache.release(late)
        assert cache.lease("k", 60) is None
        cache.release(taken)
        cache.release(taken)
        assert cache.lease("k", 60) is not None

    def test_a_renewed_lease_outlives_its_first_time(self, cache: Cache) -> None:
        lease = take_lease(cache, "k", 1.5)
        assert cache.renew(lease, 60)
        over = time.monotonic() + 1.6
        eventually(lambda: time.monotonic() > over)
        assert cache.lease("k", 60) is None
        cache.release(lease)
        assert cache.lease("k", 60) is not None

    def test_a_lease_can_be_renewed_to_end_sooner(self, cache: Cache) -> None:
        lease = take_lease(cache, "k", 600)
        assert cache.renew(lease, 0.05)
        assert lease_when_free(cache, "k").token > lease.token

    def test_a_lease_that_is_lost_cannot_be_renewed(self, cache: Cache) -> None:
        late = take_lease(cache, "k", 0.02)
        taken = lease_when_free(cache, "k")
        assert not cache.renew(late, 60)
        assert cache.renew(taken, 60)
        cache.release(taken)
        assert not cache.renew(taken, 60)
        assert cache.lease("k", 60) is not None

    def test_a_lease_is_no_entry(self, cache: Cache) -> None:
        lease = take_lease(cache, "k", 60)
        assert live_keys(cache, "k") == set()
        assert cache.stats().entries == 0
        cache.set("k", entry())
        assert cache.get("k") == entry()
        assert cache.clear() == 1
        assert cache.lease("k", 60) is None
        cache.release(lease)

    def test_of_many_threads_one_gets_the_lease(self, cache: Cache) -> None:
        start = threading.Barrier(12)

        def race(_: int) -> bool:
            start.wait(PATIENCE)
            return cache.lease("k", 60) is not None

        with ThreadPoolExecutor(12) as pool:
            assert sum(pool.map(race, range(12))) == 1

    # Waiting

    def test_waiting_for_a_free_key_ends_at_once(self, cache: Cache) -> None:
        cache.wait("k", PATIENCE)
        cache.set("k", entry())
        cache.wait("k", PATIENCE)

    def test_waiting_ends_with_its_timeout(self, cache: Cache) -> None:
        assert cache.lease("k", 600) is not None
        cache.wait("k", 0.02)

    def test_waiting_ends_when_the_lease_is_released(self, cache: Cache) -> None:
        lease = take_lease(cache, "k", 600)
        self._waiter_is_woken_by(cache, lambda: cache.release(lease))

    def test_waiting_ends_when_the_lease_runs_out(self, cache: Cache) -> None:
        assert cache.lease("k", 0.05) is not None
        self._waiter_is_woken_by(cache, lambda: None)

    def test_a_waiter_sees_what_the_holder_stored(self, cache: Cache) -> None:
        lease = take_lease(cache, "k", 600)

        def finish() -> None:
            cache.set("k", entry())
            cache.release(lease)

        self._waiter_is_woken_by(cache, finish)
        assert cache.get("k") == entry()

    def test_a_release_in_the_moment_of_falling_asleep_is_not_missed(self, cache: Cache) -> None:
        with ThreadPoolExecutor(1) as pool:
            for number in range(60):
                lease = take_lease(cache, f"k{number}", 600)
                waiter = pool.submit(cache.wait, lease.key, 4 * PATIENCE)
                # Steps through the waiter's own few calls, so that some release falls between its look and its sleep.
                time.sleep(number * 0.00003)
                cache.release(lease)
                waiter.result(PATIENCE)

    def _waiter_is_woken_by(self, cache: Cache, act: Callable[[], None]) -> None:
        def free() -> bool:
            if cache.get("k") is not None:
                return True
            got = cache.lease("k", 60)
            if got is not None:
                cache.release(got)
            return got is not None

        def wait() -> bool:
            deadline = time.monotonic() + PATIENCE
            while not free() and time.monotonic() < deadline:
                cache.wait("k", PATIENCE)
            return time.monotonic() < deadline

        with ThreadPoolExecutor(4) as pool:
            waiters = [pool.submit(wait) for _ in range(4)]
            act()
            assert all(waiter.result(2 * PATIENCE) for waiter in waiters)
