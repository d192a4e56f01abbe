"""Leases while the work goes on: kept by a heartbeat, let go of at the end, lost without harm."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from qvl import AsyncPipeline
from qvl.caches.base import Lease
from qvl.caches.memory import MemoryCache
from qvl.caches.sqlite import SqliteCache
from qvl.errors import CacheError
from qvl.pipeline.cache_store import Store

from .conftest import TalkingBackend


def pipeline(backend: TalkingBackend, cache: MemoryCache | SqliteCache, lease: float) -> AsyncPipeline:
    pipe = AsyncPipeline(backend=backend, cache=cache)
    assert pipe.executor.store is not None
    pipe.executor.store.lease_seconds = lease
    return pipe


def test_who_works_longer_than_the_lease_keeps_it(picture: Image.Image, tmp_path: Path) -> None:
    async def main() -> None:
        backend = TalkingBackend()
        backend.gate = asyncio.Event()
        with SqliteCache(tmp_path / "a.db") as one, SqliteCache(tmp_path / "a.db") as two:
            async with pipeline(backend, one, 2.4) as first, pipeline(backend, two, 2.4) as second:
                asked = [asyncio.create_task(first.ask(picture, "q"))]
                while not backend.running:
                    await asyncio.sleep(0.001)
                asked.append(asyncio.create_task(second.ask(picture, "q")))
                await asyncio.sleep(3.6)
                assert len(backend.requests) == 1
                backend.gate.set()
                assert [(await task).cache for task in asked] == ["miss", "hit"]
                assert first.executor.store is not None
                assert (first.executor.store._leases, first.executor.store._beat) == ({}, None)

    asyncio.run(main())


class Forgetful(MemoryCache):
    """Loses every lease as soon as it is granted, as a store that was emptied."""

    enough = 1

    def __init__(self) -> None:
        super().__init__()
        self.renewals = 0

    def renew(self, lease: Lease, ttl: float) -> bool:
        self.renewals += 1
        self.release(lease)
        return False


def test_an_answer_whose_lease_was_lost_is_an_answer(picture: Image.Image) -> None:
    async def main() -> None:
        backend, cache = TalkingBackend(), Forgetful()
        backend.gate = asyncio.Event()
        async with pipeline(backend, cache, 0.03) as pipe:
            asked = asyncio.create_task(pipe.ask(picture, "q"))
            while not cache.renewals:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            backend.gate.set()
            assert (await asked).text == "1:q"
            # What is lost is not asked for again and again.
            assert cache.renewals == 1
            assert (await pipe.ask(picture, "q")).cache == "hit"

    asyncio.run(main())


class Unreachable(Forgetful):
    """Loses leases, and cannot say so."""

    # So many beats are longer than a lease.
    enough = 5

    def renew(self, lease: Lease, ttl: float) -> bool:
        super().renew(lease, ttl)
        raise CacheError("away")


@pytest.mark.parametrize("kind", [Forgetful, Unreachable])
def test_who_lost_its_lease_does_not_replace_the_answer_that_came_meanwhile(
    kind: type[Forgetful], picture: Image.Image
) -> None:
    async def main() -> None:
        cache = kind()
        late, next_one = (TalkingBackend(reply=lambda request, word=word: word) for word in ("late", "next"))
        late.gate = asyncio.Event()
        async with pipeline(late, cache, 0.05) as first, pipeline(next_one, cache, 20) as second:
            asked = asyncio.create_task(first.ask(picture, "q"))
            while cache.renewals < cache.enough:
                await asyncio.sleep(0.001)
            assert (await second.ask(picture, "q", cache="refresh")).text == "next"
            late.gate.set()
            assert (await asked).text == "late"
            assert (await first.ask(picture, "q")).text == "next"
            # What was there before is replaced.
            assert (await first.ask(picture, "q", cache="refresh")).text == "late"
            assert (await second.ask(picture, "q")).text == "late"

    asyncio.run(asyncio.wait_for(main(), 60))


class Slow(MemoryCache):
    """Renews slowly, and can fail in a way that no cache should."""

    broken = False
    renewals = 0

    def renew(self, lease: Lease, ttl: float) -> bool:
        self.renewals += 1
        time.sleep(0.2)
        if self.broken:
            raise RuntimeError("a bug")
        return super().renew(lease, ttl)


def test_one_heartbeat_whatever_comes_and_goes_meanwhile() -> None:
    async def main() -> None:
        cache = Slow()
        store = Store(cache, lease_seconds=0.9)
        for number in range(4):
            lease = await store._lease(f"{number}")
            assert lease is not None
            await asyncio.sleep(0.4)
            # The beat of this one is under way when the next one begins.
            await store.release(lease)
        cache.renewals = 0
        began = time.monotonic()
        await store._lease("last")
        await asyncio.sleep(1.3)
        # A beat of 0.3 s and its renewal of 0.2 s; two heartbeats would have twice as many.
        assert cache.renewals <= 1 + (time.monotonic() - began) / 0.5
        await store.aclose()

    asyncio.run(main())


def test_a_heartbeat_that_failed_beats_again() -> None:
    async def main() -> None:
        cache = Slow()
        cache.broken = True
        store = Store(cache, lease_seconds=0.3)
        await store._lease("a")
        while cache.renewals < 3:
            await asyncio.sleep(0.01)
        await store.aclose()
        assert store._beat is None

    asyncio.run(asyncio.wait_for(main(), 60))


class Meeting(MemoryCache):
    """Renews leases only together."""

    def __init__(self) -> None:
        super().__init__()
        self.together = threading.Barrier(4)
        self.met = 0

    def renew(self, lease: Lease, ttl: float) -> bool:
        self.together.wait(20)
        self.met += 1
        return super().renew(lease, ttl)


def test_no_lease_waits_for_the_renewal_of_another() -> None:
    async def main() -> None:
        cache = Meeting()
        store = Store(cache, lease_seconds=0.3)
        for number in range(4):
            await store._lease(f"{number}")
        while cache.met < 4 and not cache.together.broken:
            await asyncio.sleep(0.01)
        cache.together.abort()
        await store.aclose()
        assert cache.met >= 4

    asyncio.run(asyncio.wait_for(main(), 60))


class Waiting(MemoryCache):
    """Grants and takes back leases when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.granted = threading.Event()

    def lease(self, key: str, ttl: float) -> Lease | None:
        self.asked.release()
        assert self.go_on.acquire(timeout=30)
        lease = super().lease(key, ttl)
        self.granted.set()
        return lease

    def release(self, lease: Lease) -> None:
        self.asked.release()
        assert self.go_on.acquire(timeout=30)
        super().release(lease)


