"""The SQLite file of files and batches, shared by all processes that serve one folder."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.errors import QvlError
from qvl.log import logger
from qvl.server.batches.outputs import no_usage

if TYPE_CHECKING:
    from qvl.server.batches.objects import BatchObject, FileObject
    from qvl.types import JsonObject

VERSION: Final = 1
log = logger("qvl.server")
_SCHEMA: Final = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE INDEX files_of ON files (tenant, seq);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, lane TEXT NOT NULL,
    endpoint TEXT NOT NULL, input_file_id TEXT NOT NULL, completion_window TEXT NOT NULL, status TEXT NOT NULL,
    metadata TEXT, model TEXT, errors TEXT, usage TEXT, output_seconds INTEGER NOT NULL,
    answers_id TEXT NOT NULL, errors_id TEXT NOT NULL, output_file_id TEXT, error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    written INTEGER NOT NULL DEFAULT 0, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL,
    in_progress_at INTEGER, finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER,
    cancelling_at INTEGER, cancelled_at INTEGER);
CREATE INDEX batches_of ON batches (tenant, seq);
CREATE INDEX batches_by ON batches (status, seq);
"""


class StorageError(QvlError):
    """The folder of files and batches cannot be read or written."""

    default_code = "storage_failed"


class Database:
    """One connection to the file, made with the folder when something is first written. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "batches.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    @property
    def exists(self) -> bool:
        return self._connection is not None or self.path.exists()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection within a transaction that is committed at the end, and undone by an exception.

        Raises:
            StorageError: the file cannot be made, read or written.
        """
        try:
            with self._lock:
                connection = self._open()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as exc:
            raise storage_failed(self.path, exc) from exc

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """Return what `query` finds; [] where nothing was ever written.

        Raises:
            StorageError: the file cannot be read.
        """
        if not self.exists:
            return []
        try:
            with self._lock:
                return self._open().execute(query, values).fetchall()
        except (sqlite3.Error, OSError) as exc:
            raise storage_failed(self.path, exc) from exc

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("BEGIN IMMEDIATE")
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={VERSION}")
                connection.execute("COMMIT")
                if version > VERSION:
                    raise sqlite3.DatabaseError("it was written by a newer version of qvl")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class ProcessLock:
    """A lock that one process holds at a time, and that is free when it is dead.

    It is SQLite's own lock on a file, which the system drops with the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def take(self) -> bool:
        """Return True if this process holds the lock, taking it if it is free."""
        if self._connection is None:
            connection = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error:
                connection.close()
                return False
            self._connection = connection
        return True

    def give_back(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def storage_failed(path: Path, exc: Exception) -> StorageError:
    """Return the error for clients, who are not told where the folder is; the log is."""
    reason = getattr(exc, "strerror", None) or str(exc)
    log.error("the folder of batches cannot be used", path=str(path), reason=reason)
    return StorageError(f"files of batches cannot be kept: {reason}", hint="qvl-serve --batch-dir FOLDER")


def file_object(row: sqlite3.Row) -> FileObject:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }


def batch_object(row: sqlite3.Row) -> BatchObject:
    def read(name: str) -> JsonObject | None:
        return json.loads(row[name]) if row[name] else None

    problems = read("errors")
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": {"object": "list", "data": problems["data"]} if problems else None,
        "input_file_id": row["input_file_id"],
        "completion_window": row["completion_window"],
        "status": row["status"],
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        "created_at": row["created_at"],
        "in_progress_at": row["in_progress_at"],
        "expires_at": row["expires_at"],
        "finalizing_at": row["finalizing_at"],
        "completed_at": row["completed_at"],
        "failed_at": row["failed_at"],
        "expired_at": row["expired_at"],
        "cancelling_at": row["cancelling_at"],
        "cancelled_at": row["cancelled_at"],
        "request_counts": {"total": row["total"], "completed": row["completed"], "failed": row["failed"]},
        "metadata": read("metadata"),
        "model": row["model"],
        "usage": json.loads(row["usage"]) if row["usage"] else no_usage(),
    }
