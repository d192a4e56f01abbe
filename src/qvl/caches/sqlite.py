"""A cache in one SQLite file, shared by any number of processes on one machine."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from qvl.caches.base import COUNTED_BY, Cache, CacheEntry, CacheStats, Lease, chosen
from qvl.caches.counters import Tally
from qvl.caches.sqlite_file import SqliteFile
from qvl.caches.sqlite_schema import UPSERT, row
from qvl.caches.urls import path_url, read_options, seconds, size
from qvl.config import cache_folder, in_home
from qvl.errors import CacheError, ConfigError

T = TypeVar("T")

MAX_USES_PENDING: Final = 256
PURGE_EVERY: Final = 60.0
DATABASES: Final = ("", ".db", ".sqlite", ".sqlite3")
MAGIC: Final = b"SQLite format 3\0"
_HAS: Final = "SELECT 1 FROM entries WHERE key = ? AND (expires_at IS NULL OR expires_at > ?)"
_LIVE_KEYS: Final = (
    "SELECT key FROM entries WHERE expires_at IS NULL OR expires_at > ? ORDER BY created_at DESC, rowid DESC"
)


def default_path() -> Path:
    """Return the default cache file, in the platform's folder for caches."""
    return cache_folder() / "cache.db"


def _refuse_a_missing_folder(path: Path) -> None:
    """Raise ConfigError if the folder of `path` does not exist, since it is likely misspelt."""
    with contextlib.suppress(PermissionError):
        try:
            is_folder = stat.S_ISDIR(path.parent.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            is_folder = False
        if not is_folder:
            raise ConfigError(
                f"the folder of the cache file {path} does not exist",
                hint=f"mkdir -p {path.parent}, or name another place",
                param="cache",
            )


def _refuse_what_is_no_cache(path: Path) -> None:
    """Raise ConfigError for a file that is not a cache, which must not be renamed as a corrupt cache would be."""
    if path.suffix.lower() in DATABASES or not path.is_file():
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(len(MAGIC))
        if start and start != MAGIC:
            raise ConfigError(f"{path} is not a cache file", hint="name a new file, such as answers.db, or off")


class SqliteCache(Cache):
    """Stores entries as rows of the table `entries`, with columns to query and the whole entry as JSON.

    Leases expire by the wall clock, the only one that all processes share and that outlives a restart. If it is set
    forward, they expire early and an answer may be computed twice; set back, the lease of a dead holder lasts longer.

    Safe for many threads and processes and across a fork. A corrupt file is renamed to `<name>.corrupt-<time>` and a
    new one created. If the file is not writable, reads work and writes raise.

    Args:
        path: the database file, in an existing folder; None for the default one, whose folder is created.
        max_bytes: most bytes of rows; the least recently used are evicted first.
        busy_timeout: seconds to retry while other processes lock the file.
        clock: seconds since the epoch.

    Raises:
        ConfigError: an option is out of range, the folder does not exist, or the file is not a cache.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_bytes: int = 512 * 2**20,
        busy_timeout: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_bytes < 1 or busy_timeout <= 0:
            raise ConfigError("invalid limits of a SQLite cache", hint="max_bytes and busy_timeout above 0")
        self.path = (default_path() if path is None else in_home(path)).absolute()
        if path is not None:
            _refuse_a_missing_folder(self.path)
        _refuse_what_is_no_cache(self.path)
        self.url = path_url(str(self.path))
        self.max_bytes = max_bytes
        self._clock = clock
        self._file = SqliteFile(self.path, busy_timeout=busy_timeout)
        self._uses_lock = threading.Lock()
        self._changed = threading.Condition()
        self._changes = 0
        self._uses: dict[str, float] = {}
        self._last_use = 0.0
        self._purged_at = clock()
        self._tally = Tally()

    @classmethod
    def from_url(cls, url: str, **options: object) -> SqliteCache:
        """Return the cache of `sqlite://` (default file), `sqlite:///file.db` or `sqlite:////abs.db?max_bytes=1GiB`."""
        base, _, query = url.partition("?")
        scheme, separator, rest = ("sqlite", "://", "") if base == "sqlite:" else base.partition("://")
        if scheme != "sqlite" or not separator:
            raise ConfigError(f"invalid SQLite cache URL {url!r}", hint="write sqlite:///file.db")
        if rest and not rest.startswith("/"):
            raise ConfigError(f"invalid SQLite cache URL {url!r}: it has a host", hint=f"write sqlite:///{rest}")
        path = unquote(rest[1:])
        if path == ":memory:":
            raise ConfigError(f"missing file path in {url!r}", hint="write memory: for a cache in memory")
        known = {"max_bytes": size, "busy_timeout": seconds}
        return cls(path or None, **read_options("sqlite", query, options, known, passed=("clock",)))

    def get(self, key: str) -> CacheEntry | None:
        now = self._clock()
        rows = self._read("SELECT entry, expires_at FROM entries WHERE key = ?", key)
        if not rows or (rows[0][1] is not None and rows[0][1] <= now):
            self._tally.add("misses")
            return None
        try:
            entry = CacheEntry.from_json(rows[0][0])
        except CacheError:
            # Written by another version, or edited by hand: worth a new answer, not a failure.
            self._tally.add("errors")
            self._tally.add("misses")
            return None
        self._tally.add("hits")
        self._used(key)
        return entry

    def set(self, key: str, entry: CacheEntry, *, ttl: float | None = None) -> None:
        if ttl is not None and ttl <= 0:
            self.delete(key)
            return
        now = self._clock()
        with self._counted():
            values, needed = row(key, replace(entry, expires_at=None if ttl is None else now + ttl), self._use_time())
            if needed > self.max_bytes:
                raise CacheError(f"an entry of {needed} bytes is larger than the cache", hint="raise max_bytes")

            uses = self._take_uses()

            def work(connection: sqlite3.Connection) -> int:
                _write_uses(connection, uses)
                connection.execute(UPSERT, values)
                return self._make_room(connection, now)

            self._tally.add("evictions", self._file.write(work))
        self._tally.add("writes")
        self._wake()

    def delete(self, key: str) -> bool:
        now = self._clock()

        def work(connection: sqlite3.Connection) -> bool:
            live = connection.execute(_HAS, (key, now)).fetchone()
            connection.execute("DELETE FROM entries WHERE key = ?", (key,))
            return live is not None

        return self._write(work)

    def clear(self, *, older_than: float | None = None, **filters: str | None) -> int:
        now = self._clock()
        conditions: dict[str, object] = {f"{name} = ?": value for name, value in chosen(filters).items()}
        if older_than is not None:
            conditions["created_at < ?"] = now - older_than
        where = " AND ".join(conditions) or "1"

        def work(connection: sqlite3.Connection) -> int:
            connection.execute("DELETE FROM entries WHERE expires_at <= ?", (now,))
            statement = f"DELETE FROM entries WHERE {where}"  # noqa: S608 - our own column names
            return connection.execute(statement, tuple(conditions.values())).rowcount

        deleted = self._write(work)
        with contextlib.suppress(CacheError):
            self._file.read(_give_back_pages)
        return deleted

    def items(self) -> Iterator[tuple[str, CacheEntry]]:
        keys = self._read(_LIVE_KEYS, self._clock())
        for (key,) in keys:
            for (text,) in self._read("SELECT entry FROM entries WHERE key = ?", key):
                with contextlib.suppress(CacheError):
                    yield key, CacheEntry.from_json(text)

    def find(
        self, *, prefix: str = "", limit: int | None = None, **filters: str | None
    ) -> list[tuple[str, CacheEntry]]:
        conditions: dict[str, object] = {f"{name} = ?": value for name, value in chosen(filters).items()}
        if prefix:
            conditions |= {"key >= ?": prefix, "key < ?": prefix + chr(0x10FFFF)}
        where = " AND ".join(["(expires_at IS NULL OR expires_at > ?)", *conditions])
        # Our own column names; a limit of -1 means no limit.
        sql = f"SELECT key, entry FROM entries WHERE {where} ORDER BY created_at DESC, rowid DESC LIMIT ?"  # noqa: S608
        entries = []
        for key, text in self._read(sql, self._clock(), *conditions.values(), -1 if limit is None else limit):
            with contextlib.suppress(CacheError):
                entries.append((key, CacheEntry.from_json(text)))
        return entries

    def count_by(self, *fields: str) -> dict[str, dict[str, int]]:
        return {field: self._count_by(field) for field in fields}

    def _count_by(self, field: str) -> dict[str, int]:
        if field not in COUNTED_BY:
            raise ConfigError(f"cannot count entries by {field!r}", hint=f"one of {', '.join(COUNTED_BY)}")
        sql = (
            f"SELECT {field}, count(*) AS number FROM entries"  # noqa: S608 - one of ours
            " WHERE expires_at IS NULL OR expires_at > ? GROUP BY 1 ORDER BY number DESC, 1"
        )
        return dict(self._read(sql, self._clock()))

    def stats(self) -> CacheStats:
        ((entries, size_bytes),) = self._read("SELECT entries, bytes FROM totals")
        ((dead, dead_bytes),) = self._read(
            "SELECT count(*), coalesce(sum(size), 0) FROM entries WHERE expires_at <= ?", self._clock()
        )
        return self._tally.stats(entries=entries - dead, size_bytes=size_bytes - dead_bytes)

    def lease(self, key: str, ttl: float) -> Lease | None:
        now = self._clock()
        if self._lease_end(key) > now:
            return None

        def work(connection: sqlite3.Connection) -> Lease | None:
            lease = connection.execute("SELECT expires_at FROM leases WHERE key = ?", (key,)).fetchone()
            if lease is not None and lease[0] > now:
                return None
            connection.execute("UPDATE totals SET token = token + 1")
            (token,) = connection.execute("SELECT token FROM totals").fetchone()
            connection.execute("DELETE FROM leases WHERE expires_at <= ?", (now,))
            connection.execute("INSERT INTO leases (key, token, expires_at) VALUES (?, ?, ?)", (key, token, now + ttl))
            return Lease(key, token, now + ttl)

        return self._write(work)

    def renew(self, lease: Lease, ttl: float) -> bool:
        values = (self._clock() + ttl, lease.key, lease.token)
        statement = "UPDATE leases SET expires_at = ? WHERE key = ? AND token = ?"
        return self._write(lambda connection: connection.execute(statement, values).rowcount > 0)

    def release(self, lease: Lease) -> None:
        self._write(lambda c: c.execute("DELETE FROM leases WHERE key = ? AND token = ?", (lease.key, lease.token)))
        self._wake()

    def wait(self, key: str, timeout: float) -> None:
        """Sleep until the lease is released, expires, or the timeout.

        Changes by other processes are noticed within 50 ms, by a pragma that reads one page of memory.
        """
        deadline = time.monotonic() + timeout
        pause = 0.002
        version = None
        while True:
            # The pragma tells of other connections' changes, the number of those through this one.
            changes = (self._changes, self._read("PRAGMA data_version"))
            if changes != version:
                version = changes
                until = self._lease_end(key)
                if self._read(_HAS, key, self._clock()):
                    return
            seconds = min(deadline - time.monotonic(), until - self._clock())
            if seconds <= 0:
                return
            with self._changed:
                if self._changes == version[0]:
                    self._changed.wait(min(seconds, random.uniform(pause / 2, pause)))
            pause = min(pause * 1.5, 0.05)

    def close(self) -> None:
        if self._uses:
            self._flush_uses()
        self._file.close()

    def _used(self, key: str) -> None:
        """Record the time of a hit, to be written with the next entry or in a batch, so that a hit costs no write."""
        used_at = self._use_time()
        with self._uses_lock:
            self._uses[key] = used_at
            enough = len(self._uses) >= MAX_USES_PENDING
        if enough:
            self._flush_uses()

    def _use_time(self) -> float:
        """Return the clock's time, strictly increasing, so that the order of hits is known."""
        with self._uses_lock:
            self._last_use = max(self._clock(), self._last_use + 1e-6)
            return self._last_use

    def _take_uses(self) -> dict[str, float]:
        with self._uses_lock:
            uses, self._uses = self._uses, {}
        return uses

    def _flush_uses(self) -> None:
        uses = self._take_uses()
        # Notes that cannot be written at once are lost: a slightly wrong order of eviction harms nobody.
        with contextlib.suppress(CacheError):
            self._file.write(lambda connection: _write_uses(connection, uses), timeout=0)

    def _make_room(self, connection: sqlite3.Connection, now: float) -> int:
        """Delete expired entries, once in a while, and evict the least recently used; return the number evicted."""
        if now - self._purged_at >= PURGE_EVERY or now < self._purged_at:
            self._purged_at = now
            connection.execute("DELETE FROM entries WHERE expires_at <= ?", (now,))
        evicted = 0
        while (excess := connection.execute("SELECT bytes FROM totals").fetchone()[0] - self.max_bytes) > 0:
            gone = connection.execute("DELETE FROM entries WHERE expires_at <= ?", (now,)).rowcount
            if gone:
                continue
            oldest = connection.execute("SELECT rowid, size FROM entries ORDER BY last_used_at LIMIT 64").fetchall()
            freed = 0
            for rowid, length in oldest:
                connection.execute("DELETE FROM entries WHERE rowid = ?", (rowid,))
                evicted += 1
                freed += length
                if freed >= excess:
                    break
        return evicted

    def _read(self, sql: str, *values: object) -> list[Any]:
        with self._counted():
            return self._file.read(lambda connection: connection.execute(sql, values).fetchall())

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._counted():
            return self._file.write(work)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except CacheError:
            self._tally.add("errors")
            raise

    def _lease_end(self, key: str) -> float:
        rows = self._read("SELECT expires_at FROM leases WHERE key = ?", key)
        return float(rows[0][0]) if rows else 0.0

    def _wake(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()


def _write_uses(connection: sqlite3.Connection, uses: dict[str, float]) -> None:
    connection.executemany(
        "UPDATE entries SET last_used_at = ?1 WHERE key = ?2 AND last_used_at < ?1",
        [(used_at, key) for key, used_at in uses.items()],
    )


def _give_back_pages(connection: sqlite3.Connection) -> None:
    # Not `execute`, which takes one step of a pragma that returns no columns: one page.
    connection.executescript("PRAGMA incremental_vacuum")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


__all__ = ["SqliteCache", "default_path"]
