"""The MCP tool `locate`: structured content by an output schema, and the picture with the boxes drawn on it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, ImageContent, TextContent
from pydantic import BaseModel, Field

from qvl.agent.integrations.tool_pictures import ToolPicture, checked
from qvl.errors import QvlError
from qvl.evidence.shapes import Box, Point

if TYPE_CHECKING:
    from qvl.pipeline.async_pipeline import AsyncPipeline


class LocatedItem(BaseModel):
    """A target with its box or point, in pixels of the original picture, and its confidence from 0 to 1."""

    label: str
    box: Box | None = None
    point: Point | None = None
    confidence: float | None = None


class LocateAnswer(BaseModel):
    """Everything that was located, the picture's size in pixels, and notes on what was left out."""

    located: list[LocatedItem]
    width: int
    height: int
    notes: list[str]
    cache: str
    request_id: str


def locate_tool(pipeline: AsyncPipeline, *, files: bool) -> Callable[..., Awaitable[CallToolResult]]:
    """Return the tool; `files` as of `build`."""

    async def locate(
        picture: ToolPicture,
        targets: Annotated[list[str], Field(description='What to locate, such as ["the brand", "the handle"].')],
        points: Annotated[bool, Field(description="A point on each instead of a box around it.")] = False,
    ) -> Annotated[CallToolResult, LocateAnswer]:
        """Where each target is on a picture: boxes in pixels of the original, and the picture with them drawn on it."""
        try:
            found = await pipeline.locate(checked(picture, files), targets, points=points)
            drawn = await asyncio.to_thread(found.overlay)
        except QvlError as exc:
            raise ToolError(str(exc)) from exc
        told = {**found.to_json(), "cache": found.result.cache, "request_id": found.result.request_id}
        picture_of_it = base64.b64encode(drawn).decode("ascii")
        return CallToolResult(
            content=[
                TextContent(type="text", text=json.dumps(told, ensure_ascii=False)),
                ImageContent(type="image", data=picture_of_it, mime_type="image/png"),
            ],
            structured_content=told,
        )

    return locate
