"""`qvl mcp`: qvl's tools for agent hosts, over stdio or streamable HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qvl.cli import options as o

if TYPE_CHECKING:
    from qvl.agent.catalog import Catalog


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("mcp")(mcp)


def mcp(
    transport: Annotated[Literal["stdio", "http"], typer.Option("--transport", "-t", help="stdio or http.")] = "stdio",
    host: Annotated[str, typer.Option("--host", help="For http: the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="For http; 0 takes a free one.")] = 8765,
    catalog: Annotated[
        Path | None, typer.Option("--catalog", "-c", help="JSON, JSONL or CSV; default: QVL_CATALOG, else a sample.")
    ] = None,
    index: Annotated[Path | None, typer.Option("--index", help="Keep the index in this SQLite file.")] = None,
    model: o.Model = None,
    device: o.Device = None,
    base_url: o.BaseUrl = None,
    option: o.BackendOption = None,
    cache: o.CacheUrl = None,
    max_pixels: o.MaxPixels = None,
    allow_private: o.AllowPrivate = None,
    verbose: o.Verbose = False,
) -> None:
    """Serve analyze, ask and search over the Model Context Protocol.

    Over stdio the tools may open files, as the host runs as the same user. Over http they open URLs alone, at /mcp.
    """
    from qvl.cli.agent import open_catalog

    o.start_logs(verbose)
    settings = o.PipelineOptions(
        model=model,
        cache=cache,
        device=device,
        base_url=base_url or (),
        options=option or (),
        max_pixels=max_pixels,
        allow_private=allow_private or (),
    )
    with open_catalog(catalog, index) as shop:
        asyncio.run(_serve(settings, shop, transport, host, port))


async def _serve(settings: o.PipelineOptions, shop: Catalog, transport: str, host: str, port: int) -> None:
    from qvl.agent.mcp_server import build

    pipeline = settings.build()
    try:
        server: Any = build(pipeline, shop, files=transport == "stdio")
        if transport == "stdio":
            await server.run_stdio_async()
            return
        await _listen(server, host, port)
    finally:
        await pipeline.aclose()


async def _listen(server: Any, host: str, port: int) -> None:
    """Serves until it is told to stop, and says on stderr where."""
    import socket

    import uvicorn

    from qvl.cli import failure
    from qvl.errors import ConfigError

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as exc:
        raise ConfigError(f"cannot listen on {host}:{port}: {exc.strerror or exc}", hint="name another --port") from exc
    shown = f"[{host}]" if ":" in host else host
    failure.stderr().print(f"qvl mcp on http://{shown}:{listening.getsockname()[1]}/mcp")
    settings = uvicorn.Config(server.streamable_http_app(host=host), log_level="warning")
    await uvicorn.Server(settings).serve(sockets=[listening])
