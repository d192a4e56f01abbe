"""The base class of caches, and the entry format that all of them store.

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
    """One finished answer with fields to query it by. It contains no picture bytes.

    `result` is the dictionary of `qvl.caches.key.result_to_json`; `analysis` the parsed analysis, if any; `manifest`
    the manifest whose hash is the key. Times are seconds since the epoch; `expires_at` None means never.
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
        """Return the entry of a JSON text written by `to_json`.

        Raises:
            CacheError: the text is not an entry, or of another version.
        """
        try:
            data = json.loads(text)
            if data.pop("v") != ENTRY_VERSION:
                raise CacheError("unsupported version of the cache entry")
            for name in SUMMARY:
                data.pop(name, None)
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise CacheError(f"the cache entry cannot be read: {exc}") from exc


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Statistics: `entries` and `size_bytes` of the store, and counters of this process since the cache was opened."""

    entries: int = 0
    size_bytes: int = 0
    hits: int = 0
    misses: int = 0
    writes: int = 0
    evictions: int = 0
    errors: int = 0


class Cache(ABC):
    """Stores finished answers by key. Synchronous, thread-safe, bounded.

    A subclass implements `get`, `set`, `delete`, `clear` and `stats`; optionally leases (by default they hold within
    this process) and `items`, for browsing. A store that fails raises CacheError, which the pipeline logs, counts and
    treats as a miss.
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
        """Return the entry, or None if it is missing or expired."""

    def peek(self, key: str) -> CacheEntry | None:
        """Return the entry if it is in memory and short, so that it takes no time; else None."""
        return self.get(key) if self.instant else None

    def lacks(self, key: str) -> bool:
        """True if the key is known to have no entry, without I/O; False if only `get` can tell."""
        return self.instant

    def reread(self, key: str) -> CacheEntry | None:
        """Return the entry as `get` does, but from the store itself, bypassing any cache in front of it."""
        return self.get(key)

    @abstractmethod
    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        """Store `entry` for `ttl` seconds (None: until evicted), replacing an existing one."""

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
        """Delete the entries that match all filters and are older than `older_than` seconds; return their number."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """Return the size of the store, and counters since it was opened."""

    def items(self) -> Iterator[tuple[str, CacheEntry]]:
        """Yield (key, unexpired entry), newest first. For browsing: it may be slow.

        Raises:
            CacheError: this cache cannot list its entries.
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
        """Return (key, unexpired entry) whose key begins with `prefix` and that match all filters, newest first.

        The default implementation reads all entries; a store with queries should override it.
        """
        fields = chosen({"language": language, "model": model, "namespace": namespace, "task": task})
        matching = ((key, entry) for key, entry in self.items() if key.startswith(prefix) and matches(entry, fields))
        return list(islice(matching, limit))

    def count_by(self, *fields: str) -> dict[str, dict[str, int]]:
        """Return {field: {value: number of unexpired entries}}, most frequent first; `fields` are some of COUNTED_BY.

        The default implementation reads all entries once; a store with queries should override it.
        """
        return count_entries((entry for _, entry in self.items()), fields)

    def lease(self, key: str, ttl: float) -> Lease | None:
        """Return the lease to compute `key`, valid for `ttl` seconds, or None while another holder has it.

        There is at most one holder at a time, over all processes that share the store if it has leases of its own. The
        lease of a holder that died expires; a holder that needs longer renews it.
        """
        return self._lease_table.lease(key, ttl)

    def renew(self, lease: Lease, ttl: float) -> bool:
        """Extend the lease to `ttl` seconds from now; False if it has another holder by now (by its token)."""
        return self._lease_table.renew(lease, ttl)

    def release(self, lease: Lease) -> None:
        """Release the lease, if it is still this holder's, and wake the callers of `wait`."""
        self._lease_table.release(lease)

    def wait(self, key: str, timeout: float) -> None:
        """Block until `key` may have an entry or its lease may be free, or shorter, at most `timeout` seconds."""
        if type(self).lease is Cache.lease:
            self._lease_table.wait(key, timeout)
        else:
            # A cache with leases of its own that cannot notify: its holders are not in the table.
            time.sleep(min(timeout, 0.05))

    def close(self) -> None:
        """Release files and connections. Calling it twice is harmless."""
        self._lease_table.clear()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def encoded(entry: CacheEntry) -> tuple[str, int]:
    """Return (`entry` as JSON text, its length in bytes of UTF-8).

    Raises:
        CacheError: something in the entry cannot be written as JSON or as UTF-8.
    """
    try:
        text = entry.to_json()
        return text, len(text.encode())
    except (TypeError, ValueError, RecursionError) as exc:
        raise CacheError(f"the cache entry cannot be written as JSON: {exc}") from exc


def count_entries(entries: Iterable[CacheEntry], fields: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the counts of `Cache.count_by` for `entries`."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in fields}
    for entry in entries:
        for name, counter in counts.items():
            counter[getattr(entry, name)] += 1
    return {name: dict(counter.most_common()) for name, counter in counts.items()}


def chosen(filters: Mapping[str, str | None]) -> dict[str, str]:
    """Return those filters of `Cache.clear` and `find` that are not None.

    Raises:
        TypeError: a filter is not in COUNTED_BY.
    """
    for name in filters:
        if name not in COUNTED_BY:
            raise TypeError(f"unknown filter {name!r}: not one of {', '.join(COUNTED_BY)}")
    return {name: value for name, value in filters.items() if value is not None}


def matches(entry: CacheEntry, fields: Mapping[str, str], *, older_than: float | None = None, now: float = 0.0) -> bool:
    """True if `entry` has these `fields` (see `chosen`) and is older than `older_than` seconds at time `now`."""
    if older_than is not None and entry.created_at >= now - older_than:
        return False
    return all(getattr(entry, name) == value for name, value in fields.items())


__all__ = ["Cache", "CacheEntry", "CacheStats", "Lease", "chosen", "count_entries", "encoded", "matches"]
