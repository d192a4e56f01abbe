"""What the OpenVINO backend promises where the library is not installed; tests/backends/openvino has the rest."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from decimal import Decimal
from importlib.abc import MetaPathFinder
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qvl.backends.openvino.backend import OpenVinoBackend
from qvl.backends.openvino.ebnf import SchemaGrammar
from qvl.backends.openvino.ebnf_values import FORMATS, integer, number
from qvl.errors import ConfigError, MissingDependencyError, RequestError
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.suggest import install_line

COMPOSED = {
    "$ref": "#/$defs/n",
    "$defs": {"n": {"type": "object", "properties": {"next": {"allOf": [{"$ref": "#/$defs/n"}, {"type": "object"}]}}}},
}
BOUND = st.integers(-1200, 1200)


class Absent(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname in ("openvino", "openvino_genai"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def matches(expression: str, text: str) -> bool:
    """True if `text` fits an expression of the grammar that names no other rule, read by Python's own regex."""
    pattern = re.sub(r'"(?:[^"\\]|\\.)*"', lambda literal: f"(?:{re.escape(json.loads(literal[0]))})", expression)
    return re.fullmatch(pattern.replace(" ", ""), text) is not None


def grammar(schema: dict[str, Any]) -> str:
    return SchemaGrammar(schema, "response_format").text().partition("\nany ::=")[0]


def test_without_the_library_the_error_is_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("openvino", "openvino_genai")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingDependencyError) as caught:
        asyncio.run(OpenVinoBackend("some/model").open())
    assert str(caught.value) == f"OpenVINO GenAI is not installed ({install_line('openvino')})"


def test_it_is_named_like_the_others_and_its_options_are_checked_before_anything_is_loaded() -> None:
    assert isinstance(AsyncPipeline("openvino:some/model", device="gpu").backend, OpenVinoBackend)
    with pytest.raises(ConfigError, match="has no option 'devices'"):
        AsyncPipeline("openvino:some/model", devices="GPU")
    with pytest.raises(ConfigError, match="openvino: names no model"):
        AsyncPipeline("openvino:")
    with pytest.raises(ConfigError, match="dtype='int4' is unknown"):
        AsyncPipeline("openvino:some/model", dtype="int4")


# A schema as a grammar


def test_spaces_stand_where_json_dumps_puts_them_and_optional_properties_may_be_absent() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"const": [1, "é"]}, "c": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    }
    assert grammar(schema).splitlines() == [
        "root ::= r6",
        'r0 ::= "\\"c\\": " ("true" | "false")',
        'r1 ::= (", " r0)? "}"',
        'r2 ::= "\\"b\\": " "[1, \\"é\\"]"',
        'r3 ::= ", " r2 r1',
        'r4 ::= "\\"a\\": " "null"',
        'r5 ::= (", " r4)? r3',
        'r6 ::= "{" (r4 r3 | r2 r1)',
    ]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "multipleOf": 7}, "does not enforce multipleOf"),
        ({"type": "string", "pattern": "a+"}, "does not enforce pattern"),
        ({"type": "array", "contains": {"const": 1}}, "does not enforce contains"),
        ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, "does not enforce not"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "does not enforce oneOf of schemas that may fit at once",
        ),
        ({"type": "number", "maximum": 0.5}, "does not enforce a bound of 0.5"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "nothing fits the schema: a whole number from 5 to 3"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "nothing fits the schema: a text of 5 to 3 characters"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "nothing fits the schema: a list of 3 to 2 items"),
        ({"allOf": [{"type": "null"}, {"type": "string"}]}, "nothing fits the schema: a value that is both"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "#/$defs/a means itself"),
        ({"allOf": [{"$ref": "#"}]}, "allOf and $ref that lead into each other"),
        (COMPOSED, "allOf and $ref that lead into each other"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_the_grammar_cannot_say_is_refused_by_its_name(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammar(schema)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "response_format"


def test_a_schema_that_holds_itself_is_a_rule_that_names_itself() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["next"],
    }
    assert grammar({"$ref": "#/$defs/n", "$defs": {"n": {**node, "properties": {"next": {"$ref": "#/$defs/n"}}}}}) == (
        'root ::= d0\nr0 ::= "\\"next\\": " d0\nr1 ::= ", " r0 "}"\nr2 ::= "{" r0 "}"\nd0 ::= r2'
    )


@given(BOUND | st.none(), BOUND | st.none(), st.booleans(), st.integers(-1300, 1300))
@example(0, 0, False, 0)
@example(99, 1000, False, 1000)
def test_whole_numbers_are_held_to_their_bounds(low: int | None, high: int | None, strict: bool, value: int) -> None:
    names = ("exclusiveMinimum", "exclusiveMaximum") if strict else ("minimum", "maximum")
    node = {name: bound for name, bound in zip(names, (low, high), strict=True) if bound is not None}
    fits = (low is None or low + strict <= value) and (high is None or value <= high - strict)
    try:
        expression = integer(node, "x")
    except RequestError:
        assert not fits
        return
    assert matches(expression, str(value)) is fits


@given(BOUND | st.none(), BOUND | st.none(), st.booleans(), st.decimals(-1300, 1300, places=2))
@example(0, 1, True, Decimal("1.00"))
@example(-2, 0, False, Decimal("-0.50"))
def test_numbers_are_held_to_their_bounds(low: int | None, high: int | None, strict: bool, value: Decimal) -> None:
    names = ("exclusiveMinimum", "exclusiveMaximum") if strict else ("minimum", "maximum")
    node = {name: bound for name, bound in zip(names, (low, high), strict=True) if bound is not None}
    above = low is None or (value > low if strict else value >= low)
    fits = above and (high is None or (value < high if strict else value <= high))
    try:
        expression = number(node, "x")
    except RequestError:
        assert not fits
        return
    if value or strict:
        # Whether a zero has a sign is nobody's bound.
        assert matches(expression, f"{value}") is fits


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("date", "2024-02-29", "2024-02-30"),
        ("time", "23:59:30.5+02:00", "24:00:00Z"),
        ("date-time", "1999-12-31T00:00:00Z", "1999-12-31"),
        ("duration", "P3DT2H", "3D"),
        ("email", "a.b@example.org", "a@b@c"),
        ("hostname", "a-b.example", "-a.example"),
        ("ipv4", "192.168.0.255", "192.168.0.256"),
        ("ipv6", "0:1:2:3:4:5:6:ffff", "1:2"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
        ("uri", "https://example.org:80/a/b?"[:-1], "example.org"),
    ],
)
def test_formats_are_in_the_grammar(form: str, good: str, bad: str) -> None:
    assert matches(FORMATS[form], good)
    assert not matches(FORMATS[form], bad)
