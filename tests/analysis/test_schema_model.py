"""What a JSON schema may hold, what of it is refused in one line, and that answers are checked against all of it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from qvl.analysis.schema_model import model_of
from qvl.analysis.schema_types import schema_type
from qvl.errors import AnalysisError, ConfigError, RequestError


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    age: float


class Everything(BaseModel):
    tags: set[str]
    pair: tuple[int, str]
    free: Any
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    sizes: dict[Annotated[str, Field(pattern="^x")], int] = {}
    old: str | None = Field(None, deprecated=True)
    note: Cat | None = Field(None, description="a reference with words beside it")


class Node(BaseModel):
    name: str
    children: list[Node] = []


def with_property(part: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": part}}


def read(schema: dict[str, Any], answer: Any) -> Any:
    kind = schema_type(schema)
    return kind.value(kind.model.model_validate_json(json.dumps({"answer": answer} if kind.boxed else answer)))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "string", "pattern": "^(?!x).*$"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(a{1000}){1000}"}, "exceeds size limit"),
        ({"patternProperties": {"(": {}}}, "unclosed group"),
        ({"minLength": "x"}, r"properties\.a\.minLength 'x' is not of type 'integer'"),
        ({"minLength": -1}, r"properties\.a\.minLength -1 is less"),
        ({"multipleOf": 0}, r"properties\.a\.multipleOf 0 is less"),
        ({"type": "wat"}, "type 'wat'"),
        ({"enum": []}, "empty 'enum'"),
        ({"required": "b"}, r"properties\.a\.required 'b'"),
        ({"allOf": [5]}, r"properties\.a\.allOf\.0 5"),
        ({"unevaluatedProperties": False}, "unsupported"),
        ({"$ref": "http://host.example/a.json"}, "unresolved reference"),
        ({"$ref": "#/$defs/Nothing"}, "unresolved reference"),
        (5, r"properties\.a 5"),
    ],
)
def test_what_no_answer_can_be_checked_against_is_refused_in_one_line(part: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        model_of(with_property(part))
    assert "\n" not in str(refused.value)
    assert (refused.value.param, refused.value.code) == ("schema", "invalid_schema")
    with pytest.raises(ConfigError, match=words):
        schema_type(with_property(part))


def test_a_keyword_of_another_type_says_nothing() -> None:
    assert read(with_property({"type": "string", "minimum": 3, "maxLength": 10**20}), {"a": "x"}) == {"a": "x"}
    assert read(with_property({"type": "integer", "pattern": "^x"}), {"a": 1}) == {"a": 1}


GOOD = {"tags": ["a"], "pair": [1, "b"], "free": None, "pet": {"kind": "dog", "age": 2.5}, "sizes": {"xl": 1}}


def test_what_pydantic_writes_is_read_and_checked() -> None:
    schema = Everything.model_json_schema()
    assert read(schema, GOOD) == GOOD
    for wrong in (
        {"tags": ["a", "a"]},
        {"pair": [1]},
        {"pair": ["b", 1]},
        {"pet": {"kind": "dog", "lives": 3}},
        {"sizes": {"xl": "large"}},
    ):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            read(schema, GOOD | wrong)


def test_a_model_that_holds_itself_is_read_to_any_depth() -> None:
    schema = Node.model_json_schema()
    tree = {"name": "a", "children": [{"name": "b", "children": []}]}
    assert read(schema, tree) == tree
    assert model_of(schema).model_json_schema()["properties"]["name"] == {"title": "Name", "type": "string"}
    with pytest.raises(ValidationError, match=r"children\.0"):
        read(schema, {"name": "a", "children": [{"nom": "b"}]})
    assert read({"type": "array", "items": {"$ref": "#"}}, [[], [[]]]) == [[], [[]]]


def test_references_are_spelt_as_pointers_are() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/a~1b"}, "b": {"allOf": [{"$ref": "#/$defs/a%20b"}], "title": "B"}},
        "$defs": {"a/b": {"type": "integer"}, "a b": {"type": "string"}},
    }
    assert read(schema, {"a": 1, "b": "x"}) == {"a": 1, "b": "x"}
    with pytest.raises(ValidationError, match="b"):
        read(schema, {"a": 1, "b": 2})


def test_enums_of_numbers_multiples_and_remarks_of_ones_own() -> None:
    assert read({"enum": [1.5, 2]}, 1.5) == 1.5
    with pytest.raises(ValidationError):
        read({"enum": [1.5, 2]}, 3)
    price = with_property({"type": "number", "multipleOf": 0.01, "readOnly": True, "x-unit": "EUR"})
    assert read(price, {"a": 19.99}) == {"a": 19.99}
    with pytest.raises(ValidationError, match="multiple"):
        read(price, {"a": 19.999})


def test_null_stands_where_a_schema_says_so_or_does_not_require_a_value() -> None:
    assert read(with_property({"type": "string"}), {"a": None}) == {"a": None}
    required = {**with_property({"type": "string", "nullable": True}), "required": ["a"]}
    assert read(required, {"a": None}) == {"a": None}
    with pytest.raises(ValidationError):
        read({**with_property({"type": "string"}), "required": ["a"]}, {"a": None})


def test_patterns_that_would_never_end_are_matched_at_once() -> None:
    with pytest.raises(ValidationError, match="does not match"):
        read(with_property({"type": "string", "pattern": "^(a+)+$"}), {"a": "a" * 5000 + "b"})
    named = {"type": "object", "patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}
    with pytest.raises(ValidationError, match="not in the schema"):
        read(named, {"a" * 5000 + "b": 1})


def test_alternatives_that_double_with_each_level_are_given_up() -> None:
    one = {"type": "object", "properties": {"a": {"$ref": "#/$defs/R"}}}
    schema = {**with_property({"$ref": "#/$defs/R"}), "$defs": {"R": {"anyOf": [one, one]}}}
    with pytest.raises(AnalysisError, match="too many steps"):
        read(schema, json.loads('{"a":' * 40 + "1" + "}" * 40))


def test_what_is_too_deep_too_wide_or_a_circle_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    circle = {**with_property({"$ref": "#/$defs/a"}), "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}
    for schema, words in ((deep, "deep"), (with_property(deep), "deep"), (wide, "2000 parts"), (circle, "itself")):
        with pytest.raises(ConfigError, match=words):
            schema_type(schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": True}, "properties True is not of type 'object'"),
        ({"type": "object", "$schema": 5}, "schema must be a string"),
        ({"type": "object", "$schema": "http://json-schema.org/draft-03/schema#"}, "draft 3"),
        ({"$ref": "#/$defs/a", "$defs": [1]}, "type object"),
        ({"type": "object", "allOf": 5}, "allOf 5"),
        ([], "must be an object"),
    ],
)
def test_what_is_no_schema_at_all_is_refused_in_one_line(schema: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        model_of(schema)


def test_an_older_draft_is_read_as_it_was_meant() -> None:
    part = {"type": "array", "items": [{"type": "string"}], "additionalItems": False}
    schema = {**with_property(part), "$schema": "http://json-schema.org/draft-07/schema#"}
    assert read(schema, {"a": ["x"]}) == {"a": ["x"]}
    for wrong in ([1], ["x", "y"]):
        with pytest.raises(ValidationError):
            read(schema, {"a": wrong})
