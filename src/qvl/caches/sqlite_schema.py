"""The tables of the SQLite cache, as migrations, and the conversion of an entry to a row.

`entries` has columns for queries; the column `entry` is the whole entry as JSON. `totals` is updated by triggers, so
that the size of the store is known without a scan and stays right if rows are deleted by hand.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Final

from qvl.caches.base import CacheEntry, encoded
from qvl.types import JsonMapping

SCHEMA_VERSION: Final = 1
ROW_OVERHEAD: Final = 256

COLUMNS: Final[Mapping[str, type]] = {
    "key": str,
    "image_hash": str,
    "task": str,
    "language": str,
    "model": str,
    "namespace": str,
    "text": str,
    "analysis": str,
    "brand": str,
    "category": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "created_at": float,
    "expires_at": float,
    "last_used_at": float,
    "size": int,
    "entry": str,
}

UPSERT: Final = (
    f"INSERT INTO entries ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "  # noqa: S608 - our names
    f"ON CONFLICT(key) DO UPDATE SET {', '.join(f'{name}=excluded.{name}' for name in COLUMNS if name != 'key')}"
)

_TRIGGERS: Final = {
    "entries_added": "AFTER INSERT ON entries BEGIN"
    " UPDATE totals SET entries = entries + 1, bytes = bytes + NEW.size; END",
    "entries_removed": "AFTER DELETE ON entries BEGIN"
    " UPDATE totals SET entries = entries - 1, bytes = bytes - OLD.size; END",
    "entries_resized": "AFTER UPDATE OF size ON entries WHEN OLD.size <> NEW.size BEGIN"
    " UPDATE totals SET bytes = bytes + NEW.size - OLD.size; END",
}


def migrate(connection: sqlite3.Connection, *, again: bool = False) -> None:
    """Migrate the tables of a database to SCHEMA_VERSION; `again` recreates missing ones whatever its version says."""
    # Here, since a file that is up to date needs no sqlite-utils, whose import costs more than a hit.
    from sqlite_utils import Database, Migrations

    migrations = Migrations("qvl.cache")

    @migrations()  # type: ignore[untyped-decorator]  # sqlite-utils is not followed
    def m001_entries(db: Database) -> None:
        entries = db.table("entries")
        entries.create(dict(COLUMNS), pk="key", not_null={"size", "created_at", "last_used_at", "entry"})
        entries.create_index(["last_used_at"])
        entries.create_index(["image_hash"])
        db.execute("CREATE INDEX idx_entries_expires_at ON entries (expires_at) WHERE expires_at IS NOT NULL")
        db.table("totals").create({"id": int, "entries": int, "bytes": int, "token": int}, pk="id")
        db.table("totals").insert({"id": 1, "entries": 0, "bytes": 0, "token": 0})
        for name, body in _TRIGGERS.items():
            db.execute(f"CREATE TRIGGER {name} {body}")

    @migrations()  # type: ignore[untyped-decorator]  # sqlite-utils is not followed
    def m002_leases(db: Database) -> None:
        db.table("leases").create({"key": str, "token": int, "expires_at": float}, pk="key")

    # One lock over all: two processes that begin the same file do not see each other's half-made tables.
    connection.execute("BEGIN IMMEDIATE")
    try:
        if again:
            for table in ("entries", "totals", "leases", migrations.migrations_table):
                connection.execute(f"DROP TABLE IF EXISTS {table}")
        migrations.apply(Database(connection, execute_plugins=False))
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def row(key: str, entry: CacheEntry, used_at: float) -> tuple[tuple[object, ...], int]:
    """Return (values of COLUMNS for `entry`, their size in bytes).

    Raises:
        CacheError: something in the entry cannot be written as JSON.
    """
    text, length = encoded(entry)
    analysis = entry.analysis
    written = None if analysis is None else json.dumps(analysis, ensure_ascii=False)
    size = length + len(entry.text) + len(written or "") + 2 * len(key) + ROW_OVERHEAD
    # The columns that are not fields of an entry.
    computed: dict[str, object] = {
        "key": key,
        "analysis": written,
        "last_used_at": used_at,
        "size": size,
        "entry": text,
    }
    computed |= {name: _word(analysis, name) for name in ("brand", "category")}
    computed |= {name: entry.usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return tuple(computed[name] if name in computed else getattr(entry, name) for name in COLUMNS), size


def _word(analysis: JsonMapping | None, name: str) -> str | None:
    value = None if analysis is None else analysis.get(name)
    return value if isinstance(value, str) else None
