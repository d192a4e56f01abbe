"""The index of a catalogue: one SQLite file with the products, an FTS5 table and counts.

The FTS5 table stores no text and no positions, only posting lists. Exact values ("color is red") are tokens too, so
FTS5 intersects conditions and words in one query. Document frequencies are stored in a table, because FTS5's bm25()
reads whole posting lists to count them, which is too slow for a search.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

from qvl.agent.catalog.product import Changes, Problem, Product
from qvl.agent.catalog.tokenize import facet_token, key, tokens
from qvl.errors import ConfigError

FORMAT: Final = 1
BATCH: Final = 4000
MAX_PROBLEMS: Final = 1000
BUCKETS: Final = 48
TABLES: Final = {
    "meta": "(name TEXT PRIMARY KEY, value TEXT)",
    "products": (
        "(number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, price FLOAT, digest BLOB NOT NULL, row TEXT NOT NULL)"
    ),
    "problems": "(number INTEGER PRIMARY KEY, line INTEGER, message TEXT)",
    "terms": "(term TEXT PRIMARY KEY, docs INTEGER NOT NULL) WITHOUT ROWID",
    "facets": "(key TEXT, name TEXT, value TEXT NOT NULL, docs INTEGER, PRIMARY KEY (key, name)) WITHOUT ROWID",
    "documents": "USING fts5(body, content='', detail=none, tokenize='unicode61 remove_diacritics 2')",
}


class Index:
    """Products in a SQLite file (or ":memory:"), changed by `update` and read by `ranking`. Thread-safe.

    Raises:
        ConfigError: the file is not an index of this version, or SQLite cannot open it.
    """

    def __init__(self, path: str) -> None:
        self._lock = threading.RLock()
        try:
            self.db = sqlite3.connect(path, check_same_thread=False, timeout=30.0, isolation_level=None)
            try:
                for setting in ("journal_mode = WAL", "synchronous = NORMAL", "mmap_size = 1073741824"):
                    self.db.execute(f"PRAGMA {setting}")
                self._create()
            except BaseException:
                self.db.close()
                raise
        except sqlite3.Error as exc:
            raise ConfigError(f"the index {path} cannot be used: {exc}", hint="delete it; it will be rebuilt") from exc
        self._totals: tuple[int, int] | None = None

    def _create(self) -> None:
        with self.writing():
            exists = self.rows("SELECT 1 FROM sqlite_master WHERE name = 'meta'")
            if exists and self.meta("format") != FORMAT:
                for table in TABLES:
                    self.db.execute(f"DROP TABLE IF EXISTS {table}")
            for table, columns in TABLES.items():
                kind = "VIRTUAL TABLE" if columns.startswith("USING") else "TABLE"
                self.db.execute(f"CREATE {kind} IF NOT EXISTS {table} {columns}")
            self.db.execute("CREATE INDEX IF NOT EXISTS idx_products_price ON products (price)")
            self.set_meta("format", FORMAT)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold a write transaction, rolled back on an error."""
        with self._lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        with self._lock:
            return self.db.execute(sql, values).fetchall()

    def meta(self, name: str) -> object:
        rows = self.rows("SELECT value FROM meta WHERE name = ?", (name,))
        return json.loads(rows[0][0]) if rows else None

    def set_meta(self, name: str, value: object) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    @property
    def totals(self) -> tuple[int, int]:
        """Return (number of products, number of tokens in all of them)."""
        if self._totals is None:
            products, tokens = self.meta("products"), self.meta("tokens")
            self._totals = (products if isinstance(products, int) else 0, tokens if isinstance(tokens, int) else 0)
        return self._totals

    @property
    def problems(self) -> list[Problem]:
        """Return the first thousand invalid rows."""
        return [Problem(*row) for row in self.rows("SELECT line, message FROM problems ORDER BY number")]

    def close(self) -> None:
        with self._lock:
            self.db.close()

    def update(self, rows: Iterable[tuple[int, Product | Problem]], *, source: object = None) -> Changes:
        """Replace the index's content by `rows` of (line, product or problem), and return the counts of changes."""
        with self.writing():
            work = _Update(self)
            waiting = iter(rows)
            while batch := list(islice(waiting, BATCH)):
                work.take(batch)
            changes = work.finish()
            self.set_meta("source", source)
        self._totals = None
        return changes

    def products(self, numbers: Sequence[int]) -> list[tuple[int, Product]]:
        """Return (row number, product) for each of `numbers`, in no particular order."""
        sql = "SELECT number, row FROM products WHERE number IN"
        return [(number, Product.from_json(json.loads(row))) for number, row in self._in(sql, numbers)]

    def numbers(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the row numbers by product id; unknown ids are omitted."""
        return dict(self._in("SELECT id, number FROM products WHERE id IN", ids))

    def digests(self, ids: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        """Return (row number, digest) by product id; unknown ids are omitted."""
        rows = self._in("SELECT id, number, digest FROM products WHERE id IN", ids)
        return {identity: (number, digest) for identity, number, digest in rows}

    def _in(self, sql: str, values: Sequence[object]) -> Iterator[Any]:
        """Yield the rows of `sql`, which ends with IN, for any number of `values`, in batches."""
        for at in range(0, len(values), 500):
            part = values[at : at + 500]
            yield from self.rows(f"{sql} ({','.join('?' * len(part))})", part)


class _Update:
    """One update of the index: compares the rows with it in batches and writes the differences."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.db = index.db
        last = self.db.execute("SELECT COALESCE(MAX(number), 0) FROM products").fetchone()[0]
        self.next = last + 1
        self.old = last
        # The line of each row number: a few bytes a product, also for millions.
        self.lines = array("L", bytes(array("L").itemsize * (last + 1)))
        self.terms: Counter[str] = Counter()
        self.facets: Counter[tuple[str, str]] = Counter()
        self.spelling: dict[tuple[str, str], str] = {}
        self.count, self.length = index.totals
        self.added = self.changed = self.unchanged = self.num_problems = 0
        self.db.execute("DELETE FROM problems")

    def take(self, batch: Sequence[tuple[int, Product | Problem]]) -> None:
        ids = list(dict.fromkeys(item.id for _, item in batch if isinstance(item, Product)))
        known = self.index.digests(ids) if self.count or self.next > 1 else {}
        inserts: list[tuple[int, Product, bytes, str]] = []
        for line, item in batch:
            if isinstance(item, Problem):
                self._problem(item)
                continue
            number, digest = known.get(item.id, (0, b""))
            if number and self.lines[number]:
                self._problem(Problem(line, f"duplicate id {item.id!r}: already on line {self.lines[number]}"))
                continue
            row = json.dumps(item.to_json(), ensure_ascii=False, separators=(",", ":"))
            new = hashlib.blake2b(row.encode(), digest_size=16).digest()
            if number and new == digest:
                self.unchanged += 1
            elif number:
                self._remove([number])
                inserts.append((number, item, new, row))
                self.changed += 1
            else:
                number, self.next = self.next, self.next + 1
                self.lines.append(0)
                inserts.append((number, item, new, row))
                self.added += 1
            known[item.id] = (number, new)
            self.lines[number] = line
        self._insert(inserts)
        if len(self.terms) > 200_000:
            self._flush()

    def _problem(self, problem: Problem) -> None:
        self.num_problems += 1
        if self.num_problems <= MAX_PROBLEMS:
            self.db.execute("INSERT INTO problems (line, message) VALUES (?, ?)", (problem.line, problem.message))

    def _insert(self, rows: Sequence[tuple[int, Product, bytes, str]]) -> None:
        bodies = [(number, self._count(item, 1)) for number, item, _, _ in rows]
        self.db.executemany(
            "INSERT INTO products (number, id, price, digest, row) VALUES (?, ?, ?, ?, ?)",
            [(number, item.id, item.price, digest, row) for number, item, digest, row in rows],
        )
        self.db.executemany("INSERT INTO documents (rowid, body) VALUES (?, ?)", bodies)

    def _remove(self, numbers: Sequence[int]) -> None:
        for number, item in self.index.products(numbers):
            body = self._count(item, -1)
            self.db.execute("INSERT INTO documents (documents, rowid, body) VALUES ('delete', ?, ?)", (number, body))
            self.db.execute("DELETE FROM products WHERE number = ?", (number,))

    def _count(self, item: Product, sign: int) -> str:
        """Return the FTS5 document of a product, and add `sign` (1 or -1) to the counts of its terms and facets."""
        words = [token for text in text_fields(item).values() for token in tokens(text)]
        self.count += sign
        self.length += sign * len(words)
        exact = []
        for (name, value), spelling in facets(item).items():
            exact.append(facet_token(name, value))
            self.facets[name, value] += sign
            self.spelling[name, value] = spelling
        if item.price is not None:
            exact.append(price_token(price_bucket(item.price)))
        unique = dict.fromkeys([*words, *exact])
        for token in unique:
            self.terms[token] += sign
        return " ".join(unique)

    def _flush(self) -> None:
        self.db.executemany(
            "INSERT INTO terms VALUES (?, ?) ON CONFLICT DO UPDATE SET docs = docs + excluded.docs",
            sorted(item for item in self.terms.items() if item[1]),
        )
        self.db.executemany(
            "INSERT INTO facets (key, name, value, docs) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET docs = docs + excluded.docs",
            [(value, name, self.spelling[name, value], docs) for (name, value), docs in self.facets.items() if docs],
        )
        for counts in (self.terms, self.facets, self.spelling):
            counts.clear()

    def finish(self) -> Changes:
        old = self.db.execute("SELECT number FROM products WHERE number <= ?", (self.old,))
        gone = [number for (number,) in old if not self.lines[number]]
        for at in range(0, len(gone), BATCH):
            self._remove(gone[at : at + BATCH])
        self._flush()
        for table in ("terms", "facets"):
            self.db.execute(f"DELETE FROM {table} WHERE docs <= 0")  # noqa: S608 - marks and names of our own
        if self.added > BATCH:
            self.db.execute("INSERT INTO documents (documents) VALUES ('optimize')")
        self.index.set_meta("products", self.count)
        self.index.set_meta("tokens", self.length)
        return Changes(self.added, self.changed, len(gone), self.unchanged)


def facets(item: Product) -> dict[tuple[str, str], str]:
    """Return the original spelling of brand, category and attributes, by (folded name, folded value)."""
    spellings: dict[tuple[str, str], str] = {}
    for name, value in (("brand", item.brand), ("category", item.category), *item.attributes.items()):
        if value and key(value):
            spellings.setdefault((key(name), key(value)), value)
    return spellings


def text_fields(item: Product) -> dict[str, str]:
    """Return the searchable text by field name."""
    return {
        "name": item.name,
        "brand": item.brand or "",
        "category": item.category or "",
        "attributes": " ".join(item.attributes.values()),
        "more": " ".join(str(part) for value in item.extra.values() for part in _texts(value)),
        "id": item.id,
    }


def _texts(value: object) -> list[object]:
    parts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return [part for part in parts if isinstance(part, str | int | float)]


def price_bucket(price: float) -> int:
    """Return the bucket of a price; bounds double: 0 is below 1, 1 below 2, 2 below 4 …"""
    return min(BUCKETS - 1, int(price).bit_length())


def price_token(bucket: int) -> str:
    return f"qp{bucket:02}"