@pytest.mark.parametrize("steps", [0, 1])
def test_who_is_cancelled_again_and_again_leaves_no_lease_behind(steps: int) -> None:
    """While it is granted, or while it is given back."""

    async def main() -> None:
        cache = Waiting()
        store = Store(cache, lease_seconds=60, owned=False)
        asking = asyncio.create_task(store.lease_or_entry("k", read=True))
        for step in range(3):
            if step <= steps:
                await asyncio.to_thread(cache.asked.acquire)
            asking.cancel()
            await asyncio.wait((asking,), timeout=0.02)
            if step < steps:
                cache.go_on.release()
        assert asking.cancelled()
        cache.go_on.release(3)
        await asyncio.to_thread(cache.granted.wait)
        await store.aclose()
        assert await asyncio.to_thread(cache.lease, "k", 60) is not None

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("ends", ["answer", "leave"])
def test_no_heartbeat_outlives_its_work(picture: Image.Image, ends: str) -> None:
    async def main() -> None:
        backend = TalkingBackend()
        backend.gate = asyncio.Event()
        async with pipeline(backend, MemoryCache(), 60) as pipe:
            asked = asyncio.create_task(pipe.ask(picture, "q"))
            while not backend.running:
                await asyncio.sleep(0.001)
            assert pipe.executor.store is not None
            assert len(pipe.executor.store._leases) == 1
            asked.cancel() if ends == "leave" else backend.gate.set()
            await asyncio.gather(asked, return_exceptions=True)
            assert (pipe.executor.store._leases, pipe.executor.store._beat) == ({}, None)

    asyncio.run(main())
