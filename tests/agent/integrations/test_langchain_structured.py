"""LangChain's structured output, by a schema or by a call, of endpoints that keep to it and of those that do not."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from typing import Any, TypedDict

import pytest
from pydantic import BaseModel

from qvl import Pipeline
from qvl.agent.integrations.langchain import QvlChatModel
from qvl.errors import AnalysisError
from tests.agent.conftest import ShopModel
from tests.evaluation.shelf import Reader
from tests.scripted_endpoint import Events, ScriptedEndpoint


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Shoe(BaseModel):
    size: int


class Bill(TypedDict):
    """A bill."""

    size: int


BY_NAME = {"title": "Shoe", "description": "a shoe", "type": "object", "properties": {"size": {"type": "integer"}}}
BY_NAME["required"] = ["size"]


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as server:
        yield server


MADE: list[Pipeline] = []


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    yield
    while MADE:
        MADE.pop().close()


def model_at(endpoint: ScriptedEndpoint, *deltas: dict[str, Any], finish: str) -> QvlChatModel:
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    end = {"index": 0, "delta": {}, "finish_reason": finish}
    endpoint.say(Events([{"choices": [choice]} for choice in (*choices, end)]))
    MADE.append(Pipeline("openai:m", base_url=endpoint.url, probe=False, cache="off"))
    return QvlChatModel(pipeline=MADE[-1])


def call(arguments: str, name: str = "Shoe") -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "id": "a", "function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize("schema", [Shoe, BY_NAME, Bill])
@pytest.mark.parametrize("arguments", ['{"size": {"r"', '{"size": 4', ""])
@pytest.mark.parametrize("way", ["invoke", "raw", "stream"])
def test_a_call_that_was_cut_off_says_so(endpoint: ScriptedEndpoint, schema: Any, arguments: str, way: str) -> None:
    model = model_at(endpoint, call(arguments, "Bill" if schema is Bill else "Shoe"), finish="length")
    asked = model.with_structured_output(schema, method="function_calling", include_raw=way == "raw")
    if way == "raw":
        found: Any = asked.invoke("x")
        assert found["parsed"] is None
        assert "cut off" in str(found["parsing_error"])
        return
    with pytest.raises(AnalysisError, match=r"the answer was cut off \(raise max_tokens\)"):
        asked.invoke("x") if way == "invoke" else list(asked.stream("x"))


@pytest.mark.parametrize("schema", [Shoe, BY_NAME])
@pytest.mark.parametrize("said", [call('{"size": 4}'), call('{"size": 4,}'), {"content": 'So: {"size": 4}'}])
def test_a_call_is_read_as_the_schema(endpoint: ScriptedEndpoint, schema: Any, said: dict[str, Any]) -> None:
    found = (
        model_at(endpoint, said, finish="stop").with_structured_output(schema, method="function_calling").invoke("x")
    )
    assert found == (Shoe(size=4) if schema is Shoe else {"size": 4})


def test_an_answer_without_a_call_is_an_error(endpoint: ScriptedEndpoint) -> None:
    asked = model_at(endpoint, {"content": "I would rather not."}, finish="stop")
    with pytest.raises(AnalysisError, match="no JSON object"):
        asked.with_structured_output(Shoe, method="function_calling").invoke("x")


class Shelf(BaseModel):
    counts: dict[Color, int]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_what_a_class_checks_itself_is_not_asked_of_a_grammar(method: str) -> None:
    said = {"counts": {"red": 1}}
    backend = ShopModel([("Shelf", said)] if method == "function_calling" else json.dumps(said))
    with Pipeline(backend=backend, cache="off") as pipeline:
        asked = QvlChatModel(pipeline=pipeline).with_structured_output(Shelf, method=method)
        assert asked.invoke("x") == Shelf(counts={Color.RED: 1})
    (request,) = backend.requests
    schema = request.tools[0].parameters if method == "function_calling" else request.response_format.schema
    assert "propertyNames" not in json.dumps(schema)
    assert "counts" in json.dumps(schema)


def test_a_schema_that_nothing_checks_afterwards_is_passed_on_whole() -> None:
    schema = {**BY_NAME, "minProperties": 1}
    backend = ShopModel('{"size": 4}')
    with Pipeline(backend=backend, cache="off") as pipeline:
        QvlChatModel(pipeline=pipeline).with_structured_output(schema).invoke("x")
    assert backend.requests[0].response_format.schema["minProperties"] == 1  # type: ignore[index]


class Seen(BaseModel):
    brand: str
    category: str


def test_a_structured_answer_tells_how_likely_each_of_its_values_was() -> None:
    with Pipeline(backend=Reader(), cache="off") as pipeline:
        model = QvlChatModel(pipeline=pipeline, params={"logprobs": 0})
        told = model.with_structured_output(Seen, include_raw=True).invoke("What is it?")
        plain = QvlChatModel(pipeline=pipeline).with_structured_output(Seen, include_raw=True).invoke("What is it?")
    assert isinstance(told, dict)
    assert isinstance(plain, dict)
    assert told["parsed"] == Seen(brand="NORVIK", category="mug")
    facts = told["raw"].response_metadata
    assert facts["field_confidence"] == pytest.approx({"brand": 0.64, "category": 0.8})
    assert facts["confidence"] == pytest.approx(0.64 * 0.8)
    assert facts["confidence_method"] == "token_probability_product"
    assert "confidence" not in plain["raw"].response_metadata
