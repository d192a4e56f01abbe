"""LangChain's content blocks, as they come from its models of other providers."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from PIL import Image

from qvl import Pipeline
from qvl.agent.integrations.langchain import QvlChatModel
from qvl.errors import UnsupportedInputError
from qvl.types import ChatRequest
from tests.agent.conftest import ShopModel

_OUT = io.BytesIO()
Image.new("RGB", (40, 40), "red").save(_OUT, "PNG")
DATA = base64.b64encode(_OUT.getvalue()).decode()
URL = f"data:image/png;base64,{DATA}"
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}


def asked(*messages: Any) -> ChatRequest:
    backend = ShopModel("fine")
    with Pipeline(backend=backend, cache="off") as pipeline:
        QvlChatModel(pipeline=pipeline).invoke(list(messages))
    return backend.requests[-1]


@pytest.mark.parametrize("kind", [HumanMessage, ToolMessage])
def test_a_tool_result_is_read_as_the_parts_it_holds(kind: Any) -> None:
    more = {"tool_call_id": "a"} if kind is ToolMessage else {}
    block = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "Here:"}, PICTURE]}
    request = asked(HumanMessage("look"), kind([block], **more))
    assert len(request.pictures) == 1
    assert request.messages[-1].text == "Here:"


@pytest.mark.parametrize(
    ("inner", "text"), [("four", "four"), (None, ""), ([], ""), ({"a": 1}, '{"a": 1}'), ([{"a": 1}], '[{"a": 1}]')]
)
def test_a_tool_result_of_other_content_is_text(inner: Any, text: str) -> None:
    request = asked(HumanMessage([{"type": "text", "text": "so "}, {"type": "tool_result", "content": inner}]))
    assert request.messages[-1].text.split("so ")[-1].strip() == text


@pytest.mark.parametrize("url", [URL.replace("data:image", "Data:image"), f" {URL}", f"\n{URL}\n", URL])
@pytest.mark.parametrize("block", ["image", "image_url"])
def test_a_url_is_known_however_it_is_written(url: str, block: str) -> None:
    part = {"type": "image", "url": url} if block == "image" else {"type": "image_url", "image_url": {"url": url}}
    assert len(asked(HumanMessage([part])).pictures) == 1


def test_an_address_in_capitals_is_no_file() -> None:
    with pytest.raises(Exception, match="example") as caught:
        asked(HumanMessage([{"type": "image", "url": "HTTPS://no-such-host.example.invalid/a.png"}]))
    assert "not a file" not in str(caught.value)


@pytest.mark.parametrize("name", ["file:///etc/hostname", "mug.png", "/mug.png", "http:mug.png", "~/a.png"])
def test_a_file_is_not_opened(name: str) -> None:
    for content in (
        [{"type": "image", "url": name}],
        [{"type": "tool_result", "content": [{"type": "image", "url": name}]}],
    ):
        with pytest.raises(UnsupportedInputError, match=r"content\[0\].*not a file"):
            asked(HumanMessage(content))


@pytest.mark.parametrize(
    "block",
    [
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "a"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_call", "name": "web_search", "args": {}, "id": "a"},
        {"type": "server_tool_result", "tool_call_id": "a", "status": "success", "output": {}},
        {"type": "non_standard", "value": {"a": 1}},
        {"type": "reasoning_content", "reasoning_content": {"text": "hm"}},
    ],
)
def test_what_only_its_provider_can_read_of_an_answer_is_left_out(block: dict[str, Any]) -> None:
    request = asked(HumanMessage("a"), AIMessage([block, {"type": "text", "text": "b"}]), HumanMessage("c"))
    assert [message.text for message in request.messages] == ["a", "b", "c"]
    with pytest.raises(UnsupportedInputError, match=block["type"]):
        asked(HumanMessage([block]))
