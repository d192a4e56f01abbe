"""What a schema, a pattern or a tool lets a model write, and what is refused before it is compiled."""

from __future__ import annotations

import enum
import json
from typing import Any, Final

import pytest
from pydantic import BaseModel, Field, ValidationError

from qvl import Tool
from qvl.analysis.parse_answer import response_format
from qvl.analysis.schema_model import model_of
from qvl.backends.grammar_schema import compiler_reason
from qvl.backends.local.backend import LocalBackend
from qvl.backends.schema_bounds import MAX_CHOICES, MAX_SUBSCHEMAS, MAX_TOOLS
from qvl.errors import QvlError, RequestError
from qvl.pipeline.parse_request import read_response_format
from qvl.types import ChatRequest, Message, ResponseFormat, TextPart

QUESTION = (Message("user", (TextPart("x"),)),)


class Allows:
    """Whether the grammar of a request lets a text through, token by token, and lets it end there."""

    def __init__(self, tiny: LocalBackend, **request: Any) -> None:
        assert tiny._loaded is not None
        self._tokenizer = tiny._loaded.checkpoint.tokenizer
        self._matcher = tiny._loaded.maker.grammars.matcher(ChatRequest(QUESTION, **request))

    def __call__(self, value: Any) -> bool:
        text = value if isinstance(value, str) else json.dumps(value)
        matcher, tokens = self._matcher.deep_copy(), self._tokenizer.encode(text, add_special_tokens=False)
        return (
            matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()
        )


def of_schema(tiny: LocalBackend, schema: dict[str, Any]) -> Allows:
    return Allows(tiny, response_format=ResponseFormat("json_schema", schema=schema))


def of_tools(tiny: LocalBackend, *tools: dict[str, Any]) -> Allows:
    named = tuple(Tool(f"f{number}", "", schema) for number, schema in enumerate(tools))
    return Allows(tiny, tools=named, tool_choice="required")


def call(arguments: Any, name: str = "f0") -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    color: Color
    inner: Part | None = None


class Order(BaseModel):
    part: Part
    colors: list[Color]


class TestReferences:
    def test_definitions_of_a_tools_parameters_are_found(self, tiny) -> None:
        allows = of_tools(tiny, Order.model_json_schema())
        assert allows(call({"part": {"color": "red", "inner": {"color": "blue", "inner": None}}, "colors": ["red"]}))
        assert not allows(call({"part": {"color": "green", "inner": None}, "colors": []}))

    def test_a_reference_to_the_top_means_the_parameters(self, tiny) -> None:
        node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["v"]}
        allows = of_tools(tiny, node)
        assert allows(call({"v": 1, "next": {"v": 2, "next": {"v": 3}}}))
        assert not allows(call({"v": 1, "next": {"name": "f0", "arguments": {}}}))

    def test_definitions_of_two_tools_with_one_name_stay_apart(self, tiny) -> None:
        def tool(value: str) -> dict[str, Any]:
            parts = {"properties": {"e": {"$ref": "#/$defs/E"}}, "required": ["e"]}
            return {"type": "object", **parts, "$defs": {"E": {"enum": [value]}}}

        allows = of_tools(tiny, tool("a"), tool("b"))
        assert allows(call({"e": "a"}, "f0"))
        assert allows(call({"e": "b"}, "f1"))
        assert not allows(call({"e": "b"}, "f0"))

    @pytest.mark.parametrize(
        ("reference", "more"),
        [
            ("#/definitions/My~1Thing", {"definitions": {"My/Thing": {"const": 7}}}),
            ("#/$defs/My%20Thing", {"$defs": {"My Thing": {"const": 7}}}),
            ("#/properties/seven", {}),
            ("#seven", {"$defs": {"s": {"$anchor": "seven", "const": 7}}}),
            (
                "https://shop.example/order#/$defs/s",
                {"$id": "https://shop.example/order", "$defs": {"s": {"const": 7}}},
            ),
        ],
    )
    def test_every_way_to_point(self, tiny, reference: str, more: dict[str, Any]) -> None:
        schema = {"type": "object", "properties": {"seven": {"const": 7}, "a": {"$ref": reference}}, **more}
        allows = of_tools(tiny, schema)
        assert allows(call({"a": 7}))
        assert not allows(call({"a": 8}))

    def test_what_only_looks_like_a_reference_is_data(self, tiny) -> None:
        allows = of_tools(tiny, {"type": "object", "properties": {"a": {"enum": [{"$ref": "#/x"}]}}, "required": ["a"]})
        assert allows(call({"a": {"$ref": "#/x"}}))


A = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


class TestClosing:
    @pytest.mark.parametrize(
        ("schema", "allowed", "refused"),
        [
            (A, {"a": "x"}, {"a": "x", "z": 1}),
            ({"$ref": "#/$defs/A", "$defs": {"A": A}}, {"a": "x"}, {"a": "x", "z": 1}),
            ({"allOf": [A, B]}, {"a": "x", "b": 1}, {"a": "x", "b": 1, "z": 1}),
            ({"allOf": [{"$ref": "#/$defs/A"}, B], "$defs": {"A": A}}, {"a": "x", "b": 1}, {"a": "x", "b": 1, "z": 1}),
            ({"anyOf": [A, B]}, {"b": 1}, {"b": 1, "z": 1}),
            (
                {"type": "object", "properties": {"k": {"const": 1}}, "anyOf": [A, B]},
                {"k": 1, "b": 2},
                {"k": 1, "z": 1},
            ),
            ({"type": "object", "properties": {"i": {"allOf": [A]}}}, {"i": {"a": "x"}}, {"i": {"z": 1}}),
            ({"type": "array", "items": A}, [{"a": "x"}], [{"a": "x", "z": 1}]),
            ({"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}, {"a": 1, "b": 2}, {"a": 1, "z": 1}),
            ({"type": "object", "properties": {}}, {}, {"z": 1}),
            ({"allOf": [{"type": "object", "properties": {}}]}, {}, {"z": 1}),
            ({"anyOf": [{"type": "object", "properties": {}}, A]}, {}, {"z": 1}),
            (A | {"properties": {"a": {"type": "object", "properties": {}}}}, {"a": {}}, {"a": {"z": 1}}),
        ],
    )
    def test_an_object_has_the_names_it_declares(self, tiny, schema: Any, allowed: Any, refused: Any) -> None:
        allows = of_schema(tiny, schema)
        assert allows(allowed)
        assert not allows(refused)

    @pytest.mark.parametrize(
        ("schema", "value"),
        [
            ({**A, "additionalProperties": True}, {"a": "x", "z": 1}),
            ({**A, "additionalProperties": {"type": "integer"}}, {"a": "x", "z": 1}),
            ({"type": "object"}, {"z": 1}),
            ({"type": "object", "required": ["z"]}, {"z": 1, "y": 1}),
            ({"type": "object", "allOf": [{"required": ["z"]}]}, {"z": 1, "y": 1}),
            ({"type": "object", "additionalProperties": {"type": "integer"}}, {"z": 1}),
            ({"type": "object", "properties": {}, "patternProperties": {"^z": {}}}, {"z": 1}),
            ({"allOf": [A, {"type": "object", "additionalProperties": True}]}, {"a": "x", "z": 1}),
        ],
    )
    def test_one_that_says_otherwise_stays_open(self, tiny, schema: Any, value: Any) -> None:
        assert of_schema(tiny, schema)(value)

    def test_the_schema_that_was_given_stays_as_it_was(self, tiny) -> None:
        schema = json.loads(json.dumps({"allOf": [A, B], "properties": {"c": {"type": "object", "properties": {}}}}))
        before = json.dumps(schema)
        of_schema(tiny, schema)
        assert json.dumps(schema) == before


def test_a_tool_without_arguments_is_called_without_any(tiny) -> None:
    class Empty(BaseModel):
        pass

    for parameters in ({}, {"type": "object", "properties": {}}, Empty.model_json_schema()):
        allows = of_tools(tiny, parameters)
        assert allows(call({}))
        assert not allows(call({"z": 1}))


class TestReferencesOutsideOfDefinitions:
    SCHEMA: Final = {
        "type": "object",
        "properties": {"x": {"$ref": "#/components/schemas/X"}},
        "required": ["x"],
        "components": {
            "schemas": {
                "X": {"type": "object", "properties": {"y": {"$ref": "#/components/schemas/Y"}}},
                "Y": {
                    "type": "object",
                    "properties": {"n": {"type": "integer"}, "x": {"$ref": "#/components/schemas/X"}},
                },
            }
        },
    }

    def test_what_they_lead_to_is_closed(self, tiny) -> None:
        for allows, wrap in ((of_schema(tiny, self.SCHEMA), lambda it: it), (of_tools(tiny, self.SCHEMA), call)):
            assert allows(wrap({"x": {"y": {"n": 1, "x": {"y": {"n": 2}}}}}))
            assert not allows(wrap({"x": {"z": 1}}))
            assert not allows(wrap({"x": {"y": {"n": "one"}}}))
            assert not allows(wrap({"x": {"y": {"n": 1, "z": 1}}}))

    def test_also_where_an_allof_stands_in_between(self, tiny) -> None:
        inner = {"type": "object", "properties": {"i": A}}
        schema = {"type": "object", "properties": {"o": {"allOf": [inner]}, "r": {"$ref": "#/properties/o/allOf/0"}}}
        allows = of_schema(tiny, schema)
        assert allows({"r": {"i": {"a": "x"}}})
        assert not allows({"r": {"i": {"a": "x"}, "z": 1}})

    def test_names_that_look_alike_stay_apart(self, tiny) -> None:
        parts = {"a/b": {"const": 1}, "a": {"b": {"const": 2}}, "a.b": {"const": 3}}
        refs = ["#/parts/a~1b", "#/parts/a/b", "#/parts/a.b"]
        schema = {
            "type": "object",
            "properties": {str(place): {"$ref": ref} for place, ref in enumerate(refs)},
            "parts": parts,
            "$defs": {"closed.parts.a.b": {"const": 4}},
        }
        allows = of_schema(tiny, schema)
        assert allows({"0": 1, "1": 2, "2": 3})
        assert not allows({"0": 2})
        assert not allows({"1": 3})


class TestAnnotations:
    @pytest.mark.parametrize("form", ["color", "uri-reference", "byte", "int32", "anything at all"])
    def test_a_format_that_is_not_known_is_a_remark(self, tiny, form: str) -> None:
        schema = {"type": "object", "properties": {"b": {"type": "string", "format": form}}}
        assert of_schema(tiny, schema)({"b": "x"})

    def test_a_known_format_is_kept_to(self, tiny) -> None:
        allows = of_schema(tiny, {"type": "string", "format": "date"})
        assert allows('"2026-11-28"')
        assert not allows('"tomorrow"')

    def test_a_class_with_named_keys_can_be_asked_for(self, tiny) -> None:
        class Counts(BaseModel):
            counts: dict[Color, int]

        given = read_response_format(Counts)
        assert Allows(tiny, response_format=given)({"counts": {"red": 1}})
        assert of_tools(tiny, Counts.model_json_schema())(call({"counts": {"red": 1}}))
        with pytest.raises(RequestError, match="propertyNames"):
            of_schema(tiny, Counts.model_json_schema())

    def test_sets_and_bounds_on_mappings_can_be_asked_for(self, tiny) -> None:
        class Tags(BaseModel):
            tags: set[str] = Field(max_length=2)

        assert of_schema(tiny, Tags.model_json_schema())({"tags": ["a", "b"]})


def wide(number: int, inner: Any = {"type": "string"}) -> dict[str, Any]:  # noqa: B006 - nobody changes it
    return {"type": "object", "properties": {f"p{i}": inner for i in range(number)}}


def deep(number: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(number):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def multiples(*numbers: float) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"multipleOf": n} for i, n in enumerate(numbers)}}


