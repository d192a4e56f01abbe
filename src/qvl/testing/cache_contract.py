"""The contract of caches as a pytest suite; the author of a cache subclasses it and defines how to open one.

```python
from qvl.testing import CacheContract

class TestMyCache(CacheContract):
    @pytest.fixture
    def make_cache(self, tmp_path):
        return lambda: MyCache(tmp_path / "store")
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import ClassVar

import pytest

from qvl.caches.base import Cache, CacheEntry
from qvl.errors import CacheError
from qvl.testing.lease_contract import LeaseContract, entry, eventually, live_keys, stored, take_lease
from qvl.types import JsonObject


class CacheContract(LeaseContract):
    """The contract suite of caches.

    `make_cache` returns a function that opens the store of the running test, each call a handle of its own, on an
    empty store at first. `shared` is True if two handles see the same entries; and the same leases, unless the cache
    has those of `Cache`. Tests of browsing are left out for a cache without `items`.
    """

    shared: ClassVar[bool] = True

    @pytest.fixture
    def make_cache(self) -> Callable[[], Cache]:
        raise LookupError(f"{type(self).__name__} defines no make_cache fixture")

    @pytest.fixture
    def open_cache(self, make_cache: Callable[[], Cache]) -> Iterator[Callable[[], Cache]]:
        with ExitStack() as stack:
            yield lambda: stack.enter_context(make_cache())

    @pytest.fixture
    def cache(self, open_cache: Callable[[], Cache]) -> Cache:
        return open_cache()

    @pytest.fixture
    def second(self, open_cache: Callable[[], Cache]) -> Cache:
        if not self.shared:
            pytest.skip("handles of this cache share nothing")
        return open_cache()

    @pytest.fixture
    def second_holder(self, second: Cache) -> Cache:
        if type(second).lease is Cache.lease:
            pytest.skip("each handle of this cache has leases of its own")
        return second

    @pytest.fixture
    def listing(self, cache: Cache) -> Cache:
        if type(cache).items is Cache.items:
            pytest.skip("this cache does not list its entries")
        return cache

    # Entries

    def test_an_unknown_key_has_no_entry(self, cache: Cache) -> None:
        assert cache.get("sha256:nothing") is None

    def test_every_field_of_an_entry_comes_back(self, cache: Cache) -> None:
        cache.set("k", entry())
        assert cache.get("k") == entry()

    def test_a_bare_entry_comes_back(self, cache: Cache) -> None:
        bare = CacheEntry(result={}, created_at=1.0)
        cache.set("k", bare)
        assert cache.get("k") == bare

    def test_a_second_entry_replaces_the_first(self, cache: Cache) -> None:
        cache.set("k", entry(text="old", language="en"), ttl=3600)
        cache.set("k", entry(text="new"))
        stored_entry = cache.get("k")
        assert stored_entry == entry(text="new")
        assert stored_entry.expires_at is None
        assert cache.stats().entries == 1

    @pytest.mark.parametrize(
        "key", ["a b", "钥匙", "*", "a?[b]", "x" * 600, "'; DROP TABLE entries; --", "a:b:c", "{t}"]
    )
    def test_any_text_is_a_key(self, cache: Cache, key: str) -> None:
        cache.set(key, entry())
        cache.set("other", entry(text="other"))
        assert cache.get(key) == entry()
        assert live_keys(cache, key, "other") == {key, "other"}
        assert cache.delete(key)
        assert cache.get(key) is None
        assert cache.get("other") is not None

    def test_a_long_answer_comes_back_whole(self, cache: Cache) -> None:
        cache.set("k", entry(text="长" * 300_000))
        stored_entry = stored(cache, "k")
        assert stored_entry.text == "长" * 300_000

    def test_changing_what_was_stored_or_found_changes_nothing_in_the_store(self, cache: Cache) -> None:
        analysis = {"brand": "Acme"}
        cache.set("k", entry(analysis=analysis))
        analysis["brand"] = "Other"
        stored_entry = stored(cache, "k")
        assert stored_entry.analysis == {"brand": "Acme"}
        stored_entry.result["choices"].clear()
        again = stored(cache, "k")
        assert again.result == entry().result

    def test_what_is_no_json_is_refused_and_stores_nothing(self, cache: Cache) -> None:
        with pytest.raises(CacheError, match="JSON"):
            cache.set("k", entry(result={"picture": b"\xff\xd8"}))
        with pytest.raises(CacheError, match="JSON"):
            cache.set("k", entry(text="half a character: \ud83d"))
        assert cache.get("k") is None

    def test_delete_says_whether_there_was_something(self, cache: Cache) -> None:
        cache.set("k", entry())
        assert cache.delete("k")
        assert not cache.delete("k")
        assert cache.get("k") is None

    # Time to live

    def test_an_entry_ends_with_its_ttl(self, cache: Cache) -> None:
        cache.set("short", entry(), ttl=0.05)
        cache.set("long", entry(), ttl=3600)
        cache.set("forever", entry())
        eventually(lambda: cache.get("short") is None)
        assert live_keys(cache, "short", "long", "forever") == {"long", "forever"}
        assert cache.stats().entries == 2
        assert not cache.delete("short")
        assert cache.get("long") is not None

    def test_the_end_of_an_entry_is_written_in_it(self, cache: Cache) -> None:
        before = time.time()
        cache.set("k", entry(), ttl=3600)
        stored_entry = stored(cache, "k")
        assert stored_entry.expires_at is not None
        assert before + 3590 < stored_entry.expires_at < time.time() + 3610

    @pytest.mark.parametrize("ttl", [0, -1])
    def test_a_ttl_of_nothing_keeps_nothing(self, cache: Cache, ttl: float) -> None:
        cache.set("k", entry())
        cache.set("k", entry(), ttl=ttl)
        assert cache.get("k") is None
        assert cache.stats().entries == 0

    # Many entries

    def test_items_come_newest_first(self, listing: Cache) -> None:
        for age in (2, 0, 3, 1):
            listing.set(f"k{age}", entry(created_at=1_700_000_000.0 - age))
        assert [key for key, _ in listing.items()] == ["k0", "k1", "k2", "k3"]

    def test_find_chooses_by_the_start_of_the_key_and_by_fields(self, listing: Cache) -> None:
        for number in range(6):
            language = "en" if number % 2 else "zh"
            listing.set(f"sha-{number // 3}{number}", entry(language=language, created_at=1_700_000_000.0 + number))
        listing.set("other*", entry(model="m", created_at=1.0))
        listing.set("other[a]%_", entry(task="chat", namespace="n", created_at=2.0))
        listing.set("gone", entry(), ttl=0.01)
        eventually(lambda: listing.get("gone") is None)

        def keys(entries: list[tuple[str, CacheEntry]]) -> list[str]:
            return [key for key, _ in entries]

        assert keys(listing.find(prefix="sha-0")) == ["sha-02", "sha-01", "sha-00"]
        assert keys(listing.find(prefix="sha-", language="en", limit=2)) == ["sha-15", "sha-13"]
        assert keys(listing.find(prefix="other[")) == ["other[a]%_"]
        assert keys(listing.find(prefix="other*")) == ["other*"]
        assert keys(listing.find(prefix="sha-9")) == []
        assert (keys(listing.find(model="m")), keys(listing.find(task="chat", namespace="n"))) == (
            ["other*"],
            ["other[a]%_"],
        )
        assert len(keys(listing.find())) == 8
        assert listing.find(limit=1) == [("sha-15", entry(language="en", created_at=1_700_000_005.0))]

    def test_live_entries_are_counted_by_their_fields(self, listing: Cache) -> None:
        for number in range(5):
            listing.set(f"k{number}", entry(language="en" if number < 3 else "", model=f"m{number}"))
        listing.set("gone", entry(language="pt"), ttl=0.01)
        eventually(lambda: listing.get("gone") is None)
        counts = listing.count_by("language", "task", "model")
        assert counts["language"] == {"en": 3, "": 2}
        assert list(counts["language"]) == ["en", ""]
        assert counts["task"] == {"analyze": 5}
        assert counts["model"] == {f"m{number}": 1 for number in range(5)}
        assert listing.count_by() == {}

    def test_entries_may_be_deleted_while_they_are_listed(self, listing: Cache) -> None:
        for number in range(10):
            listing.set(f"k{number}", entry())
        for key, _ in listing.items():
            listing.delete(key)
        assert list(listing.items()) == []

    def test_clear_without_a_filter_deletes_all(self, cache: Cache) -> None:
        for number in range(30):
            cache.set(f"k{number}", entry(namespace=str(number % 3)))
        assert cache.clear() == 30
        assert cache.clear() == 0
        assert live_keys(cache, "k0", "k29") == set()
        stats = cache.stats()
        assert (stats.entries, stats.size_bytes) == (0, 0)

    @pytest.mark.parametrize("field", ["language", "model", "namespace", "task"])
    def test_clear_deletes_what_matches_one_field(self, cache: Cache, field: str) -> None:
        cache.set("a", entry(**{field: "mine"}))
        cache.set("b", entry(**{field: "mine"}))
        cache.set("c", entry(**{field: "theirs"}))
        cache.set("d", entry(**{field: ""}))
        mine: JsonObject = {field: "mine"}
        assert cache.clear(**mine) == 2
        assert live_keys(cache, "a", "b", "c", "d") == {"c", "d"}
        mine = {field: ""}
        assert cache.clear(**mine) == 1

    def test_clear_needs_every_filter_to_match(self, cache: Cache) -> None:
        cache.set("both", entry(language="en", model="m"))
        cache.set("one", entry(language="en", model="other"))
        assert cache.clear(language="en", model="m") == 1
        assert cache.get("both") is None
        assert cache.get("one") is not None

    def test_a_filter_that_is_none_is_refused_and_deletes_nothing(self, cache: Cache) -> None:
        cache.set("k", entry())
        for refuse in (cache.clear, cache.find):
            call: Callable[..., object] = refuse
            with pytest.raises(TypeError, match="brand"):
                call(brand="Acme")
        assert cache.get("k") == entry()

    def test_clear_by_age_spares_the_young(self, cache: Cache) -> None:
        cache.set("old", entry(created_at=time.time() - 7200))
        cache.set("young", entry(created_at=time.time() - 60))
        assert cache.clear(older_than=3600) == 1
        assert cache.get("old") is None
        assert cache.get("young") is not None

    def test_stats_count_calls_and_entries(self, cache: Cache) -> None:
        cache.set("a", entry())
        cache.set("b", entry())
        cache.get("a")
        cache.get("a")
        cache.get("nothing")
        stats = cache.stats()
        assert (stats.entries, stats.hits, stats.misses, stats.writes, stats.errors) == (2, 2, 1, 2, 0)
        assert stats.size_bytes > 2 * len(entry().text)

    # Threads and handles

    def test_threads_lose_nothing(self, cache: Cache) -> None:
        def work(thread: int) -> None:
            for number in range(25):
                cache.set(f"{thread}-{number}", entry(text=f"{thread}-{number}"))
                assert cache.get(f"{thread}-{number}") is not None

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        stats = cache.stats()
        assert (stats.entries, stats.hits, stats.writes) == (200, 200, 200)
        keys = {f"{thread}-{number}" for thread in range(8) for number in range(25)}
        assert live_keys(cache, *keys) == keys
        assert all((stored := cache.get(key)) is not None and stored.text == key for key in keys)

    def test_closing_twice_is_harmless(self, make_cache: Callable[[], Cache]) -> None:
        cache = make_cache()
        cache.set("k", entry())
        cache.close()
        cache.close()

    def test_a_second_handle_sees_the_entries(self, cache: Cache, second: Cache) -> None:
        cache.set("k", entry())
        assert second.get("k") == entry()
        cache.set("k", entry(text="new"))
        assert second.get("k") in (entry(), entry(text="new"))
        second.delete("k")
        assert second.get("k") is None

    def test_entries_outlive_the_handle(self, second: Cache, make_cache: Callable[[], Cache]) -> None:
        with make_cache() as first:
            first.set("k", entry())
        assert second.get("k") == entry()

    def test_a_second_handle_cannot_take_a_held_lease(self, cache: Cache, second_holder: Cache) -> None:
        lease = take_lease(cache, "k", 60)
        assert second_holder.lease("k", 60) is None
        cache.release(lease)
        taken = take_lease(second_holder, "k", 60)
        assert taken.token > lease.token

    def test_a_waiter_at_a_second_handle_is_woken(self, cache: Cache, second_holder: Cache) -> None:
        lease = take_lease(cache, "k", 600)

        def finish() -> None:
            cache.set("k", entry())
            cache.release(lease)

        self._waiter_is_woken_by(second_holder, finish)

    def test_the_url_names_the_store(self, cache: Cache) -> None:
        assert cache.url.partition(":")[0]
