"""What `schema=` may be, and what comes back for each."""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

import pytest
import typing_extensions
from pydantic import BaseModel, Field, RootModel, field_validator

from qvl import AsyncPipeline
from qvl.backends.openai.backend import OpenAIBackend
from qvl.errors import AnalysisError, ConfigError
from tests.scripted_endpoint import ScriptedEndpoint, Text

pytestmark = pytest.mark.anyio
PICTURE = "examples/pictures/norvik-mug-red.png"


class Bill(BaseModel):
    seller: str
    total: float


@dataclasses.dataclass
class Paid:
    seller: str
    total: float
    currency: str = "EUR"


class Line(typing.TypedDict):
    name: str
    price: typing_extensions.NotRequired[float]


class Sheet(typing.TypedDict):
    lines: list[Line]


class Tree(typing.TypedDict):
    name: str
    children: typing_extensions.NotRequired[list[Tree]]


@dataclasses.dataclass
class Order:
    """Lines, and what they belong to."""

    lines: Sequence[Line]
    first: typing.Annotated[Line, "the first"] | None = None
    parts: list[Order] = dataclasses.field(default_factory=list)
    total: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.total = sum(line.get("price", 0) for line in self.lines)


class Book(typing.TypedDict, total=False):
    orders: dict[str, Order]
    note: typing_extensions.Required[str]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


SCHEMA = {"type": "object", "properties": {"seller": {"type": "string"}, "total": {"type": "number"}}}
REPLY = {"seller": "Norvik", "total": 9.5}

MUG: typing.Any = {"name": "mug", "price": 2.0}
TREE = {"name": "a", "children": [{"name": "b"}]}


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as started:
        yield started


async def analysis_of(endpoint: ScriptedEndpoint, reply: Any, schema: Any) -> Any:
    text = reply if isinstance(reply, str) else json.dumps(reply)
    endpoint.say(Text(text), Text(text))
    backend = OpenAIBackend("m", base_url=endpoint.url, probe=False)
    async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
        found = await pipe.analyze(PICTURE, schema=schema)
        again = await pipe.analyze_result(PICTURE, schema=schema)
        assert (again.result.cache, again.value) == ("hit", found)
        return found


@pytest.mark.parametrize(
    ("schema", "reply", "value"),
    [
        (Bill, REPLY, Bill(**REPLY)),
        (Paid, REPLY, Paid("Norvik", 9.5)),
        (Sheet, {"lines": [{"name": "mug", "price": 1}]}, {"lines": [{"name": "mug", "price": 1.0}]}),
        (SCHEMA, REPLY, REPLY),
        ({"type": "array", "items": SCHEMA}, {"answer": [REPLY]}, [REPLY]),
        ({"enum": ["red", "blue"]}, {"answer": "red"}, "red"),
        (list[Bill], {"answer": [REPLY]}, [Bill(**REPLY)]),
        (list[Paid], {"answer": [REPLY]}, [Paid("Norvik", 9.5)]),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (Literal["red", "blue"], {"answer": "blue"}, "blue"),
        (Color, {"answer": "red"}, Color.RED),
        (int, {"answer": 3}, 3),
        (Bill | Paid, {"answer": {**REPLY, "currency": "USD"}}, Paid("Norvik", 9.5, "USD")),
        (Order, {"lines": [MUG]}, Order([MUG])),
        (list[Order], {"answer": [{"lines": [], "parts": [{"lines": [MUG]}]}]}, [Order([], None, [Order([MUG])])]),
        (Tree, TREE, TREE),
        (Book, {"note": "n"}, {"note": "n"}),
        (Book, {"note": "n", "orders": {"a": {"lines": [MUG]}}}, {"note": "n", "orders": {"a": Order([MUG])}}),
        (Sequence[Line], {"answer": [MUG]}, [MUG]),
        (Mapping[str, Line], {"a": MUG}, {"a": MUG}),
        (typing.Annotated[Line, "a line"], MUG, MUG),
        (RootModel[list[int]], {"answer": [1]}, RootModel[list[int]]([1])),
    ],
)
async def test_an_answer_comes_back_as_what_was_asked_for(endpoint, schema: Any, reply: Any, value: Any) -> None:
    found = await analysis_of(endpoint, reply, schema)
    assert found == value
    assert type(found) is type(value)
    asked = endpoint.chats[0].body["response_format"]["json_schema"]["schema"]
    assert asked.get("type") == "object" or "$ref" in asked


