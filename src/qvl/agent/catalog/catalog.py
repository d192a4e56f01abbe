"""`Catalog`: an index of the products of a file, with search in milliseconds.

catalog = Catalog("products.csv")
for hit in catalog.search("blue shoe", max_price=100).hits:
    print(hit.product.name, hit.why)
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, TypeVar

from qvl.agent.catalog import read_file
from qvl.agent.catalog.index import Index, facets
from qvl.agent.catalog.product import Changes, Hit, Problem, Product, Query, SearchHits
from qvl.agent.catalog.ranking import POOL, Search
from qvl.agent.catalog.tokenize import key
from qvl.config import cache_folder, in_home
from qvl.errors import ConfigError
from qvl.log import logger
from qvl.types import JsonMapping

T = TypeVar("T")
RRF: Final = 60
MAX_LIMIT: Final = 100
log = logger("qvl.agent")


class Retriever(Protocol):
    """A user's vector search: returns up to `limit` product ids, nearest first. A query's `picture` may be None."""

    def __call__(self, query: Query, limit: int, /) -> Sequence[str]: ...


class Catalog:
    """Products, searchable by words, exact values and price.

    Args:
        source: a JSON, JSONL, CSV or TSV file, or products (`Product` or mappings with its columns).
        index: the SQLite file of the index. None puts the index of a file into the platform's cache folder, and that of
            products into memory. Only products that changed since the last indexing are indexed again.
        retriever: vector search whose hits are merged in by reciprocal rank fusion; none by default.
        progress: True to show a bar on stderr while indexing; None only for a large file on a terminal.

    Raises:
        ConfigError: the file does not exist, is not a catalogue, or has no valid product.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Product | JsonMapping],
        *,
        index: str | Path | None = None,
        retriever: Retriever | None = None,
        progress: bool | None = None,
    ) -> None:
        self.retriever = retriever
        path_or_rows = in_home(source) if isinstance(source, str | Path) else source
        self.path = path_or_rows if isinstance(path_or_rows, Path) else None
        if self.path is not None and not self.path.is_file():
            raise ConfigError(
                f"catalogue {str(source)!r} not found", hint="name a JSON, JSONL or CSV file", param="catalog"
            )
        self._index = Index(str(index) if index is not None else _index_path(self.path))
        try:
            self.changes = self._fill(path_or_rows, progress)
            if not len(self):
                raise self._empty()
        except BaseException:
            self._index.close()
            raise

    def _fill(self, source: Path | Iterable[Product | JsonMapping], progress: bool | None) -> Changes:
        if not isinstance(source, Path):
            return self._index.update(_numbered(source))
        facts = source.stat()
        stamp = [read_file.VERSION, facts.st_size, facts.st_mtime_ns]
        if self._index.meta("source") == stamp and len(self):
            return Changes(unchanged=len(self), read=False)
        rows = _with_bar(read_file.read(source), facts.st_size, progress)
        changes = self._index.update(rows, source=stamp)
        log.info("catalogue indexed", added=changes.added, changed=changes.changed, removed=changes.removed)
        return changes

    def _empty(self) -> ConfigError:
        name = self.path.name if self.path is not None else "in memory"
        if problems := self.problems:
            return ConfigError(
                f"the catalogue {name} has no valid row ({len(problems)} are invalid)", hint=str(problems[0])
            )
        return ConfigError(f"the catalogue {name} has no rows", hint="one for each product, with an id and a name")

    def __len__(self) -> int:
        return self._index.totals[0]

    @property
    def problems(self) -> list[Problem]:
        """The first thousand invalid rows of the source, each with the reason."""
        return self._index.problems

    def search(
        self,
        query: Query | str = "",
        *,
        limit: int = 5,
        only: Mapping[str, str] | None = None,
        min_price: float | None = None,
        max_price: float | None = None,
    ) -> SearchHits:
        """Return the best matching products, with the reasons for each.

        Args:
            query: words, or a Query; a Query has its own conditions, so the arguments below must not be given with it.
            limit: the most hits, from 1 to 100.
            only: required values by "brand", "category" or attribute, such as `{"color": "blue"}`.

        Raises:
            ConfigError: a limit or price out of range.
        """
        began = time.perf_counter()
        if not 1 <= limit <= MAX_LIMIT:
            raise ConfigError(f"limit={limit} is out of range", hint=f"from 1 to {MAX_LIMIT}", param="limit")
        if isinstance(query, str):
            query = Query(text=query, only=only or {}, min_price=min_price, max_price=max_price)
        elif only or min_price is not None or max_price is not None:
            raise ConfigError("a Query has its own conditions", hint="put only and prices into it", param="query")
        search = Search(self._index, query)
        hits = [search.hit(item) for _, item in self._index.products(search.candidates(limit))]
        hits.sort(key=lambda hit: (-hit.score, hit.product.price or 0.0, hit.product.id))
        if self.retriever is not None:
            hits = self._fused(query, hits)
        return SearchHits(tuple(hits[:limit]), tuple(_notes(query, search)), time.perf_counter() - began)

    def count(self, query: Query | str) -> int:
        """Return the number of products that meet the query's conditions and match at least one of its terms."""
        return Search(self._index, Query(text=query) if isinstance(query, str) else query).count()

    def _fused(self, query: Query, hits: list[Hit]) -> list[Hit]:
        """Return text hits and the retriever's hits, merged by reciprocal rank fusion (Cormack et al. 2009)."""
        assert self.retriever is not None
        near = list(dict.fromkeys(self.retriever(query, POOL)))[:POOL]
        numbers = self._index.numbers(near)
        allowed = Search(self._index, Query(only=query.only, min_price=query.min_price, max_price=query.max_price))
        items = {item.id: item for _, item in self._index.products(list(numbers.values())) if _keeps(item, query)}
        by_id = {hit.product.id: hit for hit in hits}
        scores = {identity: 1 / (RRF + rank) for rank, identity in enumerate(by_id, 1)}
        for rank, identity in enumerate(near, 1):
            if identity not in items:
                continue
            scores[identity] = scores.get(identity, 0.0) + 1 / (RRF + rank)
            hit = by_id.get(identity) or Hit(items[identity], 0.0, allowed.hit(items[identity]).why)
            by_id[identity] = Hit(hit.product, hit.score, (*hit.why, f"number {rank} of the nearest by vectors"))
        return [
            Hit(by_id[identity].product, score, by_id[identity].why)
            for identity, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        ]

    def get(self, identity: str) -> Product | None:
        """Return the product with the id `identity`, or None."""
        numbers = self._index.numbers([identity])
        return self._index.products(list(numbers.values()))[0][1] if numbers else None

    def values(self, text: str) -> list[tuple[str, str]]:
        """Return (name, value) of each brand, category or attribute with the value `text`: ("color", "Blue")."""
        rows = self._index.rows("SELECT name, value FROM facets WHERE key = ? ORDER BY docs DESC", (key(text),))
        return [(str(name), str(value)) for name, value in rows]

    def has(self, name: str, text: str) -> bool:
        """Return True if `text` is a value of "brand", "category" or the attribute `name`."""
        return any(known == name for known, _ in self.values(text))

    def all(self) -> Iterator[Product]:
        """Yield every product in the source's order; products added when the source was read again come last."""
        after = 0
        while rows := self._index.rows(
            "SELECT number FROM products WHERE number > ? ORDER BY number LIMIT 500", (after,)
        ):
            after = rows[-1][0]
            for _, item in sorted(self._index.products([row[0] for row in rows]), key=lambda row: row[0]):
                yield item

    def close(self) -> None:
        self._index.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def sample_path() -> Path:
    """Return the path of the bundled sample catalogue, whose products the bundled model recognises."""
    return Path(__file__).with_name("sample.jsonl")


