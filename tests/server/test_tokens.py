"""/tokenize, /detokenize and counting, over the bundled model and over an endpoint in front of it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.conftest import Running, data_url, picture, start
from tests.server.test_openapi import OF_TOKENS

pytest.importorskip("torch")

from qvl.backends.local.backend import LocalBackend
from qvl.backends.openai.backend import OpenAIBackend

CONTENT = [{"type": "image_url", "image_url": {"url": data_url("red")}}, {"type": "text", "text": "What brand?"}]
MESSAGES = [{"role": "user", "content": CONTENT}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    running = start(LocalBackend(device="cpu"))
    # Loading takes longer than `start` waits on a busy machine.
    while running.get("/ready").status_code != 200:
        threading.Event().wait(0.05)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def front(local: Running) -> Iterator[Running]:
    """A server whose endpoint is the other one."""
    running = start(OpenAIBackend(base_url=f"{local.url}/v1", api_key="none"))
    yield running
    running.stop()


@pytest.fixture(params=["local", "front"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a_prompt_is_split_and_put_together_again(server: Running) -> None:
    told = server.post("/tokenize", {"prompt": "What brand is it?", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) > 1
    assert "".join(told["token_strs"]) == "What brand is it?"
    assert told["max_model_len"] > 0
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "What brand is it?"}


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL]}])
def test_messages_count_as_they_do_in_an_answer(server: Running, fields: dict[str, Any]) -> None:
    told = server.post("/tokenize", {"messages": MESSAGES, **fields}).json()
    usage = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, **fields}).json()["usage"]
    assert told["count"] == usage["prompt_tokens"]
    assert told["token_strs"] is None


def test_anthropics_count_is_that_of_its_message(server: Running) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture("red")).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What brand?"}]
    body = {"messages": [{"role": "user", "content": content}], "system": "be brief"}
    told = server.post("/v1/messages/count_tokens", body).json()
    usage = server.post("/v1/messages", {**body, "max_tokens": 1}).json()["usage"]
    assert told == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_the_count_of_a_response_is_that_of_its_answer(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    shown: Any = {"type": "input_image", "image_url": data_url(), "detail": "auto"}
    content: Any = [shown, {"type": "input_text", "text": "What brand?"}]
    tools: Any = [{"type": "function", **TOOL["function"], "strict": False}]
    asked: Any = {"model": "bundled", "input": [{"role": "user", "content": content}], "instructions": "be brief"}
    for fields in ({}, {"tools": tools}):
        answer = client.responses.create(**asked, **fields, max_output_tokens=1)
        assert client.responses.input_tokens.count(**asked, **fields).input_tokens == answer.usage.input_tokens
    following: Any = {"model": "bundled", "input": "And now?", "previous_response_id": answer.id}
    again = client.responses.create(**following, max_output_tokens=1)
    assert client.responses.input_tokens.count(**following).input_tokens == again.usage.input_tokens
    assert client.responses.input_tokens.count(**following).object == "response.input_tokens"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/responses/input_tokens", {}, "input"),
        ("/v1/responses/input_tokens", {"input": "x", "frobnicate": 1}, "frobnicate"),
        ("/v1/responses/input_tokens", {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/tokenize", {}, "messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "messages"),
        ("/tokenize", {"prompt": "a", "frobnicate": 1}, "frobnicate"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_faults_are_named(local: Running, path: str, body: dict[str, Any], param: str) -> None:
    answer = local.post(path, body)
    assert answer.status_code == (404 if "previous_response_id" in body else 400)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_sequence_is_told(server: Running, streamed: bool) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked: Any = {"model": "bundled", "max_tokens": 16, "messages": [{"role": "user", "content": "What brand is it?"}]}
    if streamed:
        with client.messages.stream(**asked, stop_sequences=["zzz", " picture"]) as stream:
            answer = stream.get_final_message()
    else:
        answer = client.messages.create(**asked, stop_sequences=["zzz", " picture"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " picture")
    assert answer.content[0].text == "I need a"  # type: ignore[union-attr]
    whole = client.messages.create(**asked, stop_sequences=["zzz"])
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)


def test_an_answer_goes_on_from_its_beginning(server: Running) -> None:
    body = {"max_tokens": 16, "messages": [{"role": "user", "content": "What brand is it?"}]}
    body["messages"] += [{"role": "assistant", "content": "I need"}]  # type: ignore[operator]
    answer = server.post("/v1/messages", body).json()
    assert answer["content"][0]["text"] == " a picture."
    told = server.post("/v1/messages/count_tokens", {"messages": body["messages"]}).json()
    assert told["input_tokens"] == answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"]


def test_thinking_is_refused_where_the_model_cannot(local: Running) -> None:
    body = {"max_tokens": 16, "messages": [{"role": "user", "content": "What brand is it?"}]}
    assert local.post("/v1/messages", {**body, "thinking": {"type": "disabled"}}).status_code == 200
    for fields in ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"output_config": {"effort": "high"}}):
        answer = local.post("/v1/messages", {**body, **fields})
        assert answer.status_code == 400
        assert "cannot think" in answer.json()["error"]["message"]


def test_the_examples_of_the_document_are_answered(local: Running) -> None:
    paths = local.get("/openapi.json").json()["paths"]
    for path in OF_TOKENS:
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert local.post(path, example).status_code == 200, path


def test_a_prompt_beyond_the_context_is_counted(local: Running) -> None:
    told = local.post("/tokenize", {"prompt": "brand " * 20_000}).json()
    assert told["count"] > told["max_model_len"]


def test_an_endpoint_without_the_route_is_named(endpoint, serve) -> None:
    server = serve(OpenAIBackend(base_url=f"{endpoint.url}", api_key="none", probe=False, model="m"))
    told = server.post("/tokenize", {"prompt": "a", "chat_template_kwargs": {"x": 1}})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "chat_template_kwargs")
    answer = server.post("/tokenize", {"prompt": "a", "add_generation_prompt": True})
    assert answer.status_code == 400
    assert "has no /tokenize" in answer.json()["error"]["message"]
