"""The database file of the SQLite cache: opened once a process, shared by its threads, renamed when it is corrupt.

By https://www.sqlite.org/howtocorrupt.html, no connection crosses a fork, and a connection whose file was replaced is
not closed (closing would delete the write-ahead log of the new file).
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from qvl.caches.sqlite_schema import SCHEMA_VERSION, migrate
from qvl.errors import CacheError, write_failed
from qvl.log import logger

T = TypeVar("T")

_log = logger("qvl.caches")
_files: weakref.WeakSet[SqliteFile] = weakref.WeakSet()

# Matched on the message, since Python 3.10 does not hand out SQLite's error codes.
_BUSY: Final = ("is locked", "locking protocol", "database schema has changed")
_CORRUPT: Final = ("not a database", "malformed", "file is encrypted")
_REPLACED: Final = ("no such table", "no such column", "has no column")
_READ_ONLY: Final = ("readonly", "read-only", "unable to open")
SIDE_FILES: Final = ("-wal", "-shm", "-journal")


class SqliteFile:
    """One connection to one database file, for all threads of this process.

    Args:
        path: the file, created with its folders on first use.
        busy_timeout: seconds to retry while other processes lock the file.
    """

    def __init__(self, path: Path, *, busy_timeout: float) -> None:
        self.path = path
        self.busy_timeout = busy_timeout
        self.read_only = False
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        _files.add(self)

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of `work`, run on the connection.

        Raises:
            CacheError: the file cannot be read, or stays locked for `busy_timeout` seconds.
        """
        return self._persist(work, self.busy_timeout)

    def write(self, work: Callable[[sqlite3.Connection], T], *, timeout: float | None = None) -> T:
        """Return the result of `work`, run in a write transaction; raises as `read`."""

        def transaction(connection: sqlite3.Connection) -> T:
            if self.read_only:
                raise CacheError(f"the cache file {self.path} is read-only")
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

        return self._persist(transaction, self.busy_timeout if timeout is None else timeout)

    def close(self) -> None:
        with self._lock:
            self._drop_connection()

    def _persist(self, work: Callable[[sqlite3.Connection], T], timeout: float) -> T:
        deadline = time.monotonic() + timeout
        pause = 0.001
        repaired = False
        while True:
            try:
                with self._lock:
                    return work(self._current())
            except sqlite3.Error as exc:
                message = str(exc)
                if _any(_BUSY, message) and time.monotonic() < deadline:
                    # Not inside SQLite's own busy handler: other threads can use the connection meanwhile.
                    time.sleep(random.uniform(0, pause))
                    pause = min(pause * 2, 0.05)
                elif _any(_CORRUPT, message) and not repaired:
                    repaired = True
                    self._set_aside(message)
                elif _any(_REPLACED, message) and not repaired:
                    repaired = True
                    self._remake()
                else:
                    raise CacheError(f"the cache file {self.path} failed: {message}", hint=_hint(message)) from exc
            except OSError as exc:
                hint = write_failed("", exc).hint
                raise CacheError(f"the cache file {self.path} failed: {exc.strerror or exc}", hint=hint) from exc

    def _current(self) -> sqlite3.Connection:
        if self._connection is not None and self._opened != _identity(self.path):
            self._drop_connection()
        while self._connection is None:
            before = self._opened = _identity(self.path)
            self._connection, self.read_only = self._open()
            self._opened = _identity(self.path)
            if before not in {None, self._opened}:
                self._abandon()
        return self._connection

    def _open(self) -> tuple[sqlite3.Connection, bool]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._open_as("rwc"), False
        except (sqlite3.OperationalError, OSError) as exc:
            if isinstance(exc, sqlite3.OperationalError) and not _any(_READ_ONLY, str(exc)):
                raise
            refused = exc
        # A log that cannot be written beside a read-only file forbids plain reading; then the file stands still.
        for mode in ("ro", "ro&immutable=1"):
            with contextlib.suppress(sqlite3.OperationalError):
                connection = self._open_as(mode)
                _log.info("cache file is read-only", path=str(self.path), reason=str(refused))
                return connection, True
        raise refused

    def _open_as(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(str(self.path))}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=0.005, isolation_level=None, check_same_thread=False)
        try:
            if mode == "rwc":
                self._prepare(connection)
            connection.execute("SELECT 1 FROM entries LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version < SCHEMA_VERSION:
            # Only an empty file takes this; it lets `clear` give pages back to the disk.
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint=4000")
        connection.execute(f"PRAGMA journal_size_limit={64 * 2**20}")
        if version < SCHEMA_VERSION:
            migrate(connection)
        # Refuses here, not at the first write, what can be opened but not written.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")

    def _remake(self) -> None:
        """Recreate the tables in a database that lost them."""
        with self._lock:
            try:
                migrate(self._current(), again=True)
            except sqlite3.Error as exc:
                if not _any(_BUSY, str(exc)):
                    raise CacheError(f"the cache file {self.path} failed: {exc}") from exc

    def _drop_connection(self) -> None:
        if self._connection is None:
            return
        if self._opened != _identity(self.path):
            self._abandon()
            return
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._connection = None

    def _abandon(self) -> None:
        """Drop a connection without ever closing it, not even at interpreter exit (see the module's docstring)."""
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        self._connection = None

    def _set_aside(self, reason: str) -> None:
        """Rename the corrupt file with its WAL and shared-memory files, unless another process did."""
        with self._lock, _exclusive(self.path) as identity:
            self._drop_connection()
            if identity is None or identity != self._opened:
                return
            suffix = f".corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
            try:
                # The file last: a log left over from it is deleted by SQLite when the next file is begun, while
                # a log taken after it might already be the next file's.
                for side in SIDE_FILES:
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self.path}{side}", f"{self.path}{suffix}{side}")
                os.replace(self.path, f"{self.path}{suffix}")
            except OSError as exc:
                raise CacheError(
                    f"the cache file {self.path} is corrupt and cannot be renamed: {exc.strerror}",
                    hint="delete it, or name another file",
                ) from exc
        _log.warning("corrupt cache file renamed", path=str(self.path), kept=f"{self.path}{suffix}", reason=reason)


def _any(phrases: tuple[str, ...], message: str) -> bool:
    return any(phrase in message for phrase in phrases)


def _hint(message: str) -> str | None:
    if "is locked" in message:
        return "another program keeps it locked; raise busy_timeout or name another file with QVL_CACHE"
    if "full" in message:
        return "free some space, or name a file on another disk with QVL_CACHE"
    if "disk I/O error" in message:
        return "see whether the disk is full or faulty, or name a file on another with QVL_CACHE"
    return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[tuple[int, int] | None]:
    """Lock `path` against renaming by other processes; yields (device, inode) of the file, None if it is gone."""
    try:
        import fcntl
    except ImportError:
        yield _identity(path)
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        status = os.fstat(descriptor)
        mine = (status.st_dev, status.st_ino)
        yield mine if _identity(path) == mine else None
    finally:
        os.close(descriptor)


def _hold_all() -> None:
    _locked.extend(_files)
    for file in _locked:
        file._lock.acquire()
        file._drop_connection()


def _let_go_all() -> None:
    while _locked:
        _locked.pop()._lock.release()


_locked: list[SqliteFile] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_let_go_all, after_in_child=_let_go_all)
