"""`qvl mcp`: qvl's tools for agent hosts, over stdio or streamable HTTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qvl.cli import options
from qvl.cli.expand import Without, expand

if TYPE_CHECKING:
    from mcp.server import MCPServer

    from qvl.agent.catalog.catalog import Catalog
    from qvl.server.auth import KeyRing


@expand
def mcp(
    *,
    transport: Annotated[Literal["stdio", "http"], typer.Option("--transport", "-t", help="stdio or http.")] = "stdio",
    host: Annotated[str, typer.Option("--host", help="For http: the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="For http; 0 takes a free one.")] = 8765,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="QVL_API_KEY", help="For http: a key that clients send; may be repeated.")
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(envvar="QVL_API_KEY_FILE", help="For http: keys, one a line.")
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option(envvar="QVL_ALLOW_UNAUTHENTICATED", help="For http: serve other machines without a key.")
    ] = False,
    catalog: options.CatalogFile = None,
    index: options.IndexFile = None,
    settings: Annotated[options.PipelineOptions, Without("cache_mode", "max_tokens", "param")],
    verbose: options.Verbose = False,
) -> None:
    """Serve analyze, ask, locate and search over the Model Context Protocol.

    Over stdio the tools may open files, as the host runs as the same user. Over http, at /mcp, they open only URLs;
    clients on other machines (--host) need a key.
    """
    from qvl.cli.agent import open_catalog

    options.start_logs(verbose)
    keys: KeyRing | None = None
    if transport == "http":
        from qvl.server.auth import KeyRing, check_open

        keys = KeyRing(api_key or (), api_key_file)
        check_open(host, keys, allowed=allow_unauthenticated)
    with open_catalog(catalog, index) as shop:
        asyncio.run(_serve(settings, shop, host, port, keys))


async def _serve(settings: options.PipelineOptions, shop: Catalog, host: str, port: int, keys: KeyRing | None) -> None:
    """Serve over http to clients with one of `keys`, or over stdio if it is None."""
    from qvl.agent.integrations.mcp import build

    pipeline = settings.build()
    try:
        server = build(pipeline, shop, files=keys is None)
        if keys is None:
            await server.run_stdio_async()
            return
        await _listen(server, host, port, keys)
    finally:
        await pipeline.aclose()


async def _listen(server: MCPServer[object], host: str, port: int, keys: KeyRing) -> None:
    """Print the address on stderr and serve until the process is stopped."""
    import uvicorn

    from qvl.cli import failure
    from qvl.cli.banner import shown_host
    from qvl.server.auth import KeyedApp
    from qvl.server.run_uvicorn import bind

    listener = bind(host, port)
    failure.stderr().print(f"qvl mcp on http://{shown_host(host)}:{listener.getsockname()[1]}/mcp")
    app = server.streamable_http_app(host=host)
    settings = uvicorn.Config(KeyedApp(app, keys), log_level="warning")
    await uvicorn.Server(settings).serve(sockets=[listener])
