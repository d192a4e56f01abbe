"""Conversion of a picture's analysis and a customer's wish to a Query: prices, catalogue values, and words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.agent.catalog import prices
from qvl.agent.catalog.product import AnalysisRecord, Query
from qvl.agent.catalog.tokenize import STOP_WORDS, fold, key, singulars, words

if TYPE_CHECKING:
    from qvl.agent.catalog.catalog import Catalog
    from qvl.agent.catalog.product import Product

MAX_WISH: Final = 2000
_DIGITS: Final = r"(\d+(?:[.,'\u2019]\d+|[ \u00a0\u202f]\d{3}(?!\d))*)"
_NUMBER: Final = r"(?:eur|usd|rmb|us|r)?\s*[^\w\s]?\s*" + _DIGITS
_BELOW: Final = re.compile(
    r"(?:under|below|less than|cheaper than|up to|at most|no more than|max(?:imum)?|<=?|不超过|低于|最多|少于"
    r"|ate|menos de|abaixo de|hasta|por debajo de|debajo de|bajo)\s*" + _NUMBER
)
_BELOW_AFTER: Final = re.compile(_DIGITS + r"\s*(?:元|块|美元|欧元)?\s*(?:以下|以内|之内)")
_ABOVE: Final = re.compile(
    r"(?:over|above|more than|at least|min(?:imum)?|>=?|超过|高于|至少|mais de|acima de|mas de|por encima de)\s*"
    + _NUMBER
)
_ABOVE_AFTER: Final = re.compile(_DIGITS + r"\s*(?:元|块|美元|欧元)?\s*以上")
_BETWEEN: Final = re.compile(r"(?:between|from|entre|de)\s*" + _NUMBER + r"\s*(?:and|to|e|y|a|-)\s*" + _NUMBER)
_CHEAPER: Final = re.compile(r"\b(?:cheaper|less expensive|mais barat\w+|mas barat\w+)\b|便宜")
_DEARER: Final = re.compile(r"\b(?:more expensive|dearer|pricier|mais car[oa]s?|mas car[oa]s?)\b|更贵|贵一点")
_NOT: Final = frozenset({"not", "no", "without", "except", "nao", "sem", "sin", "不", "不要", "非"})
_TALK_WORDS: Final = (
    "euro euros eur usd dollars dollar price priced cost costs 元 块 呢 好 similar other another else any"
)
_TALK: Final = frozenset(_TALK_WORDS.split())


@dataclass(frozen=True, slots=True)
class Wish:
    """A Query, and the (name, value) pairs to exclude from its hits."""

    query: Query
    without: tuple[tuple[str, str], ...] = ()


def read_wish(
    text: str, catalog: Catalog, analysis: AnalysisRecord, before: Query | None = None, first: Product | None = None
) -> Wish:
    """Return the Query for a wish, and its exclusions.

    Args:
        analysis: the analysis of the picture; its category becomes a condition if the catalogue has that category.
        before: the Query of the previous turn; its conditions stay unless this wish replaces them.
        first: the best product of the previous turn, the reference price for "cheaper".
    """
    low, high, rest = _prices(fold(text[:MAX_WISH]))
    if first is not None and first.price is not None:
        if _CHEAPER.search(rest):
            high = max(0.0, round(first.price - 0.01, 2))
        if _DEARER.search(rest):
            low = round(first.price + 0.01, 2)
    rest = _DEARER.sub(" ", _CHEAPER.sub(" ", rest))
    only, without, other_words = _values(rest, catalog)
    query = _query_of(analysis, catalog) if before is None else before
    conditions = {**query.only, **only}
    attributes = {name: value for name, value in query.attributes.items() if key(name) not in conditions}
    if low is None and high is None:
        low, high = query.min_price, query.max_price
    elif before is not None:
        low = query.min_price if low is None and (query.min_price or 0) <= (high or 0) else low
        high = query.max_price if high is None and (query.max_price or float("inf")) >= (low or 0) else high
    if low is not None and high is not None and low > high:
        low, high = high, low
    return Wish(
        dataclasses.replace(
            query,
            text=" ".join([*([query.text] if query.text else []), *other_words]),
            brand=None if "brand" in conditions else query.brand,
            category=None if "category" in conditions else query.category,
            attributes=attributes,
            only=conditions,
            min_price=low,
            max_price=high,
        ),
        tuple(without),
    )


def relaxed(query: Query) -> Query:
    """Return the query with its `only` conditions turned into soft preferences; price conditions stay."""
    only = dict(query.only)
    return dataclasses.replace(
        query,
        brand=only.pop("brand", query.brand),
        category=only.pop("category", query.category),
        attributes={**query.attributes, **only},
        only={},
    )


def _query_of(analysis: AnalysisRecord, catalog: Catalog) -> Query:
    category = analysis.get("category") or ""
    known = bool(category) and catalog.has("category", category)
    return Query(
        brand=analysis.get("brand"),
        category=None if known else category or None,
        attributes={key(name): value for name, value in (analysis.get("attributes") or {}).items()},
        only={"category": category} if known else {},
    )


def _prices(text: str) -> tuple[float | None, float | None, str]:
    """Return (minimum price, maximum price, text without the prices)."""
    match = _BETWEEN.search(text)
    if match is not None:
        low, high = sorted((_number(match.group(1)), _number(match.group(2))))
        return low, high, text[: match.start()] + " " + text[match.end() :]
    bounds: dict[str, float] = {}
    for bound, pattern in (("high", _BELOW), ("high", _BELOW_AFTER), ("low", _ABOVE), ("low", _ABOVE_AFTER)):
        match = pattern.search(text)
        if match is not None:
            bounds[bound] = _number(match.group(1))
            text = text[: match.start()] + " " + text[match.end() :]
    return bounds.get("low"), bounds.get("high"), text


def _number(text: str) -> float:
    try:
        # Nobody wishes for a thousandth of a coin: where the sign may group digits, it does.
        return min(prices.read(text).value, 1e15)
    except ValueError:
        number = re.match(r"\d+(?:[.,]\d+)?", text)
        assert number is not None
        return min(float(number.group().replace(",", ".")), 1e15)


def _values(text: str, catalog: Catalog) -> tuple[dict[str, str], list[tuple[str, str]], list[str]]:
    """Return (conditions, exclusions, other words) of a wish without its prices."""
    pieces = [piece for word, cjk in words(text) for piece in (_cut(word, catalog) if cjk else [word])]
    only: dict[str, str] = {}
    without: list[tuple[str, str]] = []
    other_words: list[str] = []
    at, negated = 0, False
    while at < len(pieces):
        size, pair = _longest(pieces, at, catalog)
        if pair is not None and negated:
            without.append(pair)
        elif pair is not None:
            only[pair[0]] = pair[1]
        elif pieces[at] not in STOP_WORDS and pieces[at] not in _TALK and pieces[at] not in _NOT:
            other_words.append(pieces[at])
        negated = pieces[at] in _NOT
        at += size
    return only, without, other_words


def _longest(pieces: list[str], at: int, catalog: Catalog) -> tuple[int, tuple[str, str] | None]:
    """Return (number of pieces from `at` on, (name, value) in the catalogue that they match); the longest match."""
    for size in (3, 2, 1):
        text = " ".join(pieces[at : at + size])
        if at + size > len(pieces) or text in STOP_WORDS or text.isdigit():
            continue
        for spelling in (text, *(singulars(text) if size == 1 else ())):
            if pairs := catalog.values(spelling):
                return size, (key(pairs[0][0]), pairs[0][1])
    return 1, None


def _cut(run: str, catalog: Catalog) -> Iterator[str]:
    """Yield a Chinese run, split at the boundaries of catalogue values and negations."""
    at = start = 0
    while at < len(run):
        size = next((n for n in (6, 5, 4, 3, 2) if at + n <= len(run) and catalog.values(run[at : at + n])), 0)
        size = size or next((n for n in (2, 1) if run[at : at + n] in _NOT), 0)
        if size:
            if start < at:
                yield run[start:at]
            yield run[at : at + size]
            at = start = at + size
        else:
            at += 1
    if start < len(run):
        yield run[start:]
