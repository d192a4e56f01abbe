"""The seam every cache fits, and the one entry format they all keep.

Caches are synchronous and thread-safe; the pipeline calls them off the event loop. Entries are versioned JSON, so
that a person can read them with any tool and an old file is never unpickled.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from types import TracebackType
from typing import Final, Self

from qvl.caches.leases import Lease, LeaseTable
from qvl.errors import CacheError
from qvl.types import JsonMapping

ENTRY_VERSION: Final = 1
COUNTED_BY: Final = ("model", "language", "task", "namespace")

# Copies from the analysis that a store may put beside the entry's own fields, so that people can query them.
SUMMARY: Final = ("brand", "category", "attributes")


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One finished answer and what a person wants to query about it. Picture bytes are never in it.

    `result` is `qvl.caches.key.result_to_json`'s dictionary; `analysis` the parsed analysis, if there was one;
    `manifest` everything that went into the key. Times are seconds since the epoch; `expires_at` None means never.
    """

    result: JsonMapping
    manifest: JsonMapping = field(default_factory=dict)
    image_hash: str = ""
    task: str = "chat"
    language: str = ""
    model: str = ""
    namespace: str = ""
    text: str = ""
    analysis: JsonMapping | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    expires_at: float | None = None

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now

    def to_json(self) -> str:
        # Not asdict, which copies the whole tree first and takes longer than writing it.
        data = {"v": ENTRY_VERSION, **{item.name: getattr(self, item.name) for item in fields(self)}}
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> CacheEntry:
        """Reads what `to_json` wrote.

        Raises:
            CacheError: the text is not an entry, or one of another version.
        """
        try:
            data = json.loads(text)
            if data.pop("v") != ENTRY_VERSION:
                raise CacheError("the cache entry has another version")
            for name in SUMMARY:
                data.pop(name, None)
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise CacheError(f"the cache entry cannot be read: {exc}") from exc


@dataclass(frozen=True, slots=True)
class CacheStats:
    """`entries` and `size_bytes` are of the store; the rest counts this process's calls since it was opened."""

    entries: int = 0
    size_bytes: int = 0
    hits: int = 0
    misses: int = 0
    writes: int = 0
    evictions: int = 0
    errors: int = 0


