"""A qvl-serve as the endpoint of another: both give the same answers, in the form of every API."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anthropic
import openai
import pytest

from qvl.backends.local.backend import LocalBackend
from qvl.backends.openai.backend import OpenAIBackend
from tests.server.conftest import Running, data_url, picture, start

SEEN: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_url()}},
            {"type": "text", "text": "What is shown?"},
        ],
    }
]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOLD: dict[str, Any] = {"name": "get_weather", "description": "Tells the weather"}


class Clients(NamedTuple):
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    server: Running


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Clients, Clients]]:
    """The clients of a server with the bundled model, and those of one that has it as its endpoint."""
    engine = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20), cache=None)
    front = start(OpenAIBackend("bundled", base_url=f"{engine.url}/v1", api_key="none"), cache=None)
    made = [
        Clients(
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0),
            anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0),
            running,
        )
        for running in (engine, front)
    ]
    yield made[0], made[1]
    for clients in made[::-1]:
        clients.openai.close()
        clients.anthropic.close()
        clients.server.stop()


def chat(clients: Clients) -> Any:
    answer = clients.openai.chat.completions.create(
        model="bundled", messages=SEEN, max_tokens=8, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    tokens = [(token.token, len(token.top_logprobs)) for token in choice.logprobs.content or ()]
    return choice.message.content, choice.finish_reason, tokens, answer.usage.prompt_tokens  # type: ignore[union-attr]


def streamed_call(clients: Clients) -> Any:
    events = clients.openai.chat.completions.create(
        model="bundled",
        messages=[{"role": "user", "content": "weather"}],
        tools=[{"type": "function", "function": {**TOLD, "parameters": CITY}}],
        tool_choice="required",
        max_tokens=60,
        stream=True,
    )
    choices = [event.choices[0] for event in events if event.choices]
    calls = [call.function for choice in choices for call in choice.delta.tool_calls or ()]
    return [call.name for call in calls if call.name], "".join(call.arguments or "" for call in calls), choices[-1]


def response(clients: Clients) -> Any:
    with clients.openai.responses.stream(
        model="bundled",
        input="weather",
        tools=[{"type": "function", **TOLD, "parameters": CITY, "strict": True}],
        tool_choice="required",
        max_output_tokens=60,
    ) as stream:
        kinds = [event.type for event in stream if not event.type.endswith(".delta")]
        final = stream.get_final_response()
    (call,) = final.output
    assert final.usage is not None
    return kinds, call.arguments, final.status, final.usage.input_tokens  # type: ignore[union-attr]


def message(clients: Clients) -> Any:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture("red")).decode()}
    asked: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What is shown?"}]
    with clients.anthropic.messages.stream(
        model="bundled", max_tokens=8, messages=[{"role": "user", "content": asked}]
    ) as stream:
        final = stream.get_final_message()
    usage = final.usage
    read = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    return [block.to_dict() for block in final.content], final.stop_reason, read, usage.output_tokens


def failed_tool(clients: Clients) -> Any:
    turns: Any = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": "no"}]},
    ]
    tools: Any = [{**TOLD, "input_schema": CITY}]
    count = clients.anthropic.messages.count_tokens(model="bundled", messages=turns, tools=tools)
    answer = clients.anthropic.messages.create(model="bundled", max_tokens=8, messages=turns, tools=tools)
    return count.input_tokens, [block.to_dict() for block in answer.content]


@pytest.mark.parametrize("ask", [chat, streamed_call, response, message, failed_tool])
def test_an_answer_is_the_same_through_another_server(
    both: tuple[Clients, Clients], ask: Callable[[Clients], Any]
) -> None:
    engine, front = both
    assert ask(front) == ask(engine)


QUESTIONS: list[Any] = [
    {"name": "new", "type": "predicate", "instructions": "Is it red?"},
    {
        "name": "colour",
        "type": "choice",
        "instructions": "Which colour?",
        "choices": [{"value": "red"}, {"value": "blue"}, {"value": "green"}],
    },
    {
        "name": "good",
        "type": "score",
        "instructions": "How good is it?",
        "levels": [{"label": "poor"}, {"label": "fair"}, {"label": "good"}],
    },
]
PARTS: list[Any] = [{"type": "input_image", "image_url": data_url()}, {"type": "input_text", "text": "The seller's."}]


@pytest.mark.parametrize("given", ["It is red, the seller says.", [{"role": "user", "content": PARTS}]])
def test_a_decision_is_the_same_through_another_server(both: tuple[Clients, Clients], given: Any) -> None:
    told = []
    for clients in both:
        answer = clients.server.post("/v1/decisions", {"input": given, "questions": QUESTIONS})
        assert answer.status_code == 200, answer.text
        told.append(answer.json()["answers"])
    for direct, through in zip(*told, strict=True):
        assert (direct["method"], through["method"]) == ("logits", "decisions")
        for name in ("probability", "score", "confidence"):
            assert through.get(name) == pytest.approx(direct.get(name), abs=1e-4)
        shares = [[row["probability"] for row in one.get("probabilities") or ()] for one in (direct, through)]
        assert shares[1] == pytest.approx(shares[0], abs=1e-4)
