"""Messages, calls and tools as clients keep them and send them back: what says nothing to a model is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Running, question
from tests.server.test_openai_client import WEATHER

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
EARLIER = {"role": "user", "content": "hi"}


def asked(server: Running, answer: dict[str, Any], **more: Any) -> Any:
    body = {"messages": [EARLIER, {"role": "assistant", **answer}, *question("and now")["messages"]], **more}
    return server.post(CHAT, body)


@pytest.mark.parametrize(
    "fields",
    [
        {"images": []},
        {"thinking": "I see"},
        {"prefix": False},
        {"tool_calls": []},
        {"images": [], "thinking": None, "prefix": False, "audio": None},
    ],
)
def test_fields_of_an_answer_that_say_nothing_are_passed_over(server: Running, fields: dict[str, Any]) -> None:
    answer = asked(server, {"content": "hello", **fields})
    assert answer.status_code == 200, answer.text
    assert server.backend.requests[-1].messages[1].text == "hello"


@pytest.mark.parametrize("fields", [{"images": ["AAAA"]}, {"prefix": True}, {"images": False}, {"prefix": 0}])
def test_fields_that_ask_for_something_are_refused(server: Running, fields: dict[str, Any]) -> None:
    answer = asked(server, {"content": "hello", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"messages[1].{next(iter(fields))}"


THOUGHTS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "I see", "signature": "x"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "reasoning", "reasoning": "I see", "extras": {}},
    {"type": "reasoning", "summary": []},
]


@pytest.mark.parametrize("thought", THOUGHTS)
def test_thoughts_of_an_assistant_are_not_shown_to_it_again(server: Running, thought: dict[str, Any]) -> None:
    said = [thought, {"type": "text", "text": f"hello {THOUGHTS.index(thought)}"}]
    assert asked(server, {"content": said}).status_code == 200
    assert server.backend.requests[-1].messages[1].text == said[1]["text"]
    items = [EARLIER, {"role": "assistant", "content": said}, {"role": "user", "content": "and then"}]
    assert server.post(RESPONSES, {"input": items}).status_code == 200
    assert server.backend.requests[-1].messages[1].text == said[1]["text"]
    refused = server.post(CHAT, {"messages": [{"role": "user", "content": said}]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages[0].content[0].type")


@pytest.mark.parametrize("inner", [False, True])
def test_a_tool_may_say_that_it_is_cached(server: Running, inner: bool) -> None:
    label = {"cache_control": {"type": "ephemeral"}}
    function = {**WEATHER["function"], **(label if inner else {})}
    tool = {"type": "function", "function": function, **({} if inner else label)}
    whole = server.post(CHAT, {**question("use get_weather"), "tools": [tool]})
    assert whole.status_code == 200, whole.text
    flat = {"type": "function", **WEATHER["function"], **label}
    answer = server.post(RESPONSES, {"input": "use get_weather", "tools": [flat]})
    assert answer.status_code == 200, answer.text
    assert "cache_control" not in answer.json()["tools"][0]


def test_items_of_a_response_come_back_with_all_that_clients_keep(server: Running) -> None:
    label = {"cache_control": {"type": "ephemeral"}}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n", "caller": {}}
    output = {"type": "function_call_output", "call_id": "c", "output": "3", "caller": {"type": "direct"}}
    items = [{**EARLIER, **label}, {**call, **label}, {**output, **label}]
    answer = server.post(RESPONSES, {"input": items})
    assert answer.status_code == 200, answer.text
    assert server.backend.requests[-1].messages[1].tool_calls[0].name == "f"
