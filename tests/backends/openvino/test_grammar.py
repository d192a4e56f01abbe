"""The grammars that are written of schemas, compiled by the library and drawn from: what comes fits the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qvl.analysis.product import ProductAnalysis
from qvl.backends.grammar_schema import enforceable
from qvl.backends.openvino.ebnf import SchemaGrammar

NULL: dict[str, Any] = {"type": "null"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "the analysis": ProductAnalysis.model_json_schema(),
    "several types": {"type": "object", "properties": {"n": {"type": ["integer", "null"]}}, "required": ["n"]},
    "all optional": {"type": "object", "properties": dict.fromkeys("abcd", NULL)},
    "required but not declared": {"type": "object", "properties": {"a": NULL, "c": NULL}, "required": ["c", "z"]},
    "a map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": -3, "maximum": 120}},
    "a list": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 2, "maxItems": 4},
    "no list": {"type": "array", "maxItems": 0},
    "a tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": {"a": [1, "é"]}}], "items": NULL},
    "a bounded tuple": {"type": "array", "prefixItems": [NULL, {"enum": [1, 2]}], "items": False},
    "a text": {"type": "string", "minLength": 2, "maxLength": 5},
    "recursion": {
        "$ref": "#/$defs/n",
        "$defs": {
            "n": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [NULL, {"$ref": "#/$defs/n"}]}},
                "required": ["v", "next"],
            }
        },
    },
    "composition": {
        "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}],
        "$defs": {"a": {"type": "object", "properties": {"a": NULL}, "required": ["a"]}},
    },
    "one of": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "x"}, "v": NULL}, "required": ["k", "v"]},
            {"type": "object", "properties": {"k": {"const": "y"}, "w": NULL}, "required": ["k", "w"]},
        ]
    },
    "any of beside properties": {
        "type": "object",
        "properties": {"a": NULL, "b": NULL},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "a whole number": {"type": "integer", "minimum": -120, "maximum": 1999},
    "a number": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    **{
        form: {"type": "string", "format": form}
        for form in ("date-time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
    },
    "anything": {},
}


# Of those nothing can be spelt in two ways, as a number can.
TIGHT = (
    "all optional",
    "no list",
    "a tuple",
    "a bounded tuple",
    "recursion",
    "composition",
    "one of",
    "a whole number",
)


@pytest.fixture(scope="module")
def drawing(exported: Path) -> Any:
    """Draws from a grammar: all tokens that it allows are equally likely."""
    import openvino_genai

    from qvl.backends.openvino.grammar import constant_model

    pipeline = constant_model(openvino_genai.Tokenizer(str(exported)), 1038)

    def draw(grammar: str, seed: int) -> str:
        structured = openvino_genai.StructuredOutputConfig(grammar=grammar)
        config = openvino_genai.GenerationConfig(
            max_new_tokens=160, do_sample=True, rng_seed=seed, structured_output_config=structured
        )
        return str(pipeline.generate("a", config))

    return draw


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_drawn_from_a_schema_fits_it(drawing: Any, name: str) -> None:
    schema = SCHEMAS[name]
    grammar = SchemaGrammar(enforceable(schema, "response_format"), "response_format").text()
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    whole = 0
    for seed in range(24):
        text = drawing(grammar, seed)
        try:
            value = json.loads(text)
        except ValueError:
            # Cut off at its last token: nothing among equals ends a long text soon.
            assert len(text) > 80, text
            continue
        # The library lets half a surrogate pair pass for a character, which is three when it is read.
        if "\ufffd" not in text:
            validator.validate(value)
            if name in TIGHT:
                assert text == json.dumps(value, ensure_ascii=False)
        whole += 1
    assert whole >= 4
