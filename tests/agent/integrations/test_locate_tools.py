"""The tool `locate` for hosts of MCP and for LangChain agents: structured content, and the overlay as a picture."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import jsonschema
from langchain_core.messages import ToolCall, ToolMessage
from mcp import Client
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.agent import locate_tool
from qvl.agent.integrations.mcp import build
from qvl.testing.asking import square
from tests.pipeline.conftest import TalkingBackend

ANSWER = '[{"bbox_2d": [250, 125, 500, 375], "label": "the cap"}, {"bbox_2d": [1200, 0, 1300, 9], "label": "the cap"}]'
NOTE = "left out [1200, 0, 1300, 9] for 'the cap': it is outside of the picture"


def talking() -> TalkingBackend:
    return TalkingBackend("Qwen3-VL", reply=lambda request: ANSWER if "the cap" in request.messages[-1].text else "no")


def url() -> str:
    return square().data_url()


def is_drawing(data: str) -> bool:
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return image.format == "PNG" and min(image.size) >= 320


def test_mcp_has_an_output_schema_which_the_answer_fits_and_a_picture() -> None:
    async def drive() -> None:
        pipe = AsyncPipeline(backend=talking(), cache="memory:")
        async with pipe, Client(build(pipe, None, files=False)) as client:
            (tool,) = [tool for tool in (await client.list_tools()).tools if tool.name == "locate"]
            assert tool.output_schema is not None
            result = await client.call_tool("locate", {"picture": url(), "targets": ["the cap"]})
            assert not result.is_error
            told: Any = result.structured_content
            jsonschema.validate(told, tool.output_schema)
            assert told["located"][0]["box"]["x1"] == 16
            assert (told["width"], told["height"], told["notes"]) == (64, 64, [NOTE])
            text, picture = result.content
            assert '"the cap"' in text.text
            assert picture.mime_type == "image/png"
            assert is_drawing(picture.data)
            again = await client.call_tool("locate", {"picture": url(), "targets": ["the cap"]})
            assert again.structured_content["cache"] == "hit"
            for arguments, message in (
                ({"picture": "/etc/passwd", "targets": ["the cap"]}, "opens no files"),
                ({"picture": url(), "targets": []}, "no target is named"),
                ({"picture": url(), "targets": ["dog"]}, "no list of boxes"),
                ({"picture": url(), "targets": ["a", "a"]}, "named twice"),
            ):
                wrong = await client.call_tool("locate", arguments)
                assert wrong.is_error
                assert message in wrong.content[0].text
                assert "\n" not in wrong.content[0].text

    asyncio.run(drive())


def call(**arguments: Any) -> ToolCall:
    return ToolCall(name="locate", args=arguments, id="call_1", type="tool_call")


def test_langchain_has_blocks_for_the_model_and_an_artifact_for_the_program(tmp_path: Path) -> None:
    with Pipeline(backend=talking(), cache="off") as pipe:
        tool = locate_tool(pipe)
        message = tool.invoke(call(picture=url(), targets=["the cap"]))
        assert isinstance(message, ToolMessage)
        assert message.artifact["located"][0]["box"]["relative"] == [0.25, 0.125, 0.5, 0.375]
        assert message.artifact["notes"] == [NOTE]
        text, picture = message.content
        assert isinstance(text, dict)
        assert isinstance(picture, dict)
        assert text["type"] == "text"
        assert picture["mime_type"] == "image/png"
        assert is_drawing(picture["base64"])
        assert asyncio.run(tool.ainvoke(call(picture=url(), targets=["the cap"]))).artifact == message.artifact
        wrong = tool.invoke(call(picture=url(), targets=["dog"]))
        assert wrong.status == "error"
        assert "no list of boxes" in wrong.content
        path = tmp_path / "cap.png"
        path.write_bytes(square().data)
        assert "opens no files" in tool.invoke(call(picture=str(path), targets=["the cap"])).content
        files = locate_tool(pipe, files=True)
        assert files.invoke(call(picture=str(path), targets=["the cap"])).artifact == message.artifact


def test_langchain_takes_an_async_pipeline() -> None:
    async def drive() -> ToolMessage:
        async with AsyncPipeline(backend=talking(), cache="off") as pipe:
            tool = locate_tool(pipe)
            assert set(tool.args) == {"picture", "targets", "points"}
            found: ToolMessage = await tool.ainvoke(call(picture=url(), targets=["the cap"]))
            return found

    assert asyncio.run(drive()).artifact["located"]