MAYBE: Final = {"anyOf": [{"type": "string"}, {"type": "null"}]}


def one_of_two(number: int) -> dict[str, Any]:
    two = [{"type": "object", "properties": {f"{letter}{number}": {"type": "string"}}} for letter in "ab"]
    return {"anyOf": two}


def combined(number: int) -> dict[str, Any]:
    return {"allOf": [one_of_two(n) for n in range(number)]}


class TestBounds:
    @pytest.mark.parametrize(
        ("form", "words"),
        [
            (
                ResponseFormat("choice", choices=tuple(map(str, range(100_000)))),
                f"100000 choices.*at most {MAX_CHOICES}",
            ),
            (ResponseFormat("choice", choices=("x" * 2_000_000,)), "choices of 2000000 characters"),
            (ResponseFormat("regex", pattern="a|" * 50_000), "a pattern of 100000 characters"),
            (ResponseFormat("json_schema", schema=wide(MAX_SUBSCHEMAS + 1)), f"more than {MAX_SUBSCHEMAS} parts"),
            (ResponseFormat("json_schema", schema=wide(50_000)), "a schema of [0-9]+ characters"),
            (ResponseFormat("json_schema", schema=deep(500)), "deeper than 64 levels"),
            (ResponseFormat("json_schema", schema={"enum": list(range(5_000))}), "enum values"),
            (ResponseFormat("json_schema", schema={"type": "integer", "multipleOf": 999_983}), "multipleOf .* 10000"),
            (ResponseFormat("json_schema", schema={"type": "integer", "multipleOf": 50_000_017}), "multipleOf"),
            (ResponseFormat("json_schema", schema={"type": "integer", "multipleOf": 10**400 + 1}), "multipleOf"),
            (ResponseFormat("json_schema", schema=multiples(*range(9_001, 9_999, 100))), "multipleOf"),
            (
                ResponseFormat("json_schema", schema={"allOf": [multiples(97), multiples(101), multiples(103)]}),
                "multipleOf",
            ),
            (ResponseFormat("json_schema", schema=combined(10)), "combine in more than 64 ways"),
            (
                ResponseFormat("json_schema", schema={"type": "object", "properties": {"a": combined(10)}}),
                "more than 64 ways",
            ),
            (
                ResponseFormat("json_schema", schema={"allOf": [wide(1, one_of_two(n)) for n in range(9)]}),
                "more than 64 ways",
            ),
        ],
    )
    def test_what_is_too_large_is_refused_before_it_is_compiled(self, tiny, form: ResponseFormat, words: str) -> None:
        with pytest.raises(RequestError, match=words) as caught:
            Allows(tiny, response_format=form)
        assert caught.value.param == "response_format"

    @pytest.mark.parametrize(
        ("schema", "good", "bad"),
        [
            ({"type": "number", "multipleOf": 0.01}, "1.25", "1.255"),
            ({"type": "integer", "multipleOf": 5_000_000}, "15000000", "15000001"),
            ({"type": "integer", "multipleOf": 144}, "288", "289"),
            ({"allOf": [wide(30, MAYBE), wide(30, MAYBE)]}, {"p7": None}, {"p7": 1}),
            (combined(3), {"a0": "x", "b1": "x", "a2": "x"}, {"a0": "x", "z": 1}),
            ({"anyOf": [{"const": n} for n in range(200)]}, "199", "200"),
            (
                {"allOf": [{"$ref": "#/$defs/N"}], "$defs": {"N": {"anyOf": [{"const": n} for n in range(200)]}}},
                "7",
                "200",
            ),
        ],
    )
    def test_what_is_small_enough_is_enforced(self, tiny, schema: dict[str, Any], good: Any, bad: Any) -> None:
        allows = of_schema(tiny, schema)
        assert allows(good)
        assert not allows(bad)

    def test_a_multiple_too_large_to_compile_is_left_to_who_checks_the_answer(self, tiny) -> None:
        schema = {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 999_983}}}
        assert of_tools(tiny, schema)(call({"n": 5}))
        given = response_format(model_of(schema))
        assert Allows(tiny, response_format=given)({"n": 5})
        with pytest.raises(ValidationError, match="multiple of 999983"):
            model_of(schema).model_validate({"n": 5})

    def test_too_many_tools_too(self, tiny) -> None:
        with pytest.raises(RequestError, match=f"too many tools: {MAX_TOOLS + 1}"):
            of_tools(tiny, *[A] * (MAX_TOOLS + 1))
        assert of_tools(tiny, *[A] * MAX_TOOLS)(call({"a": "x"}, "f7"))

    @pytest.mark.parametrize(
        ("schema", "words"),
        [
            ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "f1: oneOf constraints are not supported"),
            ({"type": "integer", "minimum": 5, "maximum": 1}, "f1: Unsatisfiable schema: required property 'p'"),
            ({"type": "string", "pattern": "x(ab"}, r"f1: invalid pattern: unclosed group, at character 2"),
            ({"enum": ["\ud800"]}, "f1: "),
        ],
    )
    def test_a_refused_tool_is_named_with_the_true_reason(self, tiny, schema: dict[str, Any], words: str) -> None:
        with pytest.raises(RequestError, match=words) as caught:
            of_tools(tiny, A, {"type": "object", "properties": {"p": schema}, "required": ["p"]})
        assert caught.value.param == "tools"
        for noise in ("%json", "start:", "\n"):
            assert noise not in str(caught.value)

    @pytest.mark.parametrize(
        ("form", "words"),
        [
            (ResponseFormat("regex", pattern=r"\bword\b"), "lookarounds not supported"),
            (ResponseFormat("regex", pattern="a\ud800"), "half a surrogate pair"),
            (ResponseFormat("choice", choices=("yes", "\ud800")), "half a surrogate pair"),
        ],
    )
    def test_what_the_compiler_made_around_it_is_not_told(self, tiny, form: ResponseFormat, words: str) -> None:
        with pytest.raises(RequestError, match=words) as caught:
            Allows(tiny, response_format=form)
        assert "start:" not in str(caught.value)

    def test_a_panic_of_the_compiler_is_told_in_words(self) -> None:
        said = compiler_reason("panic: assertion failed: grammar.symbols.len()\n<backtrace>\n 0: <unknown>")
        assert said == "it is too complex for the grammar compiler"

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("(ab", "unclosed group, at character 1, near '(ab'"),
            ("x" * 40 + "[z-a]y", "invalid character class range, .* at character 42"),
            ("a(?=b)", "look-ahead"),
        ],
    )
    def test_a_refused_pattern_says_what_and_where(self, tiny, pattern: str, words: str) -> None:
        for form in (
            ResponseFormat("regex", pattern=pattern),
            ResponseFormat("json_schema", schema={"type": "string", "pattern": pattern}),
        ):
            with pytest.raises(QvlError, match=words.replace("(", r"\(")) as caught:
                Allows(tiny, response_format=form)
            assert "parse error" not in str(caught.value)
            assert "\n" not in str(caught.value)


