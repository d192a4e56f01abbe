"""qvl's tools over the Model Context Protocol: picture analysis, questions and catalogue search for any agent host."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, ParamSpec

from pydantic import Field

from qvl.agent.catalog.product import Query
from qvl.agent.integrations.tool_pictures import ToolPicture, checked
from qvl.errors import MissingDependencyError, QvlError
from qvl.suggest import install_line

if TYPE_CHECKING:
    from mcp.server import MCPServer

    from qvl.agent.catalog.catalog import Catalog
    from qvl.pipeline.async_pipeline import AsyncPipeline

P = ParamSpec("P")
INSTRUCTIONS = (
    "Analyze a product picture first, then search the catalogue with what it shows. Name only products that search "
    "returned, with the ids and prices as they are there."
)


def build(pipeline: AsyncPipeline, catalog: Catalog | None, *, files: bool) -> MCPServer[object]:
    """Return a server with the tools analyze, ask, locate and, with a catalogue, search.

    Args:
        files: True if tools may open files of this machine; safe for stdio, where the host runs as the same user,
            but not for a network.

    Raises:
        MissingDependencyError: the package mcp is not installed.
    """
    try:
        from mcp.server import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError

        from qvl.agent.integrations.mcp_locate import locate_tool
    except ModuleNotFoundError as exc:
        raise MissingDependencyError(f"MCP needs the package {exc.name!r}", hint=install_line("agent")) from exc
    from qvl._version import __version__

    server: MCPServer[object] = MCPServer("qvl", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")

    def add(tool: Callable[P, Awaitable[object]]) -> None:
        """Register a tool that returns its result as JSON; a QvlError becomes a tool error of one line."""

        @functools.wraps(tool)
        async def answer(*args: P.args, **kwargs: P.kwargs) -> str:
            try:
                return json.dumps(await tool(*args, **kwargs), ensure_ascii=False)
            except QvlError as exc:
                raise ToolError(str(exc)) from exc

        server.add_tool(answer, structured_output=False)

    async def analyze(picture: ToolPicture, language: str = "en") -> object:
        """Brand, category and attributes of the product on a picture, as JSON; language is en, zh, pt or es."""
        outcome = await pipeline.analyze_result(checked(picture, files), language=language)
        return {
            **outcome.value.model_dump(mode="json", include={"brand", "category", "attributes"}),
            **outcome.sureness(),
            "cache": outcome.result.cache,
            "request_id": outcome.result.request_id,
        }

    async def ask(question: str, pictures: Annotated[list[ToolPicture], Field(max_length=8)]) -> object:
        """Answers a question about one or several pictures."""
        result = await pipeline.ask([checked(picture, files) for picture in pictures], question)
        return {"text": result.text, "cache": result.cache, "request_id": result.request_id}

    add(analyze)
    add(ask)
    server.add_tool(locate_tool(pipeline, files=files))
    if catalog is not None:
        add(_search_of(catalog))
    return server


def _search_of(catalog: Catalog) -> Callable[..., Awaitable[object]]:
    async def search(
        text: str = "",
        brand: str | None = None,
        category: str | None = None,
        attributes: Annotated[dict[str, str] | None, Field(description='Wishes, such as {"color": "blue"}.')] = None,
        only: Annotated[dict[str, str] | None, Field(description="Conditions every product must meet.")] = None,
        min_price: float | None = None,
        max_price: float | None = None,
        limit: Annotated[int, Field(ge=1, le=50)] = 5,
    ) -> object:
        """Products of the catalogue that fit best, with the reasons for each, as JSON."""
        query = Query(text, brand, category, attributes or {}, only or {}, min_price, max_price)
        matches = await asyncio.to_thread(catalog.search, query, limit=limit)
        return {"products": [hit.to_json() for hit in matches.hits], "notes": list(matches.notes)}

    return search
