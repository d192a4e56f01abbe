"""Every answer against OpenAI's published schema, as far as openai-python carries it, and beyond.

openai-python's types are generated from OpenAI's OpenAPI document. They are read strictly here, and a field that they
do not know must be one of ours. What the document requires though it may be null, the types cannot say (to them it is
optional), so it stands in `REQUIRED`, by the document's names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared import ErrorObject
from pydantic import BaseModel, TypeAdapter

from tests.server.conftest import Running, data_url, question, start
from tests.server.test_chat import events
from tests.server.test_messages import Thinker
from tests.server.test_openai_client import WEATHER

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
# `store` is in OpenAI's own answers, though its document does not name it; `name` of a call that is done is required
# by the client's last major version and unknown to this one.
OURS = {
    *("image_tokens", "max_model_len", "max_images", "max_videos", "max_body_bytes", "processor"),
    *("capabilities", "notes"),
    *("store", "name", "root", "parent", "stop_reason"),
}
_TOKEN = ("token", "logprob", "bytes")
REQUIRED: dict[str, tuple[str, ...]] = {
    "ChatCompletion": ("id", "object", "created", "model", "choices"),
    "ChatCompletion.choices": ("index", "message", "finish_reason", "logprobs"),
    "ChatCompletion.choices.message": ("role", "content", "refusal"),
    "ChatCompletion.choices.message.tool_calls": ("id", "type", "function"),
    "ChatCompletion.choices.logprobs": ("content", "refusal"),
    "ChatCompletion.choices.logprobs.content": (*_TOKEN, "top_logprobs"),
    "ChatCompletion.choices.logprobs.content.top_logprobs": _TOKEN,
    "ChatCompletionChunk": ("id", "object", "created", "model", "choices"),
    "ChatCompletionChunk.choices": ("index", "delta", "finish_reason"),
    "ChatCompletionChunk.choices.logprobs": ("content", "refusal"),
    "ChatCompletionChunk.choices.logprobs.content": (*_TOKEN, "top_logprobs"),
    "Completion": ("id", "object", "created", "model", "choices"),
    "Completion.choices": ("index", "text", "finish_reason", "logprobs"),
    "Response": (
        *("id", "object", "created_at", "error", "incomplete_details", "instructions", "metadata", "model", "output"),
        *("parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p"),
    ),
    "Response.usage": (
        *("input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details", "total_tokens"),
    ),
    "ErrorObject": ("message", "type", "param", "code"),
    "Model": ("id", "object", "created", "owned_by"),
}


def walked(value: Any, path: str) -> Iterator[tuple[str, BaseModel]]:
    """Every model in `value`, with its path in the words of `REQUIRED`."""
    if isinstance(value, BaseModel):
        yield path, value
        for name in type(value).model_fields:
            yield from walked(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from walked(item, path)


def fits(kind: Any, value: Any, name: str) -> None:
    """Asserts that `value` is a `kind`, strictly, with nothing strange in it and nothing left out."""
    found = TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    for path, model in walked(found, name):
        strange = set(model.model_extra or ()) - OURS
        assert not strange, (path, strange)
        missing = [field for field in REQUIRED.get(path, ()) if field not in model.model_fields_set]
        assert not missing, (path, missing)


ENCRYPTED = "reasoning.encrypted_content"
TEXT = question("one two three")
PICTURE = question("which", data_url("red"), data_url("blue"))
TOOLS = {**question("use get_weather"), "tools": [WEATHER], "tool_choice": "required"}
SCHEMA = {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}
CHATS = {
    "text": TEXT,
    "pictures": PICTURE,
    "logprobs": {**TEXT, "logprobs": True, "top_logprobs": 2},
    "choices": {**TEXT, "n": 2},
    "cut": {**TEXT, "max_tokens": 1},
    "tools": TOOLS,
    "schema": {**TEXT, "response_format": {"type": "json_schema", "json_schema": SCHEMA}},
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_completions(server: Running, name: str) -> None:
    for _ in range(2):  # the second comes from the cache
        fits(ChatCompletion, server.post(CHAT, CHATS[name]).json(), "ChatCompletion")
        streamed = server.post(CHAT, {**CHATS[name], "stream": True, "stream_options": {"include_usage": True}})
        told = events(streamed.text)
        for event in told:
            fits(ChatCompletionChunk, event, "ChatCompletionChunk")
        assert told[0]["choices"][0]["delta"]["role"] == "assistant"
        assert set(told[-1]["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens"}


def test_completions(server: Running) -> None:
    for body in ({"prompt": "one two"}, {"prompt": ["a", "b"], "logprobs": 2}, {"prompt": "one two", "max_tokens": 1}):
        fits(Completion, server.post(COMPLETIONS, body).json(), "Completion")
        if isinstance(body["prompt"], str):
            for event in events(server.post(COMPLETIONS, {**body, "stream": True}).text):
                # A piece in the middle has no reason to have ended, which the type of the whole does not foresee.
                if event["choices"] and event["choices"][0]["finish_reason"] is None:
                    event["choices"][0]["finish_reason"] = "stop"
                fits(Completion, event, "Completion")


@pytest.mark.parametrize("name", ["text", "picture", "cut", "tools", "logprobs", "schema"])
def test_responses(server: Running, name: str) -> None:
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    image = {"type": "input_image", "image_url": data_url("red"), "detail": "auto"}
    body: dict[str, Any] = {
        "text": {"input": "one two three"},
        "picture": {"input": [{"role": "user", "content": [image, {"type": "input_text", "text": "x"}]}]},
        "cut": {"input": "one two three", "max_output_tokens": 1},
        "tools": {"input": "use get_weather", "tools": [tool], "tool_choice": "required"},
        "logprobs": {"input": "one", "include": ["message.output_text.logprobs"], "top_logprobs": 1},
        "schema": {"input": "one", "text": {"format": {"type": "json_schema", **SCHEMA}}},
    }[name]
    fits(Response, server.post(RESPONSES, body).json(), "Response")
    lines = server.post(RESPONSES, {**body, "stream": True}).text.splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    for event in told:
        fits(ResponseStreamEvent, event, "event")
    fits(Response, told[-1]["response"], "Response")


@pytest.mark.parametrize("summary", [pytest.param(None, marks=pytest.mark.slow), "auto"])
def test_reasoning_is_closed_before_the_answer_begins(summary: str | None) -> None:
    running = start(Thinker())
    try:
        body = {"input": "x", "stream": True, "reasoning": {"summary": summary}, "include": [ENCRYPTED]}
        lines = running.post(RESPONSES, body).text.splitlines()
    finally:
        running.stop()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    for event in told:
        fits(ResponseStreamEvent, event, "event")
    items = [(event["type"], event["output_index"]) for event in told if "output_item" in event["type"]]
    added, done = "response.output_item.added", "response.output_item.done"
    assert items == [(added, 0), (done, 0), (added, 1), (done, 1)]
    closed = [event["item"] for event in told if event["type"] == done]
    assert closed == told[-1]["response"]["output"]
    assert closed[0]["encrypted_content"]


def test_models_and_errors(server: Running) -> None:
    listed = server.get("/v1/models").json()
    assert set(listed) == {"object", "data"}
    assert listed["object"] == "list"
    for model in [*listed["data"], server.get("/v1/models/echo-vl").json()]:
        fits(Model, model, "Model")
    for answer in (
        server.post(CHAT, {"messages": []}),
        server.post(CHAT, {**TEXT, "model": "gpt-7"}),
        server.post(CHAT, question("x", "data:image/png;base64,AAAA")),
        server.get("/v1/models/gpt-7"),
        server.get("/nope"),
        server.get(CHAT),
    ):
        assert set(answer.json()) == {"error"}
        fits(ErrorObject, answer.json()["error"], "ErrorObject")
