"""Answers whose schema requires nothing, or that came without the object around them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel

from qvl.analysis.parse_answer import parse
from qvl.analysis.schema_types import schema_type
from qvl.backends.grammar_schema import call_schema
from qvl.backends.openai.call_assembler import CallAssembler
from qvl.backends.openai.finish_words import meaning_of
from qvl.errors import AnalysisError
from qvl.types import Tool


class Bill(BaseModel):
    shop: str | None = None
    total: float | None = None


ACME = Bill(shop="ACME", total=3.5)


@pytest.mark.parametrize(
    "text",
    [
        '{"shop":"ACME","total":3.5}',
        '{"bill":{"shop":"ACME","total":3.5}}',
        '{"shop":"ACME","total":3.5}\n\nConfidence: {"score":0.9}',
        'Schema: {"type":"object","title":"Bill","properties":{}} Answer: {"shop":"ACME","total":3.5}',
        '{"shop":"ACME","total":3.5}</think>',
    ],
)
def test_an_object_is_taken_for_its_own_fields(text: str) -> None:
    assert parse(text, Bill) == ACME


def test_an_object_without_any_of_the_fields_is_an_error_and_an_empty_one_is_empty() -> None:
    with pytest.raises(AnalysisError, match="none of the fields shop, total"):
        parse('{"store":"ACME"}', Bill)
    assert parse("{}", Bill) == Bill()


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (list[Bill], '[{"shop":"A"},{"shop":"B"}]', [Bill(shop="A"), Bill(shop="B")]),
        (list[Bill], '```json\n[{"shop":"A"}]\n```', [Bill(shop="A")]),
        (list[int], "[1,2]", [1, 2]),
        (int, "3", 3),
        (Literal["a", "b"], '"a"', "a"),
        (list[int], '{"answer":[1]}', [1]),
        ({"name": "Bill", "schema": {"type": "object", "properties": {"shop": {"type": "string"}}}}, "{}", {}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array", "items": {}}}},
            '{"answer":[1]}',
            [1],
        ),
    ],
)
def test_a_list_or_a_plain_value_may_stand_alone(schema: Any, text: str, value: Any) -> None:
    kind = schema_type(schema)
    assert kind.value(parse(text, kind.model)) == value


def test_a_calls_name_is_told_once() -> None:
    placer = CallAssembler()
    pieces = [
        placer.read([{"index": 0, "id": "a", "function": {"name": "f", "arguments": part}}])[0]
        for part in ('{"x"', ":", "1}")
    ]
    assert [(piece.id, piece.name) for piece in pieces] == [("a", "f"), (None, None), (None, None)]
    assert len(placer) == 1


@pytest.mark.parametrize(
    ("word", "meaning"),
    [("timed_out", "failed"), ("user_cancelled", "failed"), ("repetition", "failed"), ("flagged", "withheld"),
     ("PROHIBITED", "withheld"), ("rai_violation", "withheld"), ("end_turn", "stop"), ("complete", "stop")],
)  # fmt: skip
def test_siblings_of_known_finish_words_are_known(word: str, meaning: str) -> None:
    assert meaning_of(word) == meaning


@pytest.mark.parametrize("parameters", [{"properties": {"a": {}}}, {"type": ["object", "null"]}, {"description": "x"}])
def test_arguments_are_an_object_whatever_the_parameters_leave_open(parameters: dict[str, Any]) -> None:
    assert call_schema([Tool("f", "", parameters)])["$defs"]["t0"]["type"] == "object"
