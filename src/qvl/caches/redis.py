"""A cache in Redis, shared by any number of machines."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import Any, Final

from qvl.caches.base import SUMMARY, Cache, CacheEntry, CacheStats, Lease, chosen, count_entries, encoded, matches
from qvl.caches.circuit_breaker import Circuit
from qvl.caches.counters import Tally
from qvl.caches.redis_url import RedisAddress, import_redis
from qvl.caches.tiered import TieredCache
from qvl.errors import CacheError, ConfigError
from qvl.log import logger

_log = logger("qvl.caches")

BATCH: Final = 200
SLOW_WALK: Final = 0.05

# Deletes the lease only while it is still the asker's, and tells those who wait for it.
RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('PUBLISH', ARGV[2], 'released')
  return 1
end
return 0
"""

# Keeps the lease alive only while it is still the asker's.
RENEW: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
"""

# What a server says that answers, but takes no writes.
_UNWRITABLE: Final = ("READONLY", "READ ONLY", "MAXMEMORY", "MISCONF", "NOREPLICAS")


class RedisCache(Cache):
    """Stores each entry as a JSON value under `<prefix>entry:KEY`; Redis itself expires entries and bounds the size.

    Connections are made on first use. An unreachable server raises CacheError quickly and opens a circuit breaker for a
    quarter of a second, doubling up to `rest` seconds, until a probe succeeds. A server that only refuses writes
    (read-only, out of memory) is still read.

    Args:
        url: `redis://`, `rediss://`, `unix://`, `redis+sentinel://a:26379,b:26379/service/0`, `redis+cluster://`.
        clock: seconds since the epoch.
        options: those of the URL by name: prefix ("qvl:"), connect_timeout (0.5), socket_timeout (0.5), rest (15),
            max_connections (64), username, password, db, ssl_ca_certs and the like; see `redis_url.OPTIONS`.

    Raises:
        ConfigError: a URL or option that cannot work.
        MissingDependencyError: the package redis is not installed.
    """

    def __init__(
        self, url: str = "redis://localhost:6379/0", *, clock: Callable[[], float] = time.time, **options: object
    ) -> None:
        self._address = RedisAddress.parse(url, options)
        self._redis = import_redis()
        # Some of the package's exceptions are no RedisError; UnicodeError is what a key that is no UTF-8 ends in.
        kinds = [kind for kind in vars(self._redis.exceptions).values() if isinstance(kind, type)]
        self._foreign: tuple[type[Exception], ...] = (
            *(kind for kind in kinds if issubclass(kind, Exception)),
            OSError,
            UnicodeError,
        )
        away = ("AuthenticationError", "ClusterDownError", "MasterDownError")
        self._away = tuple(getattr(self._redis.exceptions, name) for name in away)
        own = self._address.own
        self.url = self._address.shown
        self.prefix: str = own.get("prefix", "qvl:")
        rest = own.get("rest", 15.0)
        if not self.prefix:
            raise ConfigError("the Redis cache's prefix is empty", hint="leave prefix out for 'qvl:'", param="prefix")
        if rest <= 0:
            raise ConfigError(f"the Redis cache's rest={rest:g} is out of range", hint="seconds above 0", param="rest")
        self._clock = clock
        self._client: Any = None
        self._connecting = Lock()
        self._line = Circuit(longest_rest=rest)
        self._writing = Circuit(longest_rest=rest)
        self._tally = Tally()
        self._walk: tuple[float, int, int] = (0.0, 0, 0)

    @classmethod
    def from_url(cls, url: str, *, clock: Callable[[], float] = time.time, **options: object) -> RedisCache:
        return cls(url, clock=clock, **options)

    def get(self, key: str) -> CacheEntry | None:
        with self._asking() as client:
            try:
                text = client.get(self._entry(key))
            except self._redis.ResponseError as exc:
                if not str(exc).startswith("WRONGTYPE"):
                    raise
                self._unreadable(key, str(exc))
                text = None
        entry = None
        if text is not None:
            try:
                entry = CacheEntry.from_json(text)
            except CacheError as exc:
                self._unreadable(key, str(exc))
        self._tally.add("misses" if entry is None else "hits")
        return entry

    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        if ttl is not None and ttl <= 0:
            self.delete(key)
            return
        try:
            value = _value(replace(entry, expires_at=None if ttl is None else self._clock() + ttl))
        except CacheError:
            self._tally.add("errors")
            raise
        with self._asking(write=True) as client:
            client.set(self._entry(key), value, px=None if ttl is None else max(1, round(ttl * 1000)))
        self._tally.add("writes")

    def delete(self, key: str) -> bool:
        self._walk = (0.0, 0, 0)
        with self._asking(write=True) as client:
            return bool(client.delete(self._entry(key)))

    def clear(self, *, older_than: float | None = None, **filters: str | None) -> int:
        self._walk = (0.0, 0, 0)
        fields = chosen(filters)
        everything = older_than is None and not fields
        now = self._clock()
        deleted = 0
        for names in self._names():
            doomed = names
            if not everything:
                pairs = zip(names, self._fetch(names), strict=True)
                doomed = [
                    name
                    for name, entry in pairs
                    if entry is not None and matches(entry, fields, older_than=older_than, now=now)
                ]
            deleted += sum(self._each("unlink", doomed, write=True))
        return deleted

    def items(self) -> Iterator[tuple[str, CacheEntry]]:
        yield from self._newest_first({})

    def find(
        self, *, prefix: str = "", limit: int | None = None, **filters: str | None
    ) -> list[tuple[str, CacheEntry]]:
        return list(islice(self._newest_first(chosen(filters), prefix), limit))

    def count_by(self, *fields: str) -> dict[str, dict[str, int]]:
        fetched = (entry for names in self._names() for entry in self._fetch(names))
        return count_entries((entry for entry in fetched if entry is not None), fields)

    def _newest_first(self, filters: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, CacheEntry]]:
        """Yield (key, entry), newest first: one scan sorts the keys by age, then entries are read in batches."""
        ages: list[tuple[float, bytes]] = []
        for names in self._names(prefix):
            for name, entry in zip(names, self._fetch(names), strict=True):
                if entry is not None and matches(entry, filters):
                    ages.append((entry.created_at, name))
        newest_first = iter([name for _, name in sorted(ages, reverse=True)])
        skip = len(self._entry("").encode())
        while names := list(islice(newest_first, BATCH)):
            for name, entry in zip(names, self._fetch(names), strict=True):
                if entry is not None:
                    yield name[skip:].decode(), entry

    def stats(self) -> CacheStats:
        """Return the statistics; counts entries by a scan, whose result is reused for a hundred times its duration.

        Does not raise: if the server is unreachable, `entries` and `size_bytes` are the latest known.
        """
        until, entries, size_bytes = self._walk
        if time.monotonic() >= until:
            began = time.monotonic()
            try:
                sizes = [size for names in self._names() for size in self._each("strlen", names)]
                entries, size_bytes = len(sizes), sum(sizes)
                took = time.monotonic() - began
                self._walk = (began + 100 * took if took > SLOW_WALK else 0.0, entries, size_bytes)
            except CacheError as exc:
                _log.debug("redis cannot be counted", error=str(exc))
        return self._tally.stats(entries=entries, size_bytes=size_bytes)

    def lease(self, key: str, ttl: float) -> Lease | None:
        name = self._lease(key)
        with self._asking(write=True) as client:
            if client.exists(name):
                return None
            token = client.incr(f"{self.prefix}token")
            if token == 1:
                # A server that lost its data counts from here on, so that a holder from before never has a newer
                # holder's token.
                token = client.incrby(f"{self.prefix}token", int(self._clock() * 1000))
            taken = client.set(name, token, nx=True, px=max(1, round(ttl * 1000)))
        return Lease(key, int(token), self._clock() + ttl) if taken else None

    def renew(self, lease: Lease, ttl: float) -> bool:
        with self._asking(write=True) as client:
            return bool(client.eval(RENEW, 1, self._lease(lease.key), lease.token, max(1, round(ttl * 1000))))

    def release(self, lease: Lease) -> None:
        with self._asking(write=True) as client:
            client.eval(RELEASE, 1, self._lease(lease.key), lease.token, self._channel(lease.key))

    def wait(self, key: str, timeout: float) -> None:
        """Sleep on a subscription until the holder's release, its lease's end or the timeout."""
        deadline = time.monotonic() + timeout
        with self._asking() as client, ExitStack() as stack:
            listener = client.pubsub()
            stack.callback(listener.close)
            listener.subscribe(self._channel(key))
            # The confirmation first: a release between the look and the subscription would go unheard.
            listener.get_message(timeout=min(timeout, 0.5))
            if client.exists(self._entry(key)):
                return
            milliseconds = client.pttl(self._lease(key))
            seconds = min(deadline - time.monotonic(), milliseconds / 1000)
            if seconds > 0:
                listener.get_message(timeout=seconds)

    def close(self) -> None:
        with self._connecting:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    @contextmanager
    def _asking(self, *, write: bool = False) -> Iterator[Any]:
        """Yield the client unless the circuit breaker is open; turns redis-py's exceptions into CacheError."""
        circuits = [self._line, self._writing] if write else [self._line]
        entered: list[Circuit] = []
        verdicts: dict[Circuit, str | None] = {}
        try:
            for circuit in circuits:
                if seconds := circuit.enter():
                    self._tally.add("errors")
                    raise CacheError(f"{self.url} is unavailable, next try in {seconds:.1f} s: {circuit.reason}")
                entered.append(circuit)
            yield self._connected()
            verdicts = dict.fromkeys(entered)
        except self._foreign as exc:
            self._tally.add("errors")
            reason = f"{exc}" or type(exc).__name__
            if any(word in reason.upper() for word in _UNWRITABLE):
                verdicts = {self._line: None, self._writing: reason}
            else:
                # A server that says itself what is wrong is there, and can be asked other things.
                answers = isinstance(exc, (self._redis.ResponseError, UnicodeError)) and not isinstance(exc, self._away)
                verdicts = {self._line: None if answers else reason}
            raise CacheError(f"{self.url} failed: {reason}", hint=_hint(reason)) from exc
        except (KeyboardInterrupt, SystemExit):
            # In the caller's thread they come at any point of redis-py's, which may leave a connection half read.
            self._client = None
            raise
        finally:
            for circuit in entered:
                if circuit not in verdicts:
                    circuit.forgo()
                elif circuit.leave(verdicts[circuit]):
                    back = verdicts[circuit] is None
                    _log.info("redis is back" if back else "redis is unavailable", url=self.url, why=circuit.reason)

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                self._client = self._address.connect()
            return self._client

    def _entry(self, key: str) -> str:
        return f"{self.prefix}entry:{key}"

    def _lease(self, key: str) -> str:
        return f"{self.prefix}lease:{_digest(key)}"

    def _channel(self, key: str) -> str:
        return f"{self.prefix}released:{_digest(key)}"

    def _names(self, prefix: str = "") -> Iterator[list[bytes]]:
        """Yield the Redis keys of all entries (whose key begins with `prefix`) in batches, by SCAN."""
        pattern = "".join(f"\\{char}" if char in "*?[]\\^-" else char for char in self._entry(prefix)) + "*"
        with self._asking() as client:
            scan = client.scan_iter(match=pattern, count=1000)
        names_before: set[bytes] = set()
        while True:
            with self._asking():
                names = set(islice(scan, BATCH))
            if not names:
                return
            # SCAN may tell a name twice.
            if fresh := names - names_before:
                names_before |= fresh
                yield sorted(fresh)

    def _fetch(self, names: list[bytes]) -> list[CacheEntry | None]:
        return [_readable(text) for text in self._each("get", names)]

    def _each(self, command: str, names: list[bytes], *, write: bool = False) -> list[Any]:
        """Return the replies to `command` for each of `names`, in one round trip; 0 if the name is of another type."""
        if not names:
            return []
        with self._asking(write=write) as client:
            is_cluster = hasattr(client, "get_primaries")
            pipeline = client.pipeline() if is_cluster else client.pipeline(transaction=False)
            for name in names:
                getattr(pipeline, command)(name)
            answers = pipeline.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
                    raise answer
        return [0 if isinstance(answer, Exception) else answer for answer in answers]

    def _unreadable(self, key: str, reason: str) -> None:
        self._tally.add("errors")
        _log.warning("redis key is not a cache entry", url=self.url, key=key, reason=reason)


