"""Products, queries and hits of a catalogue, and their JSON forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from qvl.errors import ConfigError
from qvl.types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from qvl.media.picture import PictureSource


class AnalysisRecord(TypedDict, total=False):
    """The analysis of a picture's product, as JSON; `abstained` are the fields that are too unsure to be told."""

    brand: str | None
    category: str | None
    attributes: dict[str, str]
    abstained: dict[str, str]


class QueryRecord(TypedDict, total=False):
    """A Query as JSON; unset fields are omitted."""

    text: str
    brand: str
    category: str
    attributes: dict[str, str]
    only: dict[str, str]
    min_price: float
    max_price: float


class HitRecord(TypedDict):
    """A Hit as JSON; the product has all its columns, also those unknown to qvl."""

    product: JsonObject
    score: float
    why: list[str]
    fit: NotRequired[float]


@dataclass(frozen=True, slots=True)
class Product:
    """One row of a catalogue. `extra` are the columns unknown to qvl; `price` is without its currency."""

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
        """The price as text, with the `currency` column if there is one; "" without a price."""
        if self.price is None:
            return ""
        return f"{self.price:.2f} {self.extra.get('currency') or ''}".rstrip()

    def to_json(self) -> JsonObject:
        """Return the product's columns, unknown ones included."""
        columns = {name: getattr(self, name) for name in self.__slots__ if name != "extra"}
        columns["attributes"] = dict(self.attributes)
        return columns | {name: value for name, value in self.extra.items() if name not in self.__slots__}

    @classmethod
    def from_json(cls, row: JsonMapping) -> Product:
        """Return the product from its `to_json()` form."""
        known = {name: row[name] for name in cls.__slots__ if name != "extra" and name in row}
        return cls(**known, extra={name: value for name, value in row.items() if name not in known})


@dataclass(frozen=True, slots=True)
class Query:
    """A search.

    `text`, `brand`, `category` and `attributes` are preferences: products with more of them rank higher. `only` (by
    "brand", "category" or the name of an attribute), `min_price` and `max_price` are conditions for every hit.
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
            raise ConfigError(f"min_price {self.min_price:g} is above max_price {self.max_price:g}", param="min_price")

    def to_json(self) -> QueryRecord:
        """Return the set fields as JSON, without the picture."""
        record = {name: getattr(self, name) for name in ("text", "brand", "category", "min_price", "max_price")}
        record |= {"attributes": dict(self.attributes), "only": dict(self.only)}
        return cast("QueryRecord", {name: value for name, value in record.items() if value not in (None, "", {})})


@dataclass(frozen=True, slots=True)
class Hit:
    """A matching product. `why` has the reasons for the match in the catalogue's words, the most important first.

    `fit` is how probably it fits the wish, where a model was asked.
    """

    product: Product
    score: float
    why: tuple[str, ...] = ()
    fit: float | None = None

    def to_json(self) -> HitRecord:
        record: HitRecord = {"product": self.product.to_json(), "score": round(self.score, 4), "why": list(self.why)}
        if self.fit is not None:
            record["fit"] = round(self.fit, 4)
        return record

    @classmethod
    def from_json(cls, record: HitRecord) -> Hit:
        """Return the hit from its `to_json()` form."""
        return cls(Product.from_json(record["product"]), record["score"], tuple(record["why"]), record.get("fit"))


@dataclass(frozen=True, slots=True)
class SearchHits:
    """The hits of a search, best first. `notes` name query words that no product has; `seconds` is the search time."""

    hits: tuple[Hit, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """An invalid row, with the reason as `message`. `line` is its line in the catalogue's file, from 1."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Changes:
    """The numbers of products that an indexing changed. `read` is False if the file was unchanged and so not read."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    read: bool = True
