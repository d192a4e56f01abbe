"""The values of a catalogue: products, queries and hits, and their plain forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, cast

from qvl.errors import ConfigError
from qvl.types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from qvl.media.picture import PictureSource


class AnalysisRecord(TypedDict, total=False):
    """The product on a picture, in plain values."""

    brand: str | None
    category: str | None
    attributes: dict[str, str]


class QueryRecord(TypedDict, total=False):
    """A Query in plain values; what is not set is left out."""

    text: str
    brand: str
    category: str
    attributes: dict[str, str]
    only: dict[str, str]
    min_price: float
    max_price: float


class HitRecord(TypedDict):
    """A Hit in plain values; the product has its columns, also those unknown to qvl."""

    product: JsonObject
    score: float
    why: list[str]


@dataclass(frozen=True, slots=True)
class Product:
    """One row of a catalogue. `extra` keeps the columns that have no meaning to qvl; `price` has no unit of its own."""

    id: str
    name: str
    brand: str | None = None
    category: str | None = None
    price: float | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    picture: str | None = None
    url: str | None = None
    extra: JsonMapping = field(default_factory=dict)

    @property
    def price_text(self) -> str:
        """The price as the catalogue has it, with its `currency` column where there is one; "" without a price."""
        if self.price is None:
            return ""
        return f"{self.price:.2f} {self.extra.get('currency') or ''}".rstrip()

    def to_json(self) -> JsonObject:
        """Return its columns, unknown ones beside the known."""
        columns = {name: getattr(self, name) for name in self.__slots__ if name != "extra"}
        columns["attributes"] = dict(self.attributes)
        return columns | {name: value for name, value in self.extra.items() if name not in self.__slots__}

    @classmethod
    def from_json(cls, row: JsonMapping) -> Product:
        """Return the product of which `row` is `to_json()`."""
        known = {name: row[name] for name in cls.__slots__ if name != "extra" and name in row}
        return cls(**known, extra={name: value for name, value in row.items() if name not in known})


@dataclass(frozen=True, slots=True)
class Query:
    """A search.

    `text`, `brand`, `category` and `attributes` are wishes: what has more of them ranks higher. `only` (by "brand",
    "category" or the name of an attribute), `min_price` and `max_price` are conditions: what breaks one is not found.
    `picture` is for a vector retriever.

    Raises:
        ConfigError: a price that is not a number, or an empty range.
    """

    text: str = ""
    brand: str | None = None
    category: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)
    min_price: float | None = None
    max_price: float | None = None
    picture: PictureSource | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("min_price", "max_price"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value!r} is not a price", hint="0 or more", param=name)
        if self.min_price is not None and self.max_price is not None and self.min_price > self.max_price:
            raise ConfigError(f"no price is from {self.min_price:g} to {self.max_price:g}", param="min_price")

    def to_json(self) -> QueryRecord:
        """Return what is set, without the picture."""
        record = {name: getattr(self, name) for name in ("text", "brand", "category", "min_price", "max_price")}
        record |= {"attributes": dict(self.attributes), "only": dict(self.only)}
        return cast("QueryRecord", {name: value for name, value in record.items() if value not in (None, "", {})})


@dataclass(frozen=True, slots=True)
class Hit:
    """A product that matches: `why` are the reasons, best first, in words of the catalogue."""

    product: Product
    score: float
    why: tuple[str, ...] = ()

    def to_json(self) -> HitRecord:
        return {"product": self.product.to_json(), "score": round(self.score, 4), "why": list(self.why)}

    @classmethod
    def from_json(cls, record: HitRecord) -> Hit:
        """Return the hit of which `record` is `to_json()`."""
        return cls(Product.from_json(record["product"]), record["score"], tuple(record["why"]))


@dataclass(frozen=True, slots=True)
class Found:
    """The hits of a search, best first; `notes` say what could not be done as asked. `seconds` is the search alone."""

    hits: tuple[Hit, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was left out, and why. `line` counts from 1, in the catalogue's file."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Changes:
    """The counts of an indexing. `read` is False where the file was as it was, and not read."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    read: bool = True