def open_redis(url: str, *, clock: Callable[[], float] = time.time, **options: object) -> Cache:
    """Return the Redis cache of `url` behind a small one in memory, or alone with `?front=0`.

    The cache in front keeps the entries this process read for `front_ttl` seconds (30), so that a hot key costs no
    round trip; for that long, entries that another process cleared may still be hits.
    """
    back = RedisCache(url, clock=clock, **options)
    own = back._address.own
    if not own.get("front", True):
        return back
    return TieredCache(back, front_ttl=own.get("front_ttl", 30.0))


def _value(entry: CacheEntry) -> str:
    """Return the entry's JSON with the analysis' brand, category and attributes copied to the top, for queries."""
    text, _ = encoded(entry)
    analysis = entry.analysis or {}
    summary = {name: analysis.get(name) for name in SUMMARY}
    return json.dumps(summary, ensure_ascii=False, separators=(",", ":"))[:-1] + "," + text[1:]


def _readable(text: str | bytes | None) -> CacheEntry | None:
    try:
        return CacheEntry.from_json(text) if text else None
    except CacheError:
        return None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _hint(reason: str) -> str | None:
    upper = reason.upper()
    if "MAXMEMORY" in upper:
        return "raise maxmemory or set maxmemory-policy allkeys-lru"
    if "WRONGPASS" in upper or "NOAUTH" in upper or "AUTH" in upper:
        return "write redis://user:password@host:6379/0"
    return None


__all__ = ["RedisCache", "open_redis"]
