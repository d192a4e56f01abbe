"""Whatever happens to the Redis behind a pipeline: requests go on, failures are counted, and it is used again after."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from qvl import AsyncPipeline
from qvl.testing import EchoBackend

from .redis_server import RedisServer

Serve = Callable[..., RedisServer]
Fault = Callable[[RedisServer], None]


def occupy(server: RedisServer) -> None:
    """Makes every key that is there a list."""
    listed = server.command(b"KEYS qvl:entry:*").split()
    for key in [word for word in listed if word.startswith(b"qvl:")]:
        server.command(b"DEL " + key)
        server.command(b"RPUSH " + key + b" x")


def restart(server: RedisServer) -> None:
    server.kill()
    server.start()


def tells(command: bytes) -> Fault:
    def tell(server: RedisServer) -> None:
        assert server.command(command).startswith(b"+OK")

    return tell


def nothing(server: RedisServer) -> None:
    """It is over already."""


FAULTS: dict[str, tuple[Fault, Fault]] = {
    "killed": (RedisServer.kill, RedisServer.start),
    "paused": (RedisServer.pause, RedisServer.resume),
    "restarted empty": (restart, nothing),
    "full": (tells(b"CONFIG SET maxmemory 1"), tells(b"CONFIG SET maxmemory 0")),
    "another type": (occupy, nothing),
    "wrong password": (tells(b"CONFIG SET requirepass secret"), restart),
    "read only": (tells(b"REPLICAOF 127.0.0.1 1"), restart),
}


@pytest.mark.parametrize("name", FAULTS)
def test_requests_go_on(redis_server: Serve, name: str) -> None:
    server = redis_server()
    begin, end = FAULTS[name]

    async def main() -> None:
        async with AsyncExitStack() as stack:
            url = f"{server.url}?front=0&socket_timeout=1&rest=0.3"
            pipes = [await stack.enter_async_context(AsyncPipeline(backend=EchoBackend(), cache=url)) for _ in range(2)]

            async def ask(number: int) -> str:
                found = await pipes[number % 2].ask([], f"question {number}")
                assert f"question {number}" in found.text
                return found.cache

            async def until(ready: Callable[[], Awaitable[bool]]) -> None:
                while not await ready():
                    await asyncio.sleep(0.05)

            first = [await ask(number) for number in range(10)]
            assert first == ["miss"] * 10
            assert [await ask(number) for number in range(10)] == ["hit"] * 10
            # Requests are under way while it happens.
            running = [asyncio.create_task(ask(number)) for number in range(40)]
            await asyncio.sleep(0)
            await asyncio.to_thread(begin, server)
            await asyncio.gather(*running)
            assert await ask(0) in ("hit", "miss")
            assert set(await asyncio.gather(*(ask(number) for number in range(100, 120)))) == {"miss"}
            failures = sum(pipe.stats()["cache_failures"] for pipe in pipes)
            assert failures > 0 or name in ("restarted empty", "another type")
            await asyncio.to_thread(end, server)

            async def used_again() -> bool:
                await ask(500)
                return await ask(500) == "hit" and await ask(501) is not None and await ask(501) == "hit"

            await asyncio.wait_for(until(used_again), 120)

    asyncio.run(main())