LONG: typing.Final = "1234567.12345678901234567890"


class Priced(BaseModel, strict=True):
    total: Decimal | None = None
    parts: set[Decimal] = Field(default_factory=set, alias="all parts")
    weight: float = 0.0
    note: float | str = ""
    more: Any = None


@dataclasses.dataclass
class Cost:
    net: Decimal


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (Priced, f'{{"total": {LONG}}}', Priced(total=Decimal(LONG))),
        (Priced, f'{{"total": -{LONG}e-3}}', Priced(total=Decimal(f"-{LONG}e-3"))),
        (
            Priced,
            f'Here:\n```json\n{{"all parts": [{LONG}, 0.1], "weight": {LONG}3, "note": {LONG}1, "more": {LONG}2}}\n```',
            Priced(
                **{"all parts": {Decimal(LONG), Decimal("0.1")}},
                weight=float(f"{LONG}3"),
                note=float(f"{LONG}1"),
                more=float(f"{LONG}2"),
            ),
        ),
        (list[Cost], f'{{"answer": [{{"net": {LONG}}}, {{"net": 2}}]}}', [Cost(Decimal(LONG)), Cost(Decimal(2))]),
        (Decimal, LONG, Decimal(LONG)),
        (SCHEMA, f'{{"total": {LONG}}}', {"total": float(LONG)}),
    ],
    ids=["field", "exponent", "beside others", "list", "bare", "JSON schema"],
)
async def test_a_decimal_has_every_digit_and_nothing_else_becomes_text(
    endpoint, schema: Any, text: str, value: Any
) -> None:
    found = await analysis_of(endpoint, text, schema)
    assert found == value


class Corners(BaseModel):
    total: Decimal
    corners: set[tuple[int, int]]


class Pair(BaseModel, frozen=True):
    a: int


class Unwritable(BaseModel):
    """pydantic cannot dump a set of models, since dictionaries have no hash."""

    total: Decimal
    pairs: set[Pair]


class Rounded(BaseModel):
    total: float

    @field_validator("total", mode="before")
    @classmethod
    def _rounded(cls, number: Any) -> Any:
        return round(number, 2)


async def test_digits_are_no_reason_to_lose_an_answer_that_a_class_rounds(endpoint) -> None:
    assert await analysis_of(endpoint, f'{{"total": {LONG}}}', Rounded) == Rounded(total=1234567.12)


async def test_digits_are_no_reason_to_lose_an_answer_with_sets(endpoint) -> None:
    found = await analysis_of(endpoint, f'{{"total": {LONG}, "corners": [[1, 2]]}}', Corners)
    assert found == Corners(total=Decimal(LONG), corners={(1, 2)})
    found = await analysis_of(endpoint, f'{{"total": {LONG}, "pairs": [{{"a": 1}}]}}', Unwritable)
    assert found.pairs == {Pair(a=1)}
    assert float(found.total) == float(LONG)


@pytest.mark.parametrize("schema", [Paid, Sheet, Order, Tree, Book, SCHEMA | {"required": ["seller"]}])
async def test_an_answer_of_another_form_is_an_error(endpoint, schema: Any) -> None:
    with pytest.raises(AnalysisError):
        await analysis_of(endpoint, {"other": 1}, schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (json.JSONDecoder, "JSONDecoder is not a type that pydantic supports"),
        ("Bill", "Bill.* is not a type that pydantic supports"),
        (7, "7 is not a type that pydantic supports"),
        (Paid("Norvik", 1.0), "schema= must be a class, not a Paid instance"),
        (Bill(seller="Norvik", total=1.0), "schema= must be a class, not a Bill instance"),
        (typing.Annotated[str, Field(pattern="^(?!x)")], "is not a type that pydantic supports: .*look-around"),
        ({"type": "object", "properties": {"a": {"type": "thing"}}}, "type 'thing'"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}}, "unresolved reference"),
    ],
)
async def test_what_is_no_schema_is_one_line(endpoint, schema: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        await analysis_of(endpoint, REPLY, schema)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "schema"
