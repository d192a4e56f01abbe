"""`locate_tool`: a LangChain tool that locates things on a picture, for any agent."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Annotated

from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel, Field

from qvl.agent.integrations.tool_pictures import ToolPicture, checked
from qvl.errors import ConfigError, QvlError
from qvl.evidence.located import Locations
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.sync_pipeline import Pipeline
from qvl.types import JsonObject


class LocateInput(BaseModel):
    """The arguments of the tool `locate`."""

    picture: ToolPicture
    targets: Annotated[list[str], Field(description='What to locate, such as ["the brand", "the handle"].')]
    points: Annotated[bool, Field(description="A point on each instead of a box around it.")] = False


def locate_tool(pipeline: Pipeline | AsyncPipeline, *, files: bool = False) -> BaseTool:
    """Return a tool that tells where targets are on a picture, with the picture on which they are drawn.

    The message of its answer has text and the overlay as an image block; its `artifact` is `Locations.to_json()`. What
    cannot be done is told to the model in one line. With an AsyncPipeline only async methods work.

    Args:
        files: True lets the agent name files of this machine; otherwise only URLs, data: URLs and image blocks.
    """

    def locate(
        picture: str | JsonObject, targets: list[str], points: bool = False
    ) -> tuple[list[JsonObject], JsonObject]:
        if not isinstance(pipeline, Pipeline):
            raise ConfigError("an AsyncPipeline has only async methods", hint="call ainvoke(), or pass a Pipeline")
        try:
            return _told(pipeline.locate(checked(picture, files), targets, points=points))
        except QvlError as exc:
            raise ToolException(str(exc)) from exc

    async def alocate(
        picture: str | JsonObject, targets: list[str], points: bool = False
    ) -> tuple[list[JsonObject], JsonObject]:
        if isinstance(pipeline, Pipeline):
            return await asyncio.to_thread(locate, picture, targets, points)
        try:
            found = await pipeline.locate(checked(picture, files), targets, points=points)
            return await asyncio.to_thread(_told, found)
        except QvlError as exc:
            raise ToolException(str(exc)) from exc

    return StructuredTool.from_function(
        func=locate,
        coroutine=alocate,
        name="locate",
        description="Tells where each target is on a picture: boxes in pixels of the original, and the picture with "
        "them drawn on it.",
        args_schema=LocateInput,
        response_format="content_and_artifact",
        handle_tool_error=True,
    )


def _told(found: Locations) -> tuple[list[JsonObject], JsonObject]:
    told = found.to_json()
    drawn = base64.b64encode(found.overlay()).decode("ascii")
    text = {"type": "text", "text": json.dumps(told, ensure_ascii=False)}
    return [text, {"type": "image", "base64": drawn, "mime_type": "image/png"}], told
