"""Comparison of tantivy with SQLite's FTS5 for the catalogue, on the same products and queries.

    pip install tantivy
    python benchmarks/bench_catalog_tantivy.py --engine sqlite [--products 200000] [--folder FOLDER]
    python benchmarks/bench_catalog_tantivy.py --engine tantivy [--candidates 96]

tantivy has the tokens of qvl's own tokenizer, so that Chinese, plurals and reasons stay as they are. It picks the
candidates by BM25 and the weights of exact values; qvl scores them and adds reasons. With `--candidates 5` its own
order is the result. Recall is measured on the sample catalogue, as in tests/agent/catalog/test_catalog.py.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tantivy
from bench_catalog import queries, write
from tantivy import Occur
from tantivy import Query as Expression

from qvl.agent.catalog import read_file
from qvl.agent.catalog.catalog import Catalog, sample_path
from qvl.agent.catalog.index import facets, text_fields
from qvl.agent.catalog.product import Hit, Product, Query
from qvl.agent.catalog.ranking import MAX_GRAMS, MOST, Search, Term
from qvl.agent.catalog.tokenize import facet_token, grams, key, tokens

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.agent.catalog.test_catalog import held_out


def schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("id", tokenizer_name="raw", index_option="basic")
    builder.add_bytes_field("row", stored=True)
    builder.add_text_field("body", tokenizer_name="spaces", index_option="freq")
    builder.add_text_field("exact", tokenizer_name="spaces", index_option="basic")
    builder.add_text_field("value", tokenizer_name="raw", index_option="basic")
    builder.add_unsigned_field("number", indexed=True, fast=True)
    builder.add_float_field("price", fast=True)
    return builder.build()


class TantivyCatalog:
    """What a `Catalog` on tantivy would do, without updates and counts."""

    def __init__(self, folder: Path, products: Iterable[Product] | None, candidates: int) -> None:
        folder.mkdir(exist_ok=True)
        self.candidates = candidates
        self.index = tantivy.Index(schema(), path=str(folder))
        spaces = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build()
        self.index.register_tokenizer("spaces", spaces)
        self.schema = self.index.schema
        if products is not None:
            self._fill(folder, products)
        self.searcher = self.index.searcher()
        self.totals: tuple[int, int] = tuple(json.loads((folder / "totals.json").read_text()))

    def _fill(self, folder: Path, products: Iterable[Product]) -> None:
        writer = self.index.writer()
        number = length = 0
        for number, item in enumerate(products, 1):
            row = json.dumps(item.to_json(), ensure_ascii=False, separators=(",", ":")).encode()
            body = [token for text in text_fields(item).values() for token in tokens(text)]
            length += len(body)
            document = tantivy.Document()
            document.add_text("id", item.id)
            document.add_bytes("row", row)
            document.add_text("body", " ".join(body))
            document.add_text("exact", " ".join(facet_token(*pair) for pair in facets(item)))
            for (name, value), spelling in facets(item).items():
                document.add_text("value", f"{value}\t{name}\t{spelling}")
            document.add_unsigned("number", number)
            if item.price is not None:
                document.add_float("price", item.price)
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        self.index.reload()
        (folder / "totals.json").write_text(json.dumps([number, length]))

    def search(self, query: Query, limit: int) -> list[Hit]:
        search = TantivySearch(self, query)
        rows = [bytes(self.searcher.doc(address)["row"][0]) for address in search.addresses(self.candidates)]
        hits = [search.hit(Product.from_json(json.loads(row))) for row in rows]
        if self.candidates > limit:
            hits.sort(key=lambda hit: (-hit.score, hit.product.price or 0.0, hit.product.id))
        return hits[:limit]


class TantivySearch(Search):
    """The same terms, reasons and scores, with tantivy's counts and candidates."""

    def __init__(self, catalog: TantivyCatalog, query: Query) -> None:
        self.searcher, self.schema = catalog.searcher, catalog.schema
        super().__init__(catalog, query)  # type: ignore[arg-type] # of an index it reads `totals` alone

    def _docs(self, tokens: Sequence[str]) -> dict[str, int]:
        counts = {token: self.searcher.doc_freq(_field(token), token) for token in tokens}
        return {token: docs for token, docs in counts.items() if docs}

    def _starting(self, start: str, most: int) -> dict[str, int]:
        return dict(sorted(self.searcher.terms_with_prefix("body", start, limit=most)))

    def addresses(self, limit: int) -> list[tantivy.DocAddress]:
        must = [Expression.const_score_query(self._exact(term), 0.0) for term in self.only]
        low, high = self.query.min_price, self.query.max_price
        if self._priced:
            prices = Expression.range_query(self.schema, "price", tantivy.FieldType.Float, low, high)
            must.append(Expression.const_score_query(prices, 0.0))
        parts = [(Occur.Must, expression) for expression in must]
        parts += [(Occur.Should, self._expression(term)) for term in self.terms]
        if not parts:
            return []
        hits = self.searcher.search(Expression.boolean_query(parts), limit=limit, count=False).hits
        return [address for _, address in hits]

    def _exact(self, term: Term) -> Expression:
        token = facet_token(term.name, key(term.label))
        return Expression.term_query(self.schema, "exact", token, "basic")

    def _expression(self, term: Term) -> Expression:
        if term.name:
            return Expression.const_score_query(self._exact(term), term.gain(self.total))
        threes = [gram for gram in grams(term.label) if len(gram) == 3]
        words = term.spellings or threes or self._starting(term.label, MAX_GRAMS)
        occur = Occur.Must if threes and not term.spellings else Occur.Should
        return Expression.boolean_query(
            [(occur, Expression.term_query(self.schema, "body", word, "freq")) for word in words]
        )


