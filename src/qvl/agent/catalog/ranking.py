"""Ranking of the products that match a query, with the reasons.

A search scores a bounded number of candidates, however large the catalogue is: first those with all terms of the
query, then those without its least informative term, and so on until there are enough. The score is BM25 (k1 1.2,
b 0.75, as in FTS5) with weights by field, plus a weight for exact values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Final

from qvl.agent.catalog.index import BUCKETS, Index, facets, price_bucket, price_token, text_fields
from qvl.agent.catalog.product import Hit, Product, Query
from qvl.agent.catalog.tokenize import STOP_WORDS, facet_token, fold, grams, key, singulars, tokens, words

POOL: Final = 64
MOST: Final = 96
MAX_TERMS: Final = 10
MAX_WORDS: Final = 40
MAX_TEXT: Final = 2000
MAX_SPELLINGS: Final = 12
MAX_GRAMS: Final = 150
SELECTIVE: Final = 0.1
FIELD_WEIGHTS: Final = {"name": 2.0, "brand": 1.5, "category": 1.5, "attributes": 1.2, "more": 0.7, "id": 2.0}
EXACT_WEIGHTS: Final = {"brand": 5.0, "category": 6.0}
EXACT_ATTRIBUTE: Final = 3.0
K1: Final = 1.2
B: Final = 0.75


@dataclass(frozen=True, slots=True)
class Term:
    """One search term: `match` is its FTS5 expression, `docs` the approximate number of products that have it.

    An exact value has the `name` of its field ("brand", "color"), a word its `spellings`; Chinese text has neither.
    """

    label: str
    match: str
    docs: int
    name: str = ""
    spellings: frozenset[str] = frozenset()

    def gain(self, total: int) -> float:
        """Return the term's weight among `total` products: a constant for an exact value, else BM25's IDF."""
        return EXACT_WEIGHTS.get(self.name, EXACT_ATTRIBUTE) if self.name else idf(self.docs, total)


def idf(docs: int, total: int) -> float:
    return max(0.05, math.log((total - docs + 0.5) / (docs + 0.5) + 1.0))


class Search:
    """One search. `terms` are the query's terms that occur in the index, `unknown` its words that no product has."""

    def __init__(self, index: Index, query: Query) -> None:
        self.index = index
        self.query = query
        self.total, self.length = index.totals
        self.unknown: list[str] = []
        only = ((key(name), value) for name, value in query.only.items())
        self.only = [Term(value, f'"{facet_token(name, key(value))}"', 0, name) for name, value in only]
        self.terms = self._terms()
        self._words_of_terms: dict[str, list[tuple[int, float]]] = {}
        self._pieces_of_terms: list[tuple[int, str]] = []
        for number, term in enumerate(self.terms):
            for word in term.spellings:
                self._words_of_terms.setdefault(word, []).append((number, 1.0 if word == term.label else 0.6))
            if not term.name and not term.spellings:
                self._pieces_of_terms.append((number, term.label))

    def _terms(self) -> list[Term]:
        query = self.query
        terms: dict[str, Term] = {}
        for name, value in (("brand", query.brand), ("category", query.category), *query.attributes.items()):
            if not value or not key(value):
                continue
            token = facet_token(key(name), key(value))
            docs = self._docs([token]).get(token, 0)
            if docs:
                terms[token] = Term(value, f'"{token}"', docs, name=key(name))
            elif (key(name), key(value)) not in {("count", str(n)) for n in range(10)}:
                # A value that the catalogue does not have as such may still be in its texts, as in another language.
                for term in self._words(value):
                    terms.setdefault(term.match, term)
        for term in self._words(query.text):
            terms.setdefault(term.match, term)
        return sorted(terms.values(), key=lambda term: -term.gain(self.total))[:MAX_TERMS]

    def _words(self, text: str) -> Iterator[Term]:
        for word, cjk in islice(dict.fromkeys(words(fold(text[:MAX_TEXT]))), MAX_WORDS):
            if cjk:
                yield from self._pieces(word)
            elif word not in STOP_WORDS:
                yield from self._word(word)

    def _word(self, word: str) -> Iterator[Term]:
        docs = self._docs([word, *singulars(word)])
        if len(word) > 2:
            docs.update(self._starting(word, MAX_SPELLINGS))
        if docs:
            most = max(docs.get(word, 0), *docs.values())
            yield Term(word, _either(docs), most, spellings=frozenset(docs))
        else:
            self.unknown.append(word)

    def _pieces(self, run: str) -> Iterator[Term]:
        """Yield the longest parts of a Chinese run that the catalogue has, of two characters or more."""
        if len(run) == 1:
            docs = self._starting(run, MAX_GRAMS) if run not in STOP_WORDS else {}
            if docs:
                yield Term(run, _either(docs), sum(docs.values()))
            return
        pairs = [self._starting(run[at : at + 2], MAX_GRAMS) for at in range(len(run) - 1)]
        at = 0
        while at < len(pairs):
            end = at
            while end < len(pairs) and pairs[end] and (end == at or self._starting(run[end - 1 : end + 2], 1)):
                end += 1
            if end == at:
                at += 1
                continue
            piece = run[at : end + 1]
            rarest = min(sum(docs.values()) for docs in pairs[at:end])
            threes = [gram for gram in grams(piece) if len(gram) == 3]
            match = " AND ".join(f'"{gram}"' for gram in threes) if threes else _either(pairs[at])
            yield Term(piece, f"({match})", rarest)
            at = end
        if not any(pairs):
            self.unknown.append(run)

    def _docs(self, tokens: Sequence[str]) -> dict[str, int]:
        marks = ",".join("?" * len(tokens))
        return dict(self.index.rows(f"SELECT term, docs FROM terms WHERE term IN ({marks})", tokens))  # noqa: S608 - question marks

    def _starting(self, start: str, most: int) -> dict[str, int]:
        """Return the document frequencies of the first `most` tokens that start with `start`."""
        return dict(
            self.index.rows(
                "SELECT term, docs FROM terms WHERE term >= ? AND term < ? LIMIT ?", (start, start + "\U0010ffff", most)
            )
        )

    def candidates(self, enough: int) -> list[int]:
        """Return row numbers of products that meet every condition, most terms first: `enough` or more if there are."""
        if not self.terms:
            return self._matching([], POOL) if self.only or self._priced else []
        numbers: dict[int, None] = {}
        for size in range(len(self.terms), 0, -1):
            for part in self._parts(size):
                for number in self._matching(part, POOL):
                    numbers.setdefault(number)
                if len(numbers) >= MOST:
                    break
            if len(numbers) >= enough:
                break
        if len(numbers) < enough and self.only:
            # What keeps the conditions is worth showing, also when it has nothing else that was wished for.
            numbers.update(dict.fromkeys(self._matching([], POOL)))
        return list(islice(numbers, MOST))

    def count(self) -> int:
        """Return the number of products that meet every condition and have at least one term; slow in a large index."""
        if not self.terms and not self.only and not self._priced:
            return 0
        expressions = [term.match for term in self.only]
        if self.terms:
            expressions.append("(" + " OR ".join(f"({term.match})" for term in self.terms) + ")")
        sql, values = self._select("count(*)", expressions)
        return int(self.index.rows(sql, values)[0][0])

    def _parts(self, size: int) -> Iterator[Sequence[Term]]:
        """Yield the sets of terms to query: all subsets of few terms, else those of the most informative ones."""
        if math.comb(len(self.terms), size) <= 10:
            yield from combinations(self.terms, size)
        else:
            yield self.terms[:size]

    @property
    def _priced(self) -> bool:
        return self.query.min_price is not None or self.query.max_price is not None

    def _matching(self, terms: Sequence[Term], limit: int) -> list[int]:
        # FTS5 walks the terms in order and skips ahead, so the rarest goes first.
        expressions = [term.match for term in (*self.only, *sorted(terms, key=lambda term: term.docs))]
        order = "" if expressions else " ORDER BY price" if self._priced else " ORDER BY number"
        sql, values = self._select("rowid", expressions)
        return [row[0] for row in self.index.rows(f"{sql}{order} LIMIT ?", [*values, limit])]

    def _select(self, column: str, expressions: Sequence[str]) -> tuple[str, list[str | float]]:
        """Return (SQL, parameters) for products with all `expressions` in the price range; no order or limit."""
        low, high = self.query.min_price, self.query.max_price
        conditions: list[str] = []
        values: list[str | float] = []
        if expressions:
            conditions.append("documents MATCH ?")
            values.append(" AND ".join([*expressions, *(self._buckets(low, high) if self._priced else ())]))
        if low is not None:
            conditions.append("price >= ?")
            values.append(low)
        if high is not None:
            conditions.append("price <= ?")
            values.append(high)
        table = "documents" if expressions else "products"
        sql = f"SELECT {column.replace('rowid', f'{table}.rowid')} FROM {table}"  # noqa: S608 - names of our own
        if expressions and self._priced:
            sql += " CROSS JOIN products ON products.number = documents.rowid"
        return f"{sql} WHERE {' AND '.join(conditions) or 'TRUE'}", values

    def _buckets(self, low: float | None, high: float | None) -> Iterator[str]:
        """Yield an FTS5 expression for the price buckets of the range, if they exclude most products."""
        first, last = price_bucket(low or 0), BUCKETS - 1 if high is None else price_bucket(high)
        docs = self._docs([price_token(bucket) for bucket in range(first, last + 1)])
        # Walking their posting lists costs more than looking up a price, unless they are short.
        if sum(docs.values()) <= SELECTIVE * self.total:
            yield _either(docs) if docs else f'"{price_token(last)}"'

    def hit(self, item: Product) -> Hit:
        """Return the product with its score and the reasons for it."""
        exact = facets(item)
        occurrences, norm = self._occurrences(item)
        score, why = 0.0, []
        for number, term in enumerate(self.terms):
            if term.name:
                spelling = exact.get((term.name, key(term.label)))
                if spelling is not None:
                    score += term.gain(self.total) + 0.1 * idf(term.docs, self.total)
                    why.append(f"{term.name} is {spelling}")
                continue
            weight, where = occurrences.get(number, (0.0, ""))
            if weight:
                score += term.gain(self.total) * weight * (K1 + 1) / (weight + norm)
                name, spelling = _spelled(term.label, exact)
                if name:
                    score += EXACT_WEIGHTS.get(name, EXACT_ATTRIBUTE)
                why.append(f"{name} is {spelling}" if name else f"{where} has {term.label!r}")
        why += [f"{term.name} is {exact[term.name, key(term.label)]}" for term in self.only]
        return Hit(item, score, (*dict.fromkeys(why), *self._price_reason(item)))

    def _occurrences(self, item: Product) -> tuple[dict[int, tuple[float, str]], float]:
        """Return ({word number: (weighted frequency, best field)}, BM25's length normalisation) of a product."""
        occurrences: dict[int, tuple[float, str]] = {}
        if not self._words_of_terms and not self._pieces_of_terms:
            return occurrences, 0.0
        best: dict[int, float] = {}
        size = 0
        for name, text in text_fields(item).items():
            if not text:
                continue
            weight = FIELD_WEIGHTS[name]
            pieces = tokens(text)
            size += len(pieces)
            times: dict[int, float] = {}
            for piece in pieces:
                for number, fit in self._words_of_terms.get(piece, ()):
                    times[number] = times.get(number, 0.0) + fit
            if self._pieces_of_terms:
                folded = fold(text)
                times.update((number, float(folded.count(label))) for number, label in self._pieces_of_terms)
            for number, count in times.items():
                if not count:
                    continue
                total, where = occurrences.get(number, (0.0, ""))
                if count * weight > best.get(number, 0.0):
                    best[number], where = count * weight, name if name != "more" else "text"
                occurrences[number] = (total + count * weight, where)
        return occurrences, K1 * (1 - B + B * size / max(1.0, self.length / max(1, self.total)))

    def _price_reason(self, item: Product) -> list[str]:
        if not self._priced:
            return []
        low, high = self.query.min_price, self.query.max_price
        bounds = [f"from {low:g}"] if low is not None else []
        bounds += [f"up to {high:g}"] if high is not None else []
        return [f"price {item.price_text} is {' '.join(bounds)}"]


def _spelled(label: str, exact: Mapping[tuple[str, str], str]) -> tuple[str, str]:
    """Return (name, spelling) of the exact value that a word equals ("mugs" is the category mug), or ("", "")."""
    forms = (label, *singulars(label))
    return next(((name, spelling) for (name, value), spelling in exact.items() if value in forms), ("", ""))


def _either(tokens: Iterable[str]) -> str:
    return "(" + " OR ".join(f'"{token}"' for token in tokens) + ")"
