"""Connections of our own: made, used again, waited on, given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from qvl.http.connection import Connection, LateError, NoConnectionError, Pool
from qvl.http.framing import Body, TransportError
from tests.scripted_endpoint import ScriptedEndpoint

pytestmark = pytest.mark.anyio


async def test_one_that_idled_for_long_is_not_used_again(endpoint: ScriptedEndpoint) -> None:
    pool = Pool(endpoint.url, keep=0.0)
    for _ in range(3):
        await listed(pool)
        await asyncio.sleep(0.01)
    pool.close()
    assert endpoint.connections == 3


async def test_hints_before_the_answer_are_passed_over() -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    answer = early + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    for cut in (len(answer), 10, 60):
        async with saying(answer, cut) as url:
            assert await once(url) == b"{}"


async def test_waits_end_at_their_moment() -> None:
    for said, wait in ((b"", "head"), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "body")):
        async with saying(said, len(said), stay=True) as url:
            with pytest.raises(LateError):
                assert await once(url, by=time.monotonic() + 0.1) == wait


async def test_a_wait_ends_at_its_moment_also_when_something_comes_all_the_time() -> None:
    """What is there at every turn of the loop comes before every timer."""
    connection, loop = Connection(), asyncio.get_running_loop()
    end = time.monotonic() + 5

    def come() -> None:
        connection.data_received(b"HTTP/1.1 100 Continue\r\n\r\n")
        if time.monotonic() < end:
            loop.call_soon(come)

    come()
    with pytest.raises(LateError):
        await connection.head(time.monotonic() + 0.1)
    assert time.monotonic() < end
    end = 0.0


async def test_a_wait_ends_at_its_own_moment_whatever_the_last_one_was() -> None:
    """One timer serves all waits of a connection: it may be set to a later moment, or to an earlier one."""
    connection, loop = Connection(), asyncio.get_running_loop()
    for seconds in (60.0, 0.05):
        loop.call_soon(connection.data_received, b"HTTP/1.1 204 No Content\r\n\r\n")
        await connection.head(time.monotonic() + seconds)
    began = time.monotonic()
    with pytest.raises(LateError):
        await connection.head(began + 0.2)
    assert 0.2 <= time.monotonic() - began < 5


async def test_a_network_that_gives_up_is_no_deadline() -> None:
    connection = Connection()
    connection.connection_lost(TimeoutError(110, "Connection timed out"))
    with pytest.raises(TransportError, match="timed out"):
        await connection.head()


async def test_a_name_that_cannot_be_one_is_nobody() -> None:
    with pytest.raises(NoConnectionError):
        await Pool("http://a..b/v1").take()


async def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch, endpoint: ScriptedEndpoint) -> None:
    """A name with two addresses, of which only the second answers."""
    loop = asyncio.get_running_loop()
    found = loop.getaddrinfo

    async def two(host: Any, port: Any, **options: Any) -> Any:
        if host == "two.invalid":
            return [*await found("127.0.0.2", port, **options), *await found("127.0.0.1", port, **options)]
        return await found(host, port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", two)
    assert b"echo" in await once(f"http://two.invalid:{endpoint.port}/v1")


async def test_closing_ends_what_is_being_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
    pool = Pool("http://slow.invalid/v1")
    taking = asyncio.ensure_future(pool.take())
    await asyncio.sleep(0)
    pool.close()
    with pytest.raises(NoConnectionError, match="closed"):
        await taking


async def test_an_end_without_an_answer_is_an_error() -> None:
    async with saying(b"HTTP/1.1 200 OK\r\nContent-Le", 5) as url:
        with pytest.raises(TransportError, match="without an answer"):
            await once(url)


async def once(url: str, by: float | None = None) -> bytes:
    """The body of GET /models, over a connection for it alone."""
    pool = Pool(url)
    try:
        return await listed(pool, by)
    finally:
        pool.close()


async def listed(pool: Pool, by: float | None = None) -> bytes:
    """The body of GET /models."""
    connection = await pool.take(by)
    try:
        connection.send(pool.request("GET", "/models", {}))
        _, status, headers = await connection.head(by)
        body, data = Body(status, headers), b""
        while (piece := await connection.next_piece(body, by)) is not None:
            data += piece[1]
        return data
    finally:
        pool.give_back(connection)


@asynccontextmanager
async def saying(data: bytes, cut: int, *, stay: bool = False) -> AsyncIterator[str]:
    """A server that says these bytes to whoever comes, in two pieces, and hangs up (or stays)."""

    stop, serving = asyncio.Event(), set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        for piece in (data[:cut], data[cut:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        if stay:
            await stop.wait()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        stop.set()
        server.close()
        await asyncio.gather(*serving, return_exceptions=True)