class Cache(ABC):
    """Keeps finished answers under a key. Synchronous, thread-safe, bounded.

    `get`, `set`, `delete`, `clear` and `stats` make a cache. Leases hold within this process unless a cache has its
    own; one that can list its entries (`items`) can be browsed too. A store that fails raises CacheError; the pipeline
    logs it, counts it and goes on without.
    """

    url: str = ""
    # True if get() never waits for a disk, a network or another process, so that it needs no thread.
    instant: bool = False
    # True if get() may answer with a copy that is older than what the store has.
    layered: bool = False
    _lease_table: LeaseTable

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Not in __init__, which an author's own need not call; and past a __setattr__ that refuses, as of frozen ones.
        cache = super().__new__(cls)
        object.__setattr__(cache, "_lease_table", LeaseTable())
        return cache

    @abstractmethod
    def get(self, key: str) -> CacheEntry | None:
        """The entry, or None when there is none or it has expired."""

    def peek(self, key: str) -> CacheEntry | None:
        """The entry, where that takes no time: not a disk's, a network's, another process', nor that of a long text."""
        return self.get(key) if self.instant else None

    def lacks(self, key: str) -> bool:
        """True if `peek` finds nothing because there is nothing; False if that takes a `get` to tell."""
        return self.instant

    def reread(self, key: str) -> CacheEntry | None:
        """Return what `get` does, but from the store itself, past any copies in front of it."""
        return self.get(key)

    @abstractmethod
    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        """Stores `entry` for `ttl` seconds (None: until evicted), replacing what was there."""

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Delete the entry; True if there was one."""

    @abstractmethod
    def clear(
        self,
        *,
        language: str | None = None,
        model: str | None = None,
        namespace: str | None = None,
        task: str | None = None,
        older_than: float | None = None,
    ) -> int:
        """Deletes the entries that match every given filter (none: all) and returns their number.

        `older_than` is an age in seconds.
        """

    @abstractmethod
    def stats(self) -> CacheStats:
        """The size of the store, and what was counted since it was opened."""

    def items(self) -> Iterator[tuple[str, CacheEntry]]:
        """Live entries, newest first. For people and tools: it may be slow.

        Raises:
            CacheError: this cache cannot list what it keeps.
        """
        raise CacheError(f"{type(self).__name__} cannot list its entries", hint="look one up by its key")

    def find(
        self,
        *,
        prefix: str = "",
        language: str | None = None,
        model: str | None = None,
        namespace: str | None = None,
        task: str | None = None,
        limit: int | None = None,
    ) -> list[tuple[str, CacheEntry]]:
        """Live entries whose key begins with `prefix` and that match every given filter, newest first.

        This one reads all entries; a store that can choose by itself does better.
        """
        fields = chosen({"language": language, "model": model, "namespace": namespace, "task": task})
        matching = ((key, entry) for key, entry in self.items() if key.startswith(prefix) and matches(entry, fields))
        return list(islice(matching, limit))

    def count_by(self, *fields: str) -> dict[str, dict[str, int]]:
        """For each of `fields`, some of COUNTED_BY: how many live entries there are for each value; the most first.

        This one reads all entries, once; a store that can count by itself does better.
        """
        return count_entries((entry for _, entry in self.items()), fields)

    def lease(self, key: str, ttl: float) -> Lease | None:
        """The right to compute `key` for `ttl` seconds, or None while another holder has it.

        At most one holder at a time; over all processes that share the store, where it has leases of its own. A holder
        that dies loses it by time; one that needs longer renews it.
        """
        return self._lease_table.lease(key, ttl)

    def renew(self, lease: Lease, ttl: float) -> bool:
        """Makes the lease end `ttl` seconds from now; False when it is no longer this holder's (by its token)."""
        return self._lease_table.renew(lease, ttl)

    def release(self, lease: Lease) -> None:
        """Gives the lease back, if it is still this holder's, and wakes those who wait for it."""
        self._lease_table.release(lease)

    def wait(self, key: str, timeout: float) -> None:
        """Blocks until `key` may have an entry or its lease may be free, at most `timeout` seconds.

        Waking early is allowed.
        """
        if type(self).lease is Cache.lease:
            self._lease_table.wait(key, timeout)
        else:
            # A cache with leases of its own that cannot notify: its holders are not in the table.
            time.sleep(min(timeout, 0.05))

    def close(self) -> None:
        """Releases files and connections. Calling it twice is harmless."""
        self._lease_table.clear()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def encoded(entry: CacheEntry) -> tuple[str, int]:
    """`entry` as JSON text, and its length in bytes of UTF-8.

    Raises:
        CacheError: something in the entry cannot be written as JSON or as UTF-8.
    """
    try:
        text = entry.to_json()
        return text, len(text.encode())
    except (TypeError, ValueError, RecursionError) as exc:
        raise CacheError(f"the cache entry cannot be written as JSON: {exc}") from exc


def count_entries(entries: Iterable[CacheEntry], fields: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the counts of `Cache.count_by`, by looking at every entry."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in fields}
    for entry in entries:
        for name, counter in counts.items():
            counter[getattr(entry, name)] += 1
    return {name: dict(counter.most_common()) for name, counter in counts.items()}


def chosen(filters: Mapping[str, str | None]) -> dict[str, str]:
    """Those of `Cache.clear`'s and `find`'s filters that are given.

    Raises:
        TypeError: one that is not in COUNTED_BY.
    """
    for name in filters:
        if name not in COUNTED_BY:
            raise TypeError(f"unknown filter {name!r}: {', '.join(COUNTED_BY)}")
    return {name: value for name, value in filters.items() if value is not None}


def matches(entry: CacheEntry, fields: Mapping[str, str], *, older_than: float | None = None, now: float = 0.0) -> bool:
    """True if `entry` has these `fields` (see `chosen`), and older than that many seconds."""
    if older_than is not None and entry.created_at >= now - older_than:
        return False
    return all(getattr(entry, name) == value for name, value in fields.items())


__all__ = ["Cache", "CacheEntry", "CacheStats", "Lease", "chosen", "count_entries", "encoded", "matches"]