def _notes(query: Query, search: Search) -> Iterator[str]:
    if search.unknown:
        yield f"no product has {', '.join(repr(word) for word in dict.fromkeys(search.unknown))}"
    if query.text.strip() and not search.terms and not search.unknown:
        yield "the query has no word to search by"


def _keeps(item: Product, query: Query) -> bool:
    exact = facets(item)
    if any((key(name), key(value)) not in exact for name, value in query.only.items()):
        return False
    low, high = query.min_price, query.max_price
    if low is None and high is None:
        return True
    return item.price is not None and (low is None or item.price >= low) and (high is None or item.price <= high)


def _numbered(rows: Iterable[Product | JsonMapping]) -> Iterator[tuple[int, Product | Problem]]:
    numbered = list(enumerate(rows, 1))
    read = read_file.products(lambda: (item for item in numbered if not isinstance(item[1], Product)))
    for line, row in numbered:
        yield (line, row) if isinstance(row, Product) else next(read)


def _index_path(source: Path | None) -> str:
    if source is None:
        return ":memory:"
    folder = cache_folder() / "catalogs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        log.warning("no folder for the index, keeping it in memory", error=str(exc))
        return ":memory:"
    mark = hashlib.blake2b(str(source.resolve()).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return str(folder / f"{source.stem}-{mark}.db")


def _with_bar(rows: Iterable[T], size: int, shown: bool | None) -> Iterator[T]:
    """Yield `rows` and show a progress bar; `shown` None shows it only for a file of many bytes on a terminal."""
    from tqdm.auto import tqdm

    silent = not (size > 2_000_000 and sys.stderr.isatty() if shown is None else shown)
    with tqdm(rows, desc="indexing", unit=" products", disable=silent, file=sys.stderr) as bar:
        yield from bar
