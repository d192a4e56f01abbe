"""A refusal names the field that the client sent, in each API's own words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qvl.errors import RequestError
from qvl.server.field_names import named_as_sent
from tests.server.conftest import Running, data_url, start

pytest.importorskip("torch")

from qvl.backends.local.backend import LocalBackend
from tests.server.echo_backend import EchoBackend

ASKED = [{"role": "user", "content": "What brand is it?"}]
CHAT: dict[str, Any] = {"messages": ASKED}
RESPONSES: dict[str, Any] = {"input": ASKED}
MESSAGES: dict[str, Any] = {"messages": ASKED, "max_tokens": 8}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
BODIES = {"chat": CHAT, "responses": RESPONSES, "messages": MESSAGES}
DEEP = {"enum": ["x" * 300_000]}
OPEN = {"type": "array", "contains": {"type": "string"}}


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    running = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20), cache="off")
    yield running
    running.stop()


def form(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


@pytest.mark.parametrize(
    ("route", "fields", "name"),
    [
        ("chat", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("responses", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("responses", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("messages", {"output_config": {"effort": "high"}}, "output_config.effort"),
        ("messages", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("messages", {"thinking": {"type": "enabled"}}, "thinking.type"),
        ("chat", {"max_completion_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ("chat", {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ("chat", {"response_format": form(DEEP)}, "response_format"),
        ("chat", {"structured_outputs": {"json": DEEP}}, "structured_outputs.json"),
        ("chat", {"structured_outputs": {"regex": "(" * 40_000}}, "structured_outputs.regex"),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "a", "schema": DEEP}}}, "text.format"),
        ("messages", {"output_config": {"format": {"type": "json_schema", "schema": DEEP}}}, "output_config.format"),
        ("messages", {"stop_sequences": [""]}, "stop_sequences"),
        ("messages", {"stop": [""]}, "stop"),
    ],
)
def test_refusals_name_what_was_sent(local: Running, route: str, fields: dict[str, Any], name: str) -> None:
    body = BODIES[route] | fields
    answer = local.post(PATHS[route], body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    # Anthropic's errors have no field for it.
    assert name in error["message"] if route == "messages" else error["param"] == name
    assert not any(other in error["message"] for other in ("response_format", "chat_template") if other != name)
    assert "max_completion_tokens" not in fields or "more than max_completion_tokens=4" in error["message"]


def test_what_no_backend_has_is_refused_by_the_clients_name() -> None:
    """A backend without pictures, reasoning and prefilled answers."""
    running = start(EchoBackend())
    try:
        last = [*ASKED, {"role": "assistant", "content": "It is"}]
        told = running.post("/v1/messages", MESSAGES | {"messages": last}).json()["error"]["message"]
        assert "messages[1]" in told
        assert "continue_final_message" not in told
        told = running.post("/v1/responses", RESPONSES | {"reasoning": {"effort": "low"}}).json()["error"]
        assert told["param"] == "reasoning.effort"
        assert told["code"] == "unsupported_parameter"
        asked = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": data_url()}] * 9}]}
        told = running.post("/v1/responses", asked).json()["error"]
        assert told["param"] == "input"
        picture = {"image_url": {"url": "data:image/png;base64,AAAA"}, "type": "image_url"}
        told = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [picture]}]}).json()
        assert told["error"]["param"] == "messages[0].content[0].image_url"
    finally:
        running.stop()


def test_words_of_english_are_left_alone() -> None:
    names = {"messages": "input", "max_tokens": "max_output_tokens", "stop": "stop_sequences"}
    error = RequestError(
        "messages[2].content: the messages stop where max_tokens=5 is", hint="stop: fewer messages", param="messages[2]"
    )
    told = named_as_sent(error, names)
    assert told.message == "input: the messages stop where max_output_tokens=5 is"
    assert (told.hint, told.param) == ("stop_sequences: fewer messages", "input")
    assert (error.param, type(told)) == ("messages[2]", RequestError)
    assert named_as_sent(RequestError("min_max_tokens", param="min_max_tokens"), names).param == "min_max_tokens"
