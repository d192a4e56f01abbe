"""Reader of catalogue files (JSON, JSON lines, CSV): yields products, and invalid rows with their line.

Columns: `id` and `name` (needed), `brand`, `category`, `price`, `attributes`, `picture`, `url`. Others are kept. In
CSV, attributes are a column each (`attributes.color`), or one column with `color=red; size=42` or JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Final, TypeAlias

from qvl.agent.catalog import prices, tables
from qvl.agent.catalog.product import Problem, Product
from qvl.errors import ConfigError

Rows: TypeAlias = Iterable[tuple[int, object]]
KNOWN: Final = ("id", "name", "brand", "category", "price", "attributes", "picture", "url")
FORMATS: Final = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
# Raised where the same bytes are read as other products: an index of an older one is read anew.
VERSION: Final = 3
MAX_CELL: Final = 100_000
MAX_DEPTH: Final = 100
_SPACE: Final = re.compile(r"[\s,]*")


def read(path: Path) -> Iterator[tuple[int, Product | Problem]]:
    """Yield (line, product or problem) for every row of `path`, one at a time.

    Raises:
        ConfigError: the file does not exist, or its format is unknown or does not match its content.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path.name} is not a catalogue", hint=f"a file named {', '.join(FORMATS)}", param="catalog")

    def rows() -> Iterator[tuple[int, object]]:
        with tables.open_text(path) as file:
            if kind in (".csv", ".tsv"):
                yield from tables.csv_rows(file, kind)
            else:
                yield from _json(file.read(), path.name) if kind == ".json" else _json_lines(file)

    try:
        yield from products(rows)
    except OSError as exc:
        raise ConfigError(
            f"the catalogue {path} cannot be read: {exc.strerror or exc}", hint="name a JSON, JSONL or CSV file"
        ) from exc


def products(rows: Callable[[], Rows]) -> Iterator[tuple[int, Product | Problem]]:
    """Yield (line, product or problem) for every row of `rows()`, called again if a price is ambiguous."""
    column = _PriceColumn(rows)
    for line, row in rows():
        try:
            yield line, row if isinstance(row, Problem) else _product(row, column)
        except ValueError as exc:
            yield line, Problem(line, str(exc))


class _PriceColumn:
    """The decimal separator of a file's prices; the whole column is scanned when a price is ambiguous."""

    def __init__(self, rows: Callable[[], Rows]) -> None:
        self._rows = rows

    @cached_property
    def decimal(self) -> str | None:
        rows = (row for _, row in self._rows() if isinstance(row, Mapping))
        cells = (next((row[name] for name in row if str(name).strip().lower() == "price"), None) for row in rows)
        return prices.decimal_sign(cell for cell in cells if isinstance(cell, str))


def _json_lines(file: IO[str]) -> Iterator[tuple[int, object]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except (ValueError, RecursionError) as exc:
            yield line, Problem(line, f"the row is not JSON: {_reason(exc)}")


def _json(text: str, name: str) -> Iterator[tuple[int, object]]:
    """Yield (line, item) of a JSON list, or of the list under "products"."""
    if not text.strip():
        return
    opening = re.match(r'\s*(?:\{\s*"products"\s*:\s*)?\[', text)
    if opening is None:
        raise ConfigError(f"{name} is not a list of products", hint='a JSON list, or {"products": [...]}')
    decoder = json.JSONDecoder()
    at, line, counted = opening.end(), 1, 0
    while True:
        skipped = _SPACE.match(text, at)
        at = skipped.end() if skipped else at
        if at >= len(text) or text[at] == "]":
            if at >= len(text):
                yield line, Problem(line + text.count("\n", counted, at), "the list is not closed; rows may be missing")
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as exc:
            # Without a delimiter to trust there is no telling where the next row starts.
            yield line, Problem(line, f"the row is not JSON, and nothing after it was read: {_reason(exc)}")
            return
        yield line, row


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _product(row: object, column: _PriceColumn) -> Product:
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is a {type(row).__name__}, not an object")
    extra = {str(name).strip(): value for name, value in row.items()}
    spellings = {name.lower(): name for name in reversed(list(extra))}
    known = {name: extra.pop(spellings[name]) for name in KNOWN if name in spellings}
    if deep := next((name for name, value in row.items() if _is_deep(value)), None):
        raise ValueError(f"{str(deep)[:40]} is nested too deeply")
    attributes = _attributes(known.get("attributes"))
    for name in list(extra):
        prefix, _, inner = name.partition(".")
        if inner and prefix.lower() in ("attributes", "attribute", "attr"):
            value = _text(extra.pop(name), name)
            if value is not None:
                attributes[inner] = value
    identity, title = _text(known.get("id"), "id"), _text(known.get("name"), "name")
    if identity is None:
        raise ValueError("the row has no id")
    if title is None:
        raise ValueError(f"product {identity!r} has no name")
    extra = {name: value for name, value in extra.items() if name and value not in (None, "")}
    cost = known.get("price")
    price = _price(cost, column)
    has_column = any(name.lower() == "currency" for name in extra)
    if isinstance(cost, str) and cost.strip() and not has_column and (currency := prices.read(cost).currency):
        extra["currency"] = currency
    return Product(
        id=identity,
        name=title,
        brand=_text(known.get("brand"), "brand"),
        category=_text(known.get("category"), "category"),
        price=price,
        attributes=attributes,
        picture=_text(known.get("picture"), "picture"),
        url=_text(known.get("url"), "url"),
        extra=extra,
    )


def _is_deep(value: object, depth: int = 0) -> bool:
    """True if `value` is nested too deeply for later JSON parsing and writing."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return depth == MAX_DEPTH or any(_is_deep(item, depth + 1) for item in inner)


def _text(value: object, column: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{column} is a {type(value).__name__}, not text")
    text = " ".join(str(value).split())
    if len(text) > MAX_CELL:
        raise ValueError(f"{column} has {len(text)} characters, more than the {MAX_CELL} allowed")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{column} has a lone surrogate, which is not a character") from exc
    return text or None


def _price(value: object, column: _PriceColumn) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        number = _price_in(value, column)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"price is a {type(value).__name__}, not a number")
    else:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"price {str(value)[:40]} must be 0 or more")
    return number


def _price_in(text: str, column: _PriceColumn) -> float:
    try:
        amount = prices.read(text)
    except ValueError as exc:
        raise ValueError(f"price {text[:40]!r} cannot be read: {exc}") from exc
    number = amount.value if amount.fraction is None else amount.under(column.decimal)
    if number is None:
        raise ValueError(
            f"price {text[:40]!r} is ambiguous: {amount.value:g} or {amount.fraction:g}, and the other prices do not "
            f"show which; write {amount.value:.2f} or {amount.fraction:.4f}"
        )
    return number


def _attributes(value: object) -> dict[str, str]:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        return _attributes_in(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"attributes are a {type(value).__name__}, not an object")
    attributes = {}
    for name, item in value.items():
        text = _text(", ".join(map(str, item)) if isinstance(item, list) else item, f"attribute {name!r}")
        if text:
            attributes[" ".join(str(name).split())] = text
    return attributes


def _attributes_in(text: str) -> dict[str, str]:
    if text.lstrip().startswith("{"):
        try:
            return _attributes(json.loads(text))
        except (ValueError, RecursionError) as exc:
            raise ValueError(f"attributes are not JSON: {_reason(exc)}") from exc
    attributes = {}
    for pair in filter(str.strip, text.split(";")):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"attribute {pair.strip()[:40]!r} is not NAME=VALUE")
        if value.strip():
            attributes[name.strip()] = " ".join(value.split())
    return attributes
