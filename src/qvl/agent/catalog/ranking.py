"""Which products match, in which order, and why.

A search looks at a bounded number of candidates, however large the catalogue is: first those that have everything
asked for, then those that lack the least telling part, and so on until there are enough. They are scored by BM25
(k1 1.2, b 0.75, as in FTS5) with weights by field, and by what they match exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, Final

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
    """One thing to look for: `match` is its FTS5 expression, `docs` about how many products have it.

    A facet has a `name`; a word has the `spellings` that count as it; a Chinese piece is found as it stands.
    """

    label: str
    match: str
    docs: int
    name: str = ""
    spellings: frozenset[str] = frozenset()

    def gain(self, total: int) -> float:
        """How much it tells: the weight of an exact value, or BM25's inverse document frequency."""
        if self.name:
            return EXACT_WEIGHTS.get(self.name, EXACT_ATTRIBUTE)
        return idf(self.docs, total)


def idf(docs: int, total: int) -> float:
    return max(0.05, math.log((total - docs + 0.5) / (docs + 0.5) + 1.0))


class Search:
    """One search: `terms` are what can be found, `unknown` the words that no product has."""

    def __init__(self, index: Index, query: Query) -> None:
        self.index = index
        self.query = query
        self.total, self.length = index.totals
        self.unknown: list[str] = []
        self.only = [_facet(name, value) for name, value in query.only.items()]
        self.terms = self._terms()
        self._words_wanted: dict[str, list[tuple[int, float]]] = {}
        self._pieces_wanted: list[tuple[int, str]] = []
        for number, term in enumerate(self.terms):
            for word in term.spellings:
                self._words_wanted.setdefault(word, []).append((number, 1.0 if word == term.label else 0.6))
            if not term.name and not term.spellings:
                self._pieces_wanted.append((number, term.label))

    def _terms(self) -> list[Term]:
        wanted = [("brand", self.query.brand), ("category", self.query.category), *self.query.attributes.items()]
        found: dict[str, Term] = {}
        for name, value in wanted:
            if not value or not key(value):
                continue
            token = facet_token(key(name), key(value))
            docs = self._docs([token]).get(token, 0)
            if docs:
                found[token] = Term(value, f'"{token}"', docs, name=key(name))
            elif (key(name), key(value)) not in {("count", str(n)) for n in range(10)}:
                # A value that the catalogue does not have as such may still be in its texts, as in another language.
                for term in self._words(value):
                    found.setdefault(term.match, term)
        for term in self._words(self.query.text):
            found.setdefault(term.match, term)
        ordered = sorted(found.values(), key=lambda term: -term.gain(self.total))
        return ordered[:MAX_TERMS]

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
        """The parts of a Chinese run that the catalogue has, as long as they can be, of two characters or more."""
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
            rarest = min(sum(found.values()) for found in pairs[at:end])
            threes = [gram for gram in grams(piece) if len(gram) == 3]
            match = " AND ".join(f'"{gram}"' for gram in threes) if threes else _either(pairs[at])
            yield Term(piece, f"({match})", rarest)
            at = end
        if not any(pairs):
            self.unknown.append(run)

    def _docs(self, found: Sequence[str]) -> dict[str, int]:
        marks = ",".join("?" * len(found))
        return dict(self.index.rows(f"SELECT term, docs FROM terms WHERE term IN ({marks})", found))  # noqa: S608 - question marks

    def _starting(self, start: str, most: int) -> dict[str, int]:
        """Tokens that start with `start`, the first `most` in order."""
        return dict(
            self.index.rows(
                "SELECT term, docs FROM terms WHERE term >= ? AND term < ? LIMIT ?", (start, start + "\U0010ffff", most)
            )
        )

    def candidates(self, enough: int) -> list[int]:
        """Row numbers of products that keep every condition; those with more of the terms come first."""
        if not self.terms:
            return self._matching([], POOL) if self.only or self._priced else []
        found: dict[int, None] = {}
        for size in range(len(self.terms), 0, -1):
            for part in self._parts(size):
                for number in self._matching(part, POOL):
                    found.setdefault(number)
                if len(found) >= MOST:
                    break
            if len(found) >= enough:
                break
        if len(found) < enough and self.only:
            # What keeps the conditions is worth showing, also when it has nothing else that was wished for.
            found.update(dict.fromkeys(self._matching([], POOL)))
        return list(islice(found, MOST))

    def count(self) -> int:
        """How many products keep every condition and have at least one of the terms; reads whole posting lists."""
        if not self.terms and not self.only and not self._priced:
            return 0
        asked = [term.match for term in self.only]
        if self.terms:
            asked.append("(" + " OR ".join(f"({term.match})" for term in self.terms) + ")")
        sql, values = self._select("count(*)", asked)
        return int(self.index.rows(sql, values)[0][0])

    def _parts(self, size: int) -> Iterator[Sequence[Term]]:
        """Which terms to ask for together: all subsets while they are few, else what tells most."""
        if math.comb(len(self.terms), size) <= 10:
            yield from combinations(self.terms, size)
        else:
            yield self.terms[:size]

    @property
    def _priced(self) -> bool:
        return self.query.min_price is not None or self.query.max_price is not None

    def _matching(self, terms: Sequence[Term], limit: int) -> list[int]:
        # FTS5 walks the terms in order and skips ahead, so the rarest goes first.
        asked = [*(term.match for term in self.only), *(t.match for t in sorted(terms, key=lambda term: term.docs))]
        order = "" if asked else " ORDER BY price" if self._priced else " ORDER BY number"
        sql, values = self._select("rowid", asked)
        return [row[0] for row in self.index.rows(f"{sql}{order} LIMIT ?", [*values, limit])]

    def _select(self, wanted: str, asked: Sequence[str]) -> tuple[str, list[Any]]:
        """(SELECT without order and limit, its values) of products with all of `asked` and in the range of prices."""
        low, high = self.query.min_price, self.query.max_price
        asked = [*asked, *(self._buckets(low, high) if asked and self._priced else ())]
        conditions: list[str] = []
        values: list[Any] = []
        if asked:
            conditions.append("documents MATCH ?")
            values.append(" AND ".join(asked))
        if low is not None:
            conditions.append("price >= ?")
            values.append(low)
        if high is not None:
            conditions.append("price <= ?")
            values.append(high)
        table = "documents" if asked else "products"
        sql = f"SELECT {wanted.replace('rowid', f'{table}.rowid')} FROM {table}"  # noqa: S608 - names of our own
        if asked and self._priced:
            sql += " CROSS JOIN products ON products.number = documents.rowid"
        return f"{sql} WHERE {' AND '.join(conditions) or 'TRUE'}", values

    def _buckets(self, low: float | None, high: float | None) -> Iterator[str]:
        """An expression for the range's buckets of prices, where they leave most products out."""
        first, last = price_bucket(low or 0), BUCKETS - 1 if high is None else price_bucket(high)
        found = self._docs([price_token(bucket) for bucket in range(first, last + 1)])
        # Walking their posting lists costs more than looking up a price, unless they are short.
        if sum(found.values()) <= SELECTIVE * self.total:
            yield _either(found) if found else f'"{price_token(last)}"'

    def hit(self, item: Product) -> Hit:
        """The product with its score and the reasons for it."""
        exact = facets(item)
        found, norm = self._occurrences(item)
        score, why = 0.0, []
        for number, term in enumerate(self.terms):
            if term.name:
                spelling = exact.get((term.name, key(term.label)))
                if spelling is not None:
                    score += term.gain(self.total) + 0.1 * idf(term.docs, self.total)
                    why.append(f"{term.name} is {spelling}")
                continue
            weight, where = found.get(number, (0.0, ""))
            if weight:
                score += term.gain(self.total) * weight * (K1 + 1) / (weight + norm)
                name, spelling = _spelled(term.label, exact)
                if name:
                    score += EXACT_WEIGHTS.get(name, EXACT_ATTRIBUTE)
                why.append(f"{name} is {spelling}" if name else f"{where} has {term.label!r}")
        why += [f"{term.name} is {exact[term.name, key(term.label)]}" for term in self.only]
        return Hit(item, score, (*dict.fromkeys(why), *self._price_reason(item)))

    def _occurrences(self, item: Product) -> tuple[dict[int, tuple[float, str]], float]:
        """For the number of each word that occurs: (how often, weighted by field and fit; the field that says it best).

        The second value is BM25's normalisation by the length of the product's text.
        """
        found: dict[int, tuple[float, str]] = {}
        if not self._words_wanted and not self._pieces_wanted:
            return found, 0.0
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
                for number, fit in self._words_wanted.get(piece, ()):
                    times[number] = times.get(number, 0.0) + fit
            if self._pieces_wanted:
                folded = fold(text)
                times.update((number, float(folded.count(label))) for number, label in self._pieces_wanted)
            for number, count in times.items():
                if not count:
                    continue
                total, where = found.get(number, (0.0, ""))
                if count * weight > best.get(number, 0.0):
                    best[number], where = count * weight, name if name != "more" else "text"
                found[number] = (total + count * weight, where)
        return found, K1 * (1 - B + B * size / max(1.0, self.length / max(1, self.total)))

    def _price_reason(self, item: Product) -> list[str]:
        if not self._priced:
            return []
        low, high = self.query.min_price, self.query.max_price
        bounds = [f"from {low:g}"] if low is not None else []
        bounds += [f"up to {high:g}"] if high is not None else []
        return [f"price {item.price_text} is {' '.join(bounds)}"]


def _spelled(label: str, exact: Mapping[tuple[str, str], str]) -> tuple[str, str]:
    """(name, spelling) of the exact value that a word of the query is, or empty ones: "mugs" is the category mug."""
    forms = (label, *singulars(label))
    return next(((name, spelling) for (name, value), spelling in exact.items() if value in forms), ("", ""))


def _facet(name: str, value: str) -> Term:
    token = facet_token(key(name), key(value))
    return Term(value, f'"{token}"', 0, name=key(name))


def _either(found: dict[str, int]) -> str:
    return "(" + " OR ".join(f'"{token}"' for token in found) + ")"
