"""Bytes to text to chunks: no broken characters, stop strings across tokens, reasoning and tool calls told apart."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.backends.local.model.sampler import Sampled
from qvl.backends.local.text.detokenizer import Detokenizer, Splitter, Vocabulary, _byte_letters, parse_call
from qvl.chunks import fold
from qvl.errors import BackendResponseError
from qvl.types import Chunk

LETTERS = {byte: letter for letter, byte in _byte_letters().items()}
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")


class Bytes:
    """A tokenizer whose token i < 256 is byte i, and then the markup."""

    added_tokens_decoder = {  # noqa: RUF012 - shaped like transformers' own
        **{256 + i: SimpleNamespace(content=word, special=False) for i, word in enumerate(MARKUP)},
        300: SimpleNamespace(content="<|im_end|>", special=True),
    }

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return LETTERS.get(token)


VOCABULARY = Vocabulary(Bytes())


def run(text: str | bytes, *, reason: Any = "stop", sizes: list[int] | None = None, **settings: Any) -> list[Chunk]:
    """Every byte a token; chunks as they come."""
    output = Detokenizer(VOCABULARY, **settings)
    chunks = []
    for byte in text.encode() if isinstance(text, str) else text:
        chunk = output.push(Sampled(byte))
        if chunk is not None:
            chunks.append(chunk)
        if output.stopped:
            break
    return [*chunks, output.finish(reason)]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_text_comes_out_as_it_went_in_and_never_broken(text: str) -> None:
    chunks = run(text, free=False)
    assert "".join(chunk.text for chunk in chunks) == text
    assert not any("�" in chunk.text for chunk in chunks) or "�" in text


def test_bytes_that_are_no_text_end_as_replacement_characters() -> None:
    assert "".join(chunk.text for chunk in run(b"ab\xff\xe4\xbd")) == "ab��"


@settings(max_examples=150, deadline=None)
@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_the_answer_before_it_and_no_earlier(text: str, stop: list[str]) -> None:
    # The first stop string to be complete wins; of several completed by one character, the one that begins first.
    expected = text
    for end in range(1, len(text) + 1):
        places = [text[:end].find(word) for word in stop if word in text[:end]]
        if places:
            expected = text[: min(places)]
            break
    assert "".join(chunk.text for chunk in run(text, stop=tuple(stop), free=False)) == expected


def test_logprobs_are_those_of_the_shown_tokens() -> None:
    chunks = run("hello END", stop=(" END",), want_logprobs=True)
    listed = [entry for chunk in chunks for entry in chunk.logprobs]
    assert "".join(entry.token for entry in listed) == "hello"


@settings(max_examples=100, deadline=None)
@given(st.text("ab \n", max_size=12), st.text("cd \n", max_size=12))
def test_reasoning_is_told_apart(thought: str, said: str) -> None:
    choice = fold(run(f"<think>\n{thought}\n</think>\n\n{said}"))[0][0]
    assert choice.reasoning.strip() == thought.strip()
    assert choice.text == said.lstrip()


def test_a_prompt_that_opened_the_thinking_needs_no_mark() -> None:
    choice = fold(run("deep\n</think>\n\nanswer", reasoning=True))[0][0]
    assert (choice.reasoning, choice.text) == ("deep", "answer")


def test_thinking_that_never_ends_is_reasoning() -> None:
    choice = fold(run("<think>on and on", reason="length"))[0][0]
    assert (choice.reasoning, choice.text, choice.finish_reason) == ("on and on", "", "length")


def test_the_word_think_within_an_answer_is_text() -> None:
    assert fold(run("I <think> so </think>"))[0][0].text == "I <think> so </think>"


def test_tool_calls_come_as_calls_and_keep_the_models_spelling() -> None:
    text = (
        'Let me look.\n<tool_call>\n{"name": "find", "arguments": {"q": "mug",  "n": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    )
    choice = fold(run(text, parse_tools=True))[0][0]
    assert choice.text == "Let me look."
    assert choice.finish_reason == "tool_calls"
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [
        ("find", '{"q": "mug",  "n": 2}'),
        ("stop", "{}"),
    ]
    assert len({call.id for call in choice.tool_calls}) == 2


def test_without_tools_the_markup_is_text() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    choice = fold(run(text))[0][0]
    assert (choice.text, choice.tool_calls, choice.finish_reason) == (text, (), "stop")


@pytest.mark.parametrize("block", ["nonsense", '{"name": 3}', "[1]", '{"arguments": {}}'])
def test_a_broken_call_is_text(block: str) -> None:
    assert parse_call(block) is None
    choice = fold(run(f"<tool_call>{block}</tool_call>", parse_tools=True))[0][0]
    assert (choice.text, choice.finish_reason) == (f"<tool_call>{block}</tool_call>", "stop")


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        ('<tool_call>\n{"na', []),
        ('<tool_call>\n{"name": "f", "argu', []),
        ('<tool_call>\n{"name": "f", "arguments": {"q": "a', [("f", '{"q": "a')]),
    ],
)
def test_a_call_cut_off_by_the_length_leaves_no_markup(written: str, calls: list[tuple[str, str]]) -> None:
    choice = fold(run(written, parse_tools=True, reason="length"))[0][0]
    assert choice.text == ""
    assert [(call.name, call.arguments) for call in choice.tool_calls] == calls
    assert choice.finish_reason == "length"


def test_a_call_that_the_model_gave_up_is_text() -> None:
    written = '<tool_call>\n{"name": "f", "argu'
    choice = fold(run(written, parse_tools=True))[0][0]
    assert (choice.text, choice.finish_reason) == (written, "stop")


def test_a_call_is_streamed_as_it_is_written() -> None:
    chunks = run('<tool_call>\n{"name": "find", "arguments": {"q": "red mug"}}\n</tool_call>', parse_tools=True)
    pieces = [delta for chunk in chunks for delta in chunk.tool_calls]
    assert [(pieces[0].name, pieces[0].arguments), pieces[1].name] == [("find", "{"), None]
    assert len(pieces) == len('{"q": "red mug"}')
    assert "".join(piece.arguments for piece in pieces) == '{"q": "red mug"}'
    assert {piece.index for piece in pieces} == {0}
    assert [bool(piece.id) for piece in pieces] == [True] + [False] * (len(pieces) - 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"t": "the tag </tool_call> ends a call"}', {"t": "the tag </tool_call> ends a call"}),
        ('{"t": "a brace } and a quote \\" too"}', {"t": 'a brace } and a quote " too'}),
        ('{"t": "two\nlines\tand\x07bell"}', {"t": "two\nlines\tand\x07bell"}),
        ('{"t": "ends in a backslash \\\\"}', {"t": "ends in a backslash \\"}),
        ("null", {}),
        ('""', {}),
        ('"{\\"q\\": 1}"', {"q": 1}),
        ('"{\\"q\\": \\"two\nlines\\"}"', {"q": "two\nlines"}),
        ('"null"', {}),
        ('" None"', {}),
        ("[]", {}),
        ('{"deep": {"list": [1, {"x": "]}"}]}}', {"deep": {"list": [1, {"x": "]}"}]}}),
    ],
)
@pytest.mark.parametrize("order", ['{"name": "note", "arguments": %s}', '{"arguments": %s, "name": "note"}'])
def test_arguments_are_json_whatever_their_texts_say(arguments: str, said: dict[str, Any], order: str) -> None:
    text = f"Sure.\n<tool_call>\n{order % arguments}\n</tool_call>\nok"
    choice = fold(run(text, parse_tools=True))[0][0]
    assert [(call.name, json.loads(call.arguments)) for call in choice.tool_calls] == [("note", said)]
    assert choice.text == "Sure.ok"


ONE = '{"name": "f", "arguments": {"a": 1}}'
TWO = '{"name": "g", "arguments": "{\\"b\\": 2}"}'


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (f"\n{ONE}}}}}\n", "f"),
        (f"\n{ONE}\n{TWO}\n", "fg"),
        (f"{ONE}{TWO}{ONE}", "fgf"),
        (f"\n{ONE},\n{TWO}}}\n", "fg"),
        (f"\n[{ONE}, {TWO}]\n", "fg"),
        (f"[\n  {TWO}\n]", "g"),
        (f"\n```json\n{ONE}\n```\n", "f"),
        (f"```\n[{ONE},\n{TWO}]\n```", "fg"),
    ],
)
@pytest.mark.parametrize("after", ["</tool_call>\nok", "</tool_call>ok", "</tool_call>", ""])
def test_calls_are_found_in_whatever_a_model_wraps_them(block: str, names: str, after: str) -> None:
    choice = fold(run(f"Sure.\n<tool_call>{block}{after}", parse_tools=True))[0][0]
    assert "".join(call.name for call in choice.tool_calls) == names
    assert {call.name: json.loads(call.arguments) for call in choice.tool_calls}.items() <= {
        "f": {"a": 1},
        "g": {"b": 2},
    }.items()
    assert choice.text == "Sure." + after.removeprefix("</tool_call>").strip()
    assert choice.finish_reason == "tool_calls"


def test_a_wrapped_call_is_streamed_as_it_is_written() -> None:
    chunks = run(f"<tool_call>\n```json\n[{ONE}, {ONE}]\n```\n</tool_call>", parse_tools=True)
    pieces = [delta for chunk in chunks for delta in chunk.tool_calls]
    assert [piece.index for piece in pieces] == [0] * len('{"a": 1}') + [1] * len('{"a": 1}')


def test_text_behind_a_call_that_was_not_ended_is_text() -> None:
    choice = fold(run(f"<tool_call>\n{ONE}\nThat was it.", parse_tools=True))[0][0]
    assert (choice.text, len(choice.tool_calls)) == ("That was it.", 1)


def test_a_call_without_arguments_has_none() -> None:
    choice = fold(run('<tool_call>{"name": "now"}</tool_call>', parse_tools=True))[0][0]
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [("now", "{}")]


def test_a_call_that_must_come_has_no_markup_of_its_own() -> None:
    choice = fold(run('{"name": "f", "arguments": {"a": 1}}', only_call=True))[0][0]
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [("f", '{"a": 1}')]
    assert (choice.text, choice.finish_reason) == ("", "tool_calls")


@pytest.mark.parametrize("unit", [" ", "0", "a", "\\n", "一", "90", "\\n ", "\\u3000"])
def test_an_answer_of_a_form_that_repeats_itself_without_end_is_an_error(unit: str) -> None:
    with pytest.raises(BackendResponseError, match="128 times in a row inside an answer that must have a form"):
        run('{"a": "b' + unit * 200, longest_run=128, free=False)
    assert fold(run("-" * 200, free=False))[0][0].text == "-" * 200
    assert fold(run(f"<think>{unit * 200}</think>ok", longest_run=128))[0][0].text == "ok"


def test_logprobs_end_where_a_stop_string_of_several_tokens_begins() -> None:
    listed = [
        one for chunk in run("ab\U0001f600cd", stop=("\U0001f600",), want_logprobs=True) for one in chunk.logprobs
    ]
    assert b"".join(one.bytes for one in listed) == b"ab"


@settings(max_examples=100, deadline=None)
@given(st.text("<>/abctol_k", max_size=40), st.integers(1, 5))
def test_splitting_does_not_depend_on_the_size_of_the_pieces(text: str, size: int) -> None:
    def split(pieces: list[str]) -> tuple[str, str, list[str]]:
        splitter = Splitter(False, True, True)
        content, reasoning, calls = "", "", []
        for place, piece in enumerate(pieces):
            got = splitter.push(piece, last=place == len(pieces) - 1)
            content, reasoning, calls = content + got[0], reasoning + got[1], calls + got[2]
        return content, reasoning, calls

    pieces = [text[place : place + size] for place in range(0, len(text), size)]
    assert split([*pieces, ""]) == split([text, ""])


def test_special_tokens_are_silent_but_named_in_logprobs() -> None:
    assert VOCABULARY.bytes(300) == b""
    assert VOCABULARY.logprob(300, -1.0).token == "<|im_end|>"
    assert VOCABULARY.bytes(257) == b"</think>"
