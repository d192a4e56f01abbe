"""Requests for tools and structured answers as instructor, pydantic-ai, LangChain, vLLM's clients and OpenAI's own
helpers write them, answered by the bundled model."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.conftest import Running, start

pytest.importorskip("torch")

from qvl.backends.local.backend import LocalBackend

ASKED = [{"role": "user", "content": "What brand is it?"}]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    """A part of it."""

    color: Color
    size: Literal["small", "large"]


class Found(BaseModel):
    """What was found."""

    brand: Literal["NORVIK", "ZELPHO"]
    part: Part
    others: list[Part] = Field(max_length=2)


class Tree(BaseModel):
    kind: Literal["leaf", "node"]
    child: Tree | None = None


@pytest.fixture(scope="module")
def model() -> Iterator[Running]:
    running = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20), cache="off")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(model: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{model.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def chat(model: Running, **body: Any) -> dict[str, Any]:
    answer = model.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 300, **body})
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def tool(schema: type[BaseModel], **more: Any) -> dict[str, Any]:
    """As instructor and pydantic-ai write it: the class's own schema, with its `$defs`."""
    function = {"name": schema.__name__, "description": schema.__doc__ or "", **more}
    return {"type": "function", "function": {**function, "parameters": schema.model_json_schema()}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Found"}}])
@pytest.mark.parametrize("schema", [Found, Tree])
def test_a_tool_with_definitions_is_called_in_form(model: Running, schema: type[BaseModel], choice: Any) -> None:
    if schema is Tree and isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": "Tree"}}
    # Left to itself the model may write one node in the other without an end.
    null = model.post("/tokenize", {"prompt": " null", "add_special_tokens": False}).json()["tokens"]
    answer = chat(model, tools=[tool(schema)], tool_choice=choice, logit_bias={str(null[0]): 50})
    assert answer["finish_reason"] == "tool_calls"
    schema.model_validate_json(answer["message"]["tool_calls"][0]["function"]["arguments"])
    assert not answer["message"]["content"]


def test_two_tools_whose_definitions_have_the_same_name(model: Running) -> None:
    answer = chat(model, tools=[tool(Found), tool(Part, strict=True)], tool_choice="required")
    called = answer["message"]["tool_calls"][0]["function"]
    {"Found": Found, "Part": Part}[called["name"]].model_validate_json(called["arguments"])


def test_openais_own_helpers(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="bundled", messages=ASKED, tools=[openai.pydantic_function_tool(Found)], tool_choice="required"
    )
    calls = parsed.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0].function.parsed_arguments, Found)
    answer = client.chat.completions.parse(model="bundled", messages=ASKED, response_format=Found)
    assert isinstance(answer.choices[0].message.parsed, Found)


def test_a_small_schema_that_is_not_closed_is_answered_in_form(model: Running) -> None:
    schema = {"type": "object", "properties": {"brand": {"enum": ["NORVIK", "none"]}, "red": {"type": "boolean"}}}
    for strict in (True, False):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}}
        answer = chat(model, response_format=form)
        assert answer["finish_reason"] == "stop"
        assert set(json.loads(answer["message"]["content"])) <= {"brand", "red"}


def test_a_forced_call_is_streamed_piece_by_piece_and_is_the_whole_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "bundled", "messages": ASKED, "tools": [tool(Found)], "tool_choice": "required"}
    pieces = [
        call
        for chunk in client.chat.completions.create(stream=True, **asked)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
        # Several may come.
        if call.index == 0
    ]
    assert pieces[0].function.name == "Found"
    assert len(pieces) > 3
    streamed = "".join(piece.function.arguments or "" for piece in pieces)
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls[0].function.arguments
    assert streamed == whole


@pytest.mark.parametrize("most", [1, 4, 12, 20])
@pytest.mark.parametrize("stream", [True, False])
def test_a_forced_call_that_is_cut_off_leaves_no_markup(model: Running, most: int, stream: bool) -> None:
    body = {"tools": [tool(Found)], "tool_choice": "required", "max_tokens": most}
    if not stream:
        answer = chat(model, **body)
        assert (answer["finish_reason"], answer["message"]["content"] or "") == ("length", "")
        return
    with model.client() as client:
        text = client.post("/v1/chat/completions", json={"messages": ASKED, "stream": True, **body}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(c["delta"].get("content") or "" for event in events for c in event["choices"]) == ""
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"response_format": {"type": "regex", "pattern": "(ab"}}, "unclosed group, at character 1"),
        ({"response_format": {"type": "choice", "choices": [str(i) for i in range(20_000)]}}, "20000 choices"),
        (
            {"tools": [tool(Found) | {"function": {"name": f"f{i}"}} for i in range(500)], "tool_choice": "required"},
            "500",
        ),
        ({"stop": [f"stop {i}" for i in range(20_000)]}, "stop"),
        ({"stop_token_ids": list(range(90_000))}, "stop_token_ids"),
        ({"stop_token_ids": list(range(300_000))}, "more than 100000 items"),
    ],
)
def test_what_is_too_large_is_the_clients_fault_and_said(model: Running, body: dict[str, Any], words: str) -> None:
    answer = model.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 4, **body})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
