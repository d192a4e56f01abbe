"""Schemas of answers and of tools' arguments, as the grammar takes them and as it then allows and forbids."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel

from qvl.backends.grammar_schema import call_schema, enforceable
from qvl.backends.local.text.grammar import SPACING
from qvl.errors import RequestError
from qvl.types import Tool

llguidance = pytest.importorskip("llguidance")


def allows(schema: dict[str, Any], value: Any) -> bool:
    """True if the compiler's grammar of `schema` takes `value`, written as json.dumps writes it."""
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=SPACING)
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(json.dumps(value))
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    color: Color
    inner: Part | None = None


class Order(BaseModel):
    parts: list[Part]


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def test_arguments_of_nested_models_are_enforceable() -> None:
    schema = call_schema([Tool("order", "", Order.model_json_schema())])
    good = {"parts": [{"color": "red", "inner": {"color": "blue", "inner": None}}]}
    assert allows(schema, call("order", good))
    assert not allows(schema, call("order", {"parts": [{"color": "green"}]}))
    assert not allows(schema, call("order", {"parts": [], "more": 1}))


def test_tools_with_definitions_of_one_name_keep_their_own() -> None:
    def parameters(word: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/X"}},
            "required": ["x"],
            "$defs": {"X": {"enum": [word]}},
        }

    schema = call_schema([Tool("a", "", parameters("one")), Tool("b", "", parameters("two"))])
    assert allows(schema, call("a", {"x": "one"}))
    assert allows(schema, call("b", {"x": "two"}))
    assert not allows(schema, call("a", {"x": "two"}))


@pytest.mark.parametrize(
    ("ref", "more"),
    [
        ("#/definitions/X", {"definitions": {"X": {"enum": ["v"]}}}),
        ("#/$defs/a~1b%20c", {"$defs": {"a/b c": {"enum": ["v"]}}}),
        ("#/$defs/a~0b%25", {"$defs": {"a~b%": {"enum": ["v"]}}}),
        ("#/properties/other", {}),
        ("#named", {"$defs": {"X": {"$anchor": "named", "enum": ["v"]}}}),
        ("item.json", {"$id": "https://e.example/root.json", "$defs": {"X": {"$id": "item.json", "enum": ["v"]}}}),
        ("https://e.example/r#/$defs/X", {"$id": "https://e.example/r", "$defs": {"X": {"enum": ["v"]}}}),
    ],
)
def test_references_of_every_form_lead_home(ref: str, more: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"x": {"$ref": ref}, "other": {"enum": ["v"]}}, "required": ["x"], **more}
    for whole, wrap in ((call_schema([Tool("t", "", schema)]), True), (enforceable(schema, "response_format"), False)):
        assert allows(whole, call("t", {"x": "v"}) if wrap else {"x": "v"})
        assert not allows(whole, call("t", {"x": "w"}) if wrap else {"x": "w"})


def test_a_reference_to_the_root_means_the_arguments() -> None:
    tree = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["v"]}
    schema = call_schema([Tool("tree", "", tree)])
    assert allows(schema, call("tree", {"v": 1, "next": {"v": 2}}))
    assert not allows(schema, call("tree", {"v": 1, "next": call("tree", {"v": 2})}))


def test_a_reference_that_leads_nowhere_is_named() -> None:
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/Nowhere"}}}
    with pytest.raises(RequestError, match="#/\\$defs/Nowhere"):
        enforceable(schema, "response_format")