WEATHER: Final = Tool(
    "f0", "", {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}, strict=True
)
LOOSE: Final = Tool("f1", "", {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]})


def test_a_strict_tool_that_may_be_called_is_called_by_its_schema(tiny: LocalBackend) -> None:
    allows = Allows(tiny, tools=(WEATHER, LOOSE))
    assert allows("Just text, and <b>no call</b>.")
    assert allows(call({"a": 1}))
    assert allows("First this: " + call({"a": 2}) + "\nthen " + call({"b": "anything"}, "f1") + "\n")
    assert not allows(call({"a": 3}))
    assert not allows(call({}))
    assert not allows(call({"a": 1}, "f2"))
    assert not allows("<tool_call>no call at all</tool_call>")


def test_without_parallel_calls_the_first_is_the_end(tiny: LocalBackend) -> None:
    allows = Allows(tiny, tools=(LOOSE,), parallel_tool_calls=False)
    assert allows("Text.")
    assert allows("Text. " + call({"any": 1}, "f1"))
    assert not allows(call({}, "f1") + "\n" + call({}, "f1"))


def test_tools_without_a_form_have_no_grammar(tiny: LocalBackend) -> None:
    assert tiny._loaded is not None
    assert tiny._loaded.grammars.matcher(ChatRequest(QUESTION, tools=(LOOSE,))) is None
