"""Answers that must have a form and repeat themselves without an end."""

from __future__ import annotations

from typing import Any

import pytest

from qvl import Pipeline, Tool
from qvl.backends.endless import LONGEST_RUN, EndlessWatch, RunWatch, longest_run
from qvl.errors import BackendResponseError
from qvl.types import ChatRequest, Chunk, Message, ResponseFormat, TextPart, ToolCallDelta
from tests.scripted_endpoint import Events, ScriptedEndpoint

QUESTION = (Message("user", (TextPart("x"),)),)


def of_schema(schema: Any) -> ChatRequest:
    return ChatRequest(QUESTION, response_format=ResponseFormat("json_schema", schema=schema))


def found(text: str, size: int = 7) -> str:
    watch = RunWatch()
    return next((run for at in range(0, len(text), size) if (run := watch.feed(text[at : at + size]))), "")


@pytest.mark.parametrize(
    "unit",
    [
        *(" ", "0", "\\n", "\\\\", '\\"', "一", "😀", "❤️", "90", "abcdef"),
        *(
            "\\n ",
            "\\t\\n",
            "\\r\\n",
            "\n  ",
            " \u00a0",
            "\u3000 \\n",
            "\\u3000",
            "\\u0000",
            "\\u00a0 ",
            "\\ud83d\\ude00",
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_comes_128_times_is_a_run(unit: str, size: int) -> None:
    assert found('{"a": "b' + unit * LONGEST_RUN, size)
    assert not found('{"a": "b' + unit * 40 + '"}', size)


def test_white_space_of_many_kinds_is_one_run() -> None:
    mixed = "".join(" \n\t\u3000\u2003"[n * n % 5] + ("\\n" if n % 3 else "\\u00a0") for n in range(LONGEST_RUN // 2))
    assert found("{" + mixed)


def test_equal_items_of_a_list_are_no_run_until_they_are_very_many() -> None:
    assert not found(str([0] * 500))
    assert not found(str([0.5] * 500))
    assert found("[" + "0, " * 2000)


def test_text_that_only_looks_alike_is_no_run() -> None:
    assert not found("".join(f'{{"row": {n}, "value": null}}, ' for n in range(500)))
    assert not found("abcdefg" * 300)


class TestWhichAnswersAreWatched:
    @pytest.mark.parametrize(
        "request_",
        [
            ChatRequest(QUESTION, response_format=ResponseFormat("json_object")),
            ChatRequest(QUESTION, response_format=ResponseFormat("regex", pattern="[a-z ]*")),
            ChatRequest(QUESTION, response_format=ResponseFormat("choice", choices=("a", "b"))),
            ChatRequest(QUESTION, tools=(Tool("f", "", {"type": "object"}),), tool_choice="required"),
            of_schema({"type": "object", "description": "-" * 200, "properties": {"a": {"default": "=" * 200}}}),
            of_schema({"type": "object", "properties": {"a": {"type": "string", "examples": [" " * 200]}}}),
        ],
    )
    def test_each_that_must_have_a_form(self, request_: ChatRequest) -> None:
        assert longest_run(request_) == LONGEST_RUN

    @pytest.mark.parametrize(
        "request_",
        [
            ChatRequest(QUESTION),
            ChatRequest(QUESTION, tools=(Tool("f", "", {"type": "object"}),)),
            ChatRequest(QUESTION, response_format=ResponseFormat("choice", choices=("yes", "no" + "o" * 200))),
            ChatRequest(QUESTION, response_format=ResponseFormat("regex", pattern="a" + "-" * 200)),
            of_schema({"type": "object", "properties": {"line": {"const": "-=" * 200}}}),
            of_schema({"$defs": {"E": {"enum": [{"deep": ["\t" * 200]}]}}, "$ref": "#/$defs/E"}),
        ],
    )
    def test_none_that_is_free_or_asks_for_a_run(self, request_: ChatRequest) -> None:
        assert longest_run(request_) == 0

    def test_a_pattern_may_ask_for_a_longer_one(self) -> None:
        for pattern in ("[0-9]{200}", "(a{20}){10}", "-{200,}"):
            form = ResponseFormat("regex", pattern=pattern)
            assert longest_run(ChatRequest(QUESTION, response_format=form)) > 200
            assert longest_run(of_schema({"type": "string", "pattern": pattern})) > 200
        assert longest_run(of_schema({"type": "string", "pattern": "a{0,900}"})) == LONGEST_RUN

    def test_choices_and_calls_are_watched_apart(self) -> None:
        watch = EndlessWatch(ChatRequest(QUESTION, response_format=ResponseFormat("json_object")))
        for index in range(4):
            watch.read(Chunk("0" * 100, index))
            watch.read(Chunk("", index, tool_calls=(ToolCallDelta(0, arguments="0" * 100),)))
        with pytest.raises(BackendResponseError, match=r"'0' 128 times"):
            watch.read(Chunk("", 2, tool_calls=(ToolCallDelta(0, arguments="0" * 100),)))


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    ],
)
def test_an_endpoints_answer_is_watched_and_not_kept(endpoint: ScriptedEndpoint, asked: dict[str, Any]) -> None:
    delta = {"content": " " * 200}
    if "tools" in asked:
        delta = {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{" + " " * 200}}]}
    events = [{"choices": [{"index": 0, "delta": d, "finish_reason": f}]} for d, f in ((delta, None), ({}, "stop"))]
    for _ in range(3):
        endpoint.say(Events(events))
    with Pipeline("openai:m", base_url=endpoint.url, probe=False, cache="memory:") as pipeline:
        for _ in range(2):
            with pytest.raises(BackendResponseError, match="white space 128 times in a row") as caught:
                pipeline.chat([{"role": "user", "content": "x"}], **asked)
            assert caught.value.code == "endless_answer"
        free = pipeline.chat([{"role": "user", "content": "x"}])
    if "tools" not in asked:
        assert free.text == " " * 200
