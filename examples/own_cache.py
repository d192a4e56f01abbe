"""A cache of your own: five methods. Leases come with `Cache`; `items` would let people browse it."""

import time
from dataclasses import replace

from qvl import Cache, CacheEntry, CacheStats
from qvl.caches.base import chosen, encoded, matches
from qvl.caches.counters import Tally


class DictCache(Cache):
    url = "dict:"

    def __init__(self, most: int = 1000) -> None:
        self.texts, self.tally, self.most = dict[str, str](), Tally(), most

    def get(self, key: str) -> CacheEntry | None:
        entry = self.live(key)
        self.tally.add("misses" if entry is None else "hits")
        return entry

    def live(self, key: str) -> CacheEntry | None:
        entry = CacheEntry.from_json(self.texts[key]) if key in self.texts else None
        return None if entry is None or entry.expired(time.time()) else entry

    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        self.texts[key], _ = encoded(replace(entry, expires_at=None if ttl is None else time.time() + ttl))
        self.tally.add("writes")
        for oldest in list(self.texts)[: -self.most]:
            self.texts.pop(oldest, None)

    def delete(self, key: str) -> bool:
        return self.live(key) is not None and self.texts.pop(key, None) is not None

    def clear(self, *, older_than: float | None = None, **filters: str | None) -> int:
        by, now, entries = chosen(filters), time.time(), [(key, self.live(key)) for key in list(self.texts)]
        return sum(self.delete(key) for key, e in entries if e and matches(e, by, older_than=older_than, now=now))

    def stats(self) -> CacheStats:
        texts = [text for key, text in list(self.texts.items()) if self.live(key)]
        return self.tally.stats(entries=len(texts), size_bytes=sum(map(len, texts)))
