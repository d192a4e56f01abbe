"""Several tool calls in one answer, streamed at once: through each API's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from qvl.backends.openai.backend import OpenAIBackend
from qvl.server.in_turn import InTurn
from qvl.types import Chunk, ToolCallDelta
from tests.scripted_endpoint import Events, ScriptedEndpoint
from tests.server.conftest import Running, start

CITIES = ["Lima", 'Oslo "north" {}', "Rio"]
CALLS = [(f"call_{n}", "get_weather", json.dumps({"city": city, "at": [n]})) for n, city in enumerate(CITIES)]
NAMED: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASKED: Any = [{"role": "user", "content": "weather?"}]


def event(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def piece(index: int, text: str, **more: Any) -> dict[str, Any]:
    function = {"arguments": text, **({"name": more.pop("name")} if "name" in more else {})}
    return {"index": index, "function": function, **more}


def interleaved() -> list[dict[str, Any]]:
    """Text, then three calls whose arguments come three letters of each at a time; text again in the middle."""
    begun = [piece(n, "", id=ident, name=name, type="function") for n, (ident, name, _) in enumerate(CALLS)]
    events = [event(role="assistant", content="Let me see."), event(tool_calls=begun)]
    longest = max(len(arguments) for _, _, arguments in CALLS)
    for at in range(0, longest, 3):
        pieces = [piece(n, call[2][at : at + 3]) for n, call in enumerate(CALLS) if at < len(call[2])]
        events += [event(tool_calls=pieces)] if at % 2 else [event(tool_calls=[one]) for one in pieces]
        if at == 6:
            events.append(event(content=" One moment."))
    usage = {"prompt_tokens": 5, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 4}}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    return [*events, end, {"choices": [], "usage": usage}]


@pytest.fixture(scope="module")
def ahead() -> Iterator[Running]:
    with ScriptedEndpoint(default=Events(interleaved())) as endpoint:
        running = start(OpenAIBackend("echo", base_url=endpoint.url, probe=False), cache="off")
        yield running
        running.stop()


def test_chat_completions(ahead: Running) -> None:
    tools: Any = [{"type": "function", "function": NAMED}]
    found: dict[int, list[str]] = {}
    with openai.OpenAI(base_url=f"{ahead.url}/v1", api_key="none") as client:
        options: Any = {"include_usage": True}
        for chunk in client.chat.completions.create(
            model="echo", messages=ASKED, tools=tools, stream=True, stream_options=options
        ):
            for call in (choice.delta.tool_calls or () for choice in chunk.choices):
                for delta in call:
                    one = found.setdefault(delta.index, ["", "", ""])
                    one[0] += delta.id or ""
                    one[1] += (delta.function and delta.function.name) or ""
                    one[2] += (delta.function and delta.function.arguments) or ""
    assert [tuple(found[n]) for n in sorted(found)] == CALLS
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens_details is not None
    assert chunk.usage.completion_tokens_details.reasoning_tokens == 4


def test_responses(ahead: Running) -> None:
    tools: Any = [{"type": "function", **NAMED}]
    with (
        openai.OpenAI(base_url=f"{ahead.url}/v1", api_key="none") as client,
        client.responses.stream(model="echo", input=ASKED, tools=tools) as stream,
    ):
        events = list(stream)
        whole = stream.get_final_response()
    calls = [item for item in whole.output if item.type == "function_call"]
    assert [(call.call_id, call.name, call.arguments) for call in calls] == CALLS
    assert whole.output_text == "Let me see. One moment."
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == 4
    assert [one.sequence_number for one in events] == list(range(len(events)))


def test_messages_have_one_block_after_the_other(ahead: Running) -> None:
    tools: Any = [{"name": "get_weather", "input_schema": NAMED["parameters"]}]
    asked: Any = {"model": "echo", "messages": ASKED, "tools": tools, "max_tokens": 64}
    with anthropic.Anthropic(base_url=ahead.url, api_key="none") as client:
        with client.messages.stream(**asked) as stream:
            events = [one for one in stream if one.type.startswith("content_block_")]
            whole = stream.get_final_message()
        plain = client.messages.create(**asked)
    for message in (whole, plain):
        calls = [block for block in message.content if block.type == "tool_use"]
        assert [(call.id, call.name, call.input) for call in calls] == [
            (ident, name, json.loads(text)) for ident, name, text in CALLS
        ]
        assert "".join(block.text for block in message.content if block.type == "text") == "Let me see. One moment."
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens_details is not None
        assert message.usage.output_tokens_details.thinking_tokens == 4
    open_block = None
    for one in events:
        if one.type == "content_block_start":
            assert open_block is None
            open_block = one.index
        assert one.index == open_block
        if one.type == "content_block_stop":
            open_block = None


def test_a_call_that_never_ends_keeps_nothing_back_for_good() -> None:
    turns = InTurn()
    given = [
        Chunk(tool_calls=(ToolCallDelta(0, "a", "look", '{"x'), ToolCallDelta(1, "b", "see", "{}"))),
        Chunk(text="and", tool_calls=(ToolCallDelta(1, arguments="more"), ToolCallDelta(0, arguments='": 1'))),
    ]
    taken = [one for chunk in given for one in turns.take(chunk)]
    assert [one.index for one in taken if isinstance(one, ToolCallDelta)] == [0, 0]
    rest = list(turns.rest())
    assert [one if isinstance(one, tuple) else one.arguments for one in rest] == ["{}", ("text", "and")]
