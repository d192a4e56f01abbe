"""The chat templates that Qwen publishes, where they are there: prompts are what transformers renders."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")

from qvl.backends.local.model.loader import load_tokenizer
from qvl.backends.local.model.model_folder import bundled_folder
from qvl.backends.local.text.prompt import PromptEncoder
from qvl.errors import UnsupportedInputError
from qvl.pipeline.parse_request import draft_request
from qvl.types import ChatRequest, ImagePart, Message, TextPart
from tests.backends.local.published import published_template
from tests.backends.local.requests import picture

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": '{"query": "mug"}'}}
# A thought before a call, its answer, and a thought behind it; the field that clients send it back in.
THREAD: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is the mug in stock?"},
    {"role": "assistant", "content": "", "reasoning_content": "I must look it up.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"found": 3}'},
    {"role": "assistant", "content": "One more look.", "reasoning_content": "Which size?", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"found": 1}'},
]


def tokenizer(kind: str) -> Any:
    made = load_tokenizer(bundled_folder(), "bundled")
    made.chat_template = published_template(kind)
    return made


def prompt(kind: str, request: ChatRequest) -> str:
    made = tokenizer(kind)
    return str(made.decode(PromptEncoder(made).encode(request)[0]))


def rendered(kind: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return str(tokenizer(kind).apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more))


@pytest.mark.parametrize("kind", ["instruct", "thinking"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thread_of_thoughts_and_calls_is_what_the_template_makes_of_it(kind: str, field: str) -> None:
    sent = [{field if name == "reasoning_content" else name: value for name, value in m.items()} for m in THREAD]
    request = draft_request(sent, tools=[SEARCH]).finished([])
    arguments = json.loads(CALL["function"]["arguments"])  # type: ignore[index]
    found = prompt(kind, request)
    calls = [{**CALL, "function": {"name": "search", "arguments": arguments}}]
    told = [{**message, **({"tool_calls": calls} if "tool_calls" in message else {})} for message in THREAD]
    tools = [{"type": "function", "function": {"name": "search", "description": "", "parameters": SEARCH["function"]["parameters"]}}]  # type: ignore[index]  # fmt: skip  # noqa: E501
    assert found == rendered(kind, told, tools=tools)
    # The thoughts of an Instruct model are nobody's; a Thinking model keeps its thread over the calls.
    assert ("I must look it up." in found) == (kind == "thinking")
    assert ("Which size?" in found) == (kind == "thinking")


def test_thoughts_of_earlier_questions_are_dropped_by_the_thinking_template() -> None:
    later = [*THREAD, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And the cap?"}]
    found = prompt("thinking", draft_request(later, tools=[SEARCH]).finished([]))
    assert "I must look it up." not in found
    assert found.endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("kind", ["instruct", "thinking"])
def test_add_vision_id_numbers_the_pictures(kind: str) -> None:
    parts = (TextPart("Which? "), ImagePart(picture(0)), ImagePart(picture(1)))
    request = ChatRequest((Message("user", parts),), chat_template_kwargs={"add_vision_id": True})
    content = [{"type": "text", "text": "Which? "}, {"type": "image"}, {"type": "image"}]
    found = prompt(kind, request)
    assert found == rendered(kind, [{"role": "user", "content": content}], add_vision_id=True)
    assert "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|>" in found
    assert "Picture" not in prompt(kind, request.replace(chat_template_kwargs={}))


def test_enable_thinking_closes_the_thought_or_is_refused() -> None:
    request = draft_request([{"role": "user", "content": "Hello"}]).finished([])
    off = request.replace(chat_template_kwargs={"enable_thinking": False})
    opened = prompt("thinking", request)
    assert opened.endswith("<|im_start|>assistant\n<think>\n")
    assert prompt("thinking", off) == opened.rstrip() + "\n\n</think>\n\n"
    assert prompt("thinking", request.replace(chat_template_kwargs={"enable_thinking": True})) == opened
    # An Instruct model thinks in no case: to switch it off says nothing, and on is refused.
    assert prompt("instruct", off) == prompt("instruct", request)
    with pytest.raises(UnsupportedInputError, match="the model cannot think"):
        prompt("instruct", request.replace(chat_template_kwargs={"enable_thinking": True}))