STRING = {"type": "string"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {"a": STRING}, "additionalProperties": True},
        {"type": "object", "properties": {"a": STRING}, "additionalProperties": {"type": "integer"}},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a": STRING}, "patternProperties": {"^z": {"type": "integer"}}},
        {"allOf": [{"type": "object", "properties": {"a": STRING}}, {"additionalProperties": True}]},
    ],
)
def test_an_object_that_welcomes_other_names_stays_open(schema: dict[str, Any]) -> None:
    assert allows(enforceable(schema, "response_format"), {"zz": 1})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": STRING, "b": STRING}},
        {"allOf": [{"type": "object", "properties": {"a": STRING}}, {"properties": {"b": STRING}, "required": ["b"]}]},
        {
            "type": "object",
            "properties": {"a": STRING},
            "$ref": "#/$defs/B",
            "$defs": {"B": {"type": "object", "properties": {"b": STRING}}},
        },
        {
            "allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
            "$defs": {
                "A": {"type": "object", "properties": {"a": STRING}, "required": ["a"]},
                "B": {"type": "object", "properties": {"b": STRING}, "required": ["b"]},
            },
        },
        {
            "type": "object",
            "properties": {"a": STRING},
            "anyOf": [{"properties": {"b": STRING}, "required": ["b"]}, {"required": ["a"]}],
        },
        {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": STRING, "b": STRING}}}},
        {"anyOf": [{"type": "object", "properties": {"a": STRING, "b": STRING}}, {"type": "null"}]},
    ],
)
def test_undeclared_names_are_forbidden_and_declared_ones_are_not(schema: dict[str, Any]) -> None:
    closed = enforceable(schema, "response_format")
    assert allows(closed, {"a": "x", "b": "y"})
    assert not allows(closed, {"a": "x", "b": "y", "c": "z"})


def test_a_definition_composed_here_and_used_alone_there_is_right_in_both_places() -> None:
    schema = {
        "type": "object",
        "properties": {
            "alone": {"$ref": "#/$defs/A"},
            "both": {"allOf": [{"$ref": "#/$defs/A"}, {"type": "object", "properties": {"b": STRING}}]},
        },
        "required": ["alone", "both"],
        "$defs": {"A": {"type": "object", "properties": {"a": STRING}}},
    }
    closed = enforceable(schema, "response_format")
    assert allows(closed, {"alone": {"a": "x"}, "both": {"a": "x", "b": "y"}})
    assert not allows(closed, {"alone": {"a": "x", "b": "y"}, "both": {"a": "x", "b": "y"}})


def test_what_a_grammar_cannot_count_is_left_to_the_reader() -> None:
    schema = {"type": "array", "items": {"type": "string", "format": "colour"}, "uniqueItems": True}
    assert allows(enforceable(schema, "response_format"), ["a", "a"])


def test_what_is_required_is_declared() -> None:
    closed = enforceable({"type": "object", "properties": {"a": STRING}, "required": ["b"]}, "response_format")
    assert allows(closed, {"a": "x", "b": 1})


def test_definitions_that_fan_out_are_refused_before_they_are_written_out() -> None:
    levels = 40
    definitions: dict[str, Any] = {
        f"d{n}": {"type": "object", "properties": {"a": True}, "anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 10}
        for n in range(levels)
    }
    definitions[f"d{levels}"] = {"type": "object", "properties": {"z": True}}
    with pytest.raises(RequestError, match="combine in more than 1024 ways"):
        enforceable({"$ref": "#/$defs/d0", "$defs": definitions}, "response_format")


@pytest.mark.parametrize("names", [0, 30])
def test_compositions_without_measure_are_refused(names: int) -> None:
    length = 60 if names else 800
    definitions: dict[str, Any] = {
        f"d{n}": {"properties": {f"p{n}x{k}": True for k in range(names)}, "$ref": f"#/$defs/d{n + 1}"}
        for n in range(length)
    }
    definitions[f"d{length}"] = {}
    with pytest.raises(RequestError, match="composes so many names"):
        enforceable({"$ref": "#/$defs/d0", "$defs": definitions}, "response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": True}]},
        {"anyOf": [{"properties": {}}], "allOf": True},
        {"properties": 5, "anyOf": [{"type": "object"}]},
    ],
)
def test_a_keyword_with_a_value_that_it_cannot_have_is_refused_in_one_line(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="a keyword has an invalid value"):
        enforceable(schema, "response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": 5, "allOf": [{"$ref": "#/x/a"}], "x": {"a": {"type": "string"}}},
        {"$ref": "#/x/a", "$defs": [], "x": {"a": []}},
        {"items": {"$ref": "#/items"}, "multipleOf": True},
    ],
)
def test_what_is_no_schema_and_says_nothing_is_read_over(schema: dict[str, Any]) -> None:
    assert isinstance(enforceable(schema, "response_format"), dict)
