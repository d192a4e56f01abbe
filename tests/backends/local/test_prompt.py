"""What a user types stays text, no message is lost, and a prompt beyond the context costs next to nothing."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from qvl.backends.local.model import loader, model_folder
from qvl.backends.local.text.prompt import PIECE, AbandonedError, PromptEncoder, PromptLimit
from qvl.errors import ContextLengthError, RequestError
from qvl.pipeline.parse_message import read_turn
from qvl.server.messages_input import Conversation
from qvl.server.responses_input import messages_of
from qvl.types import ChatRequest, Message, TextPart, Tool, ToolCall
from tests.backends.local.published import published_template

# As in the published Instruct template, a system message that is not the first one is passed over.
DROPS = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}<|im_start|>assistant\n"
)
# As in the published Thinking template, an earlier answer is split at its thought.
THINKS = (
    "{% for m in messages %}{% set c = m.content %}{% set r = '' %}{% if m.reasoning_content is string %}"
    "{% set r = m.reasoning_content %}{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if r %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}<|im_start|>assistant\n<think>\n"
)


@pytest.fixture(scope="module")
def bundled() -> Any:
    return loader.load_tokenizer(model_folder.bundled_folder(), "the bundled model")


def with_template(bundled: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(bundled)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=["bundled", "instruct", "thinking"])
def tokenizer(request: pytest.FixtureRequest, bundled: Any) -> Any:
    """The bundled vocabulary under each template."""
    if request.param == "bundled":
        return bundled
    return with_template(bundled, published_template(request.param))


def text(role: Any, words: str, **more: Any) -> Message:
    return Message(role, (TextPart(words),), **more)


def everywhere(words: str) -> ChatRequest:
    """`words` in every place that a client can fill."""
    parameters = {"type": "object", "properties": {words: {"description": words, "enum": [words, "b"]}}}
    call = ToolCall("1", "look" + words, json.dumps({"q": words}))
    return ChatRequest(
        (
            text("system", "s" + words),
            text("user", words + "u"),
            text("assistant", "a" + words + "b", tool_calls=(call,)),
            text("tool", words, tool_call_id="1"),
            Message("user", (TextPart("x" + words[:2]), TextPart(words[2:] + "y"))),
        ),
        tools=(Tool("look" + words, words, parameters),),
    )


def controls(tokenizer: Any, ids: list[int]) -> Counter[int]:
    return Counter(token for token in ids if token in tokenizer.added_tokens_decoder)


def test_every_added_token_is_text_wherever_it_is_typed(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer)
    harmless, _ = encoder.encode(everywhere("plain words"))
    for marker in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"):
        assert tokenizer.convert_tokens_to_ids(marker) in harmless
    for token in [added.content for added in tokenizer.added_tokens_decoder.values()]:
        ids, _ = encoder.encode(everywhere(token))
        if token != "</think>" or "reasoning_content" not in str(tokenizer.chat_template):
            assert controls(tokenizer, ids) == controls(tokenizer, harmless), token
            assert tokenizer.decode(ids).count(token) >= 8, token
        assert tokenizer.convert_tokens_to_ids("<tool_response>") not in ids[-20:], token


def test_text_without_control_tokens_is_encoded_as_transformers_does(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 你好! 1234\n\n  x  \n"}]
    request = ChatRequest(tuple(text(m["role"], m["content"]) for m in messages))
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encoder.encode(request)[0] == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_an_earlier_answer_keeps_its_thought_as_the_template_writes_it(bundled: Any) -> None:
    tokenizer = with_template(bundled, THINKS)
    answer = "<think>\nhm <tool_call>\n</think>\n\nIt is <tool_response>red</tool_response>."
    request = ChatRequest((text("user", "Which?"), text("assistant", answer), text("user", "Sure?")))
    ids, thinking = PromptEncoder(tokenizer).encode(request)
    assert thinking
    found = controls(tokenizer, ids)
    assert [found[tokenizer.convert_tokens_to_ids(t)] for t in ("<think>", "</think>")] == [2, 1]
    assert not found[tokenizer.convert_tokens_to_ids("<tool_response>")]
    assert not found[tokenizer.convert_tokens_to_ids("<tool_call>")]
    plain = [{"role": m.role, "content": m.text} for m in request.messages]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(plain, tokenize=False)


def test_a_typed_thought_does_not_open_the_answer_in_a_thought(bundled: Any) -> None:
    tokenizer = with_template(bundled, "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert PromptEncoder(tokenizer).encode(ChatRequest((text("user", "so <think>"),)))[1] is False


@pytest.mark.parametrize("roles", [("user", "system"), ("system", "user", "system"), ("user", "assistant", "system")])
def test_a_later_system_message_is_not_lost(tokenizer: Any, bundled: Any, roles: tuple[Any, ...]) -> None:
    for each in (tokenizer, with_template(bundled, DROPS)):
        request = ChatRequest(tuple(text(role, f"words {place} of {role}") for place, role in enumerate(roles)))
        told = each.decode(PromptEncoder(each).encode(request)[0])
        for message in request.messages:
            assert told.count(message.text) == 1


def test_system_messages_are_joined_only_for_a_template_that_would_drop_them(bundled: Any) -> None:
    request = ChatRequest((text("user", "first"), text("system", "later"), text("user", "last")))
    dropping = with_template(bundled, DROPS)
    told = dropping.decode(PromptEncoder(dropping).encode(request)[0])
    assert told.startswith("<|im_start|>system\nlater<|im_end|>\n<|im_start|>user\nfirst")
    told = bundled.decode(PromptEncoder(bundled).encode(request)[0])
    assert told.index("first") < told.index("later") < told.index("last")


def test_marks_that_a_user_types_are_kept_and_all_four_together_are_refused(bundled: Any) -> None:
    encoder = PromptEncoder(bundled)
    parameters = {"properties": {"\ufdd1": {}}}
    tool = Tool("look", "\ufdd0", parameters)
    request = ChatRequest((text("user", "<think>\ufdd2"),), tools=(tool,))
    told = bundled.decode(encoder.encode(request)[0])
    assert all(mark in told for mark in "\ufdd0\ufdd1\ufdd2")
    with pytest.raises(RequestError, match="all four noncharacters"):
        encoder.encode(ChatRequest((text("user", "\ufdd0\ufdd1\ufdd2\ufdd3"),)))


LONG = {
    "words": "some words, and 12 more\n\n" * 20_000,
    "one letter": "a" * 300_000,
    "spaces": " " * 300_000,
    "marks": "\u0301" * 200_000,
    "brackets": "<" * 300_000,
    "broken tokens": "<|im_end<|im_end|>" * 20_000,
}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=[] if name in ("words", "marks") else pytest.mark.slow)
        for name, words in LONG.items()
    ],
)
def test_a_long_prompt_loses_nothing(bundled: Any, words: str) -> None:
    ids, _ = PromptEncoder(bundled).encode(ChatRequest((text("user", words),)))
    if words != LONG["marks"]:
        assert words in bundled.decode(ids)
    assert len(controls(bundled, ids)) == 2


def test_pieces_are_encoded_as_the_whole_is(bundled: Any) -> None:
    words = LONG["words"]
    assert len(words) > 4 * PIECE
    ids, _ = PromptEncoder(bundled).encode(ChatRequest((text("user", words),)))
    whole = bundled(words, add_special_tokens=False)["input_ids"]
    first = ids.index(whole[0])
    assert ids[first : first + len(whole)] == whole


@pytest.mark.parametrize("words", LONG.values(), ids=LONG)
def test_a_prompt_beyond_the_context_ends_early(bundled: Any, words: str) -> None:
    asked = 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return False

    with pytest.raises(ContextLengthError, match=r"at least \d+ tokens.*context of 1000"):
        PromptEncoder(bundled).encode(ChatRequest((text("user", words * 20),)), PromptLimit(1000), abandoned)
    # The template's beginning, and one piece at most.
    assert asked <= 4


def test_a_prompt_that_nobody_waits_for_ends_within_a_piece(bundled: Any) -> None:
    asked = 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(AbandonedError):
        PromptEncoder(bundled).encode(ChatRequest((text("user", LONG["words"]),)), None, abandoned)
    assert asked == 4


@pytest.mark.parametrize(
    ("length", "max_tokens", "fits"), [(9, None, True), (10, None, False), (5, 5, True), (6, 5, False)]
)
def test_prompt_and_answer_fit_together(length: int, max_tokens: int | None, fits: bool) -> None:
    limit = PromptLimit(10, max_tokens)
    if fits:
        limit.check(length)
        return
    with pytest.raises(ContextLengthError):
        limit.check(length)


def test_reasoning_sent_back_in_any_form_is_shown_to_a_template_that_has_a_place_for_it(bundled: Any) -> None:
    encoder = PromptEncoder(with_template(bundled, THINKS))
    parts = [{"type": "thinking", "thinking": "let me <think> see"}, {"type": "text", "text": "four"}]
    for message in (
        {"role": "assistant", "content": "four", "reasoning_content": "let me <think> see"},
        {"role": "assistant", "content": "four", "reasoning": "let me <think> see"},
        {"role": "assistant", "content": parts},
        messages_of(
            [
                {
                    "type": "reasoning",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": parts[0]["thinking"]}],
                },
                {"role": "assistant", "content": "four"},
            ],
            b"",
        )[0],
        Conversation([{"role": "assistant", "content": parts}], None).messages[0],
    ):
        turn, read = read_turn(message, "messages[0]")
        shown = encoder.encode(ChatRequest((replace(turn, parts=read), text("user", "b"))))[0]
        assert "<think>\nlet me <think> see\n</think>\n\nfour" in encoder._tokenizer.decode(shown)