def _field(token: str) -> str:
    return "exact" if token.startswith("qf") else "body"


def recall(products: list[Product], search: Callable[[Query, int], list[Hit]]) -> float:
    questions = held_out(products)
    return sum(wanted in [hit.product.id for hit in search(query, 3)] for query, _, wanted in questions) / len(
        questions
    )


def measure(search: Callable[[Query, int], list[Hit]], number: int) -> None:
    times: dict[str, list[float]] = {}
    score = 0.0
    for kind, query in queries(random.Random(11), number):
        began = time.perf_counter()
        hits = search(query, 5)
        times.setdefault(kind, []).append((time.perf_counter() - began) * 1000)
        score += sum(hit.score for hit in hits)
    print(f"{'query':20} {'median ms':>10} {'p95 ms':>10}")
    everything = [value for group in times.values() for value in group]
    for kind, group in [*times.items(), ("all", everything)]:
        print(f"{kind:20} {statistics.median(group):10.2f} {sorted(group)[int(len(group) * 0.95)]:10.2f}")
    print(f"scores of all hits together {score:.0f}")


def resident() -> str:
    """Return the resident memory now and at its highest, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"resident {pages * resource.getpagesize() / 2**20:.0f} MiB, at most {peak / 2**10:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sqlite", "tantivy"), required=True)
    parser.add_argument("--products", type=int, default=200_000)
    parser.add_argument("--candidates", type=int, default=MOST)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        source, index = folder / "catalogue.jsonl", folder / f"index-{options.engine}"
        if not source.exists():
            write(source, options.products)
        began, new = time.perf_counter(), not index.exists()

        def open_catalog(path: Path, index: Path, new: bool) -> Catalog | TantivyCatalog:
            if options.engine == "sqlite":
                return Catalog(path, index=index)
            rows = (item for _, item in read_file.read(path) if isinstance(item, Product)) if new else None
            return TantivyCatalog(index, rows, options.candidates)

        def search(catalog: Catalog | TantivyCatalog) -> Callable[[Query, int], list[Hit]]:
            if isinstance(catalog, TantivyCatalog):
                return catalog.search
            return lambda query, limit: list(catalog.search(query, limit=limit).hits)

        if new:
            open_catalog(source, index, new)
            print(f"indexed in {time.perf_counter() - began:.1f} s, {resident()}")
        files = [index] if index.is_file() else list(index.iterdir())
        print(f"on disk {sum(file.stat().st_size for file in files) / 2**20:.0f} MiB")
        began = time.perf_counter()
        catalog = open_catalog(source, index, False)
        print(f"opened in {(time.perf_counter() - began) * 1000:.1f} ms, {resident()}")
        measure(search(catalog), options.queries)
        print(resident())
        sample = open_catalog(sample_path(), Path(made) / "sample", True)
        with Catalog(sample_path(), index=":memory:") as products:
            print(f"recall at 3 {recall(list(products.all()), search(sample)):.3f}")


if __name__ == "__main__":
    main()
