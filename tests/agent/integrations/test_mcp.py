from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import Client, StdioServerParameters

from tests.cli.conftest import install

SERVE = ["-m", "qvl.cli", "mcp", "--model", "clerk:one", "--cache", "off"]
PLUGIN = """
import qvl
from tests.agent.conftest import ShopModel

@qvl.hookimpl
def register_backends(register):
    register("clerk", lambda model: ShopModel("It is a mug."))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which the scripted model is installed as a plugin."""
    (tmp_path / "qvl_clerk.py").write_text(PLUGIN)
    install(tmp_path, "clerk", "qvl_clerk")
    root = str(Path(__file__).parents[3])
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root)), "XDG_CACHE_HOME": str(tmp_path)}


async def drive(server: Any, picture: str, *, files: bool) -> None:
    """What an agent host does, over any transport."""
    async with Client(server) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"analyze", "ask", "locate", "search"}
        assert tools["analyze"].description
        data = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
        seen = read(await client.call_tool("analyze", {"picture": picture if files else data}))
        assert (seen["brand"], seen["category"], seen["attributes"]["color"]) == ("NORVIK", "mug", "red")
        wish = {"brand": seen["brand"], "category": seen["category"], "attributes": {"color": "red"}, "max_price": 50}
        found = read(await client.call_tool("search", wish))
        assert found["products"][0]["product"]["id"] == "MU-0001"
        assert found["products"][0]["why"]
        said = read(await client.call_tool("ask", {"question": "What is it?", "pictures": [data]}))
        assert said["text"] == "It is a mug."
        content = {"type": "image", "data": data.partition(",")[2], "mimeType": "image/png"}
        assert read(await client.call_tool("analyze", {"picture": content}))["attributes"] == seen["attributes"]
        assert read(await client.call_tool("ask", {"question": "What is it?", "pictures": [content, data]}))["text"]
        wrong = await client.call_tool("analyze", {"picture": {"type": "audio", "data": "AAAA"}})
        assert "picture.type: unknown value 'audio'" in wrong.content[0].text
        if not files:
            refused = await client.call_tool("analyze", {"picture": {"type": "image", "image": picture}})
            assert "opens no files" in refused.content[0].text
        broken = await client.call_tool("analyze", {"picture": "none.png" if files else picture})
        assert broken.is_error
        assert "Traceback" not in broken.content[0].text
        assert (await client.call_tool("search", {"max_price": -1})).is_error
        assert (await client.call_tool("search", {"limit": "many"})).is_error


def read(result: Any) -> Any:
    assert not result.is_error, result
    return json.loads(result.content[0].text)


def test_a_client_of_the_sdk_drives_it_over_stdio(environment: dict[str, str], picture: str) -> None:
    server = StdioServerParameters(command=sys.executable, args=SERVE, env=environment)
    asyncio.run(asyncio.wait_for(drive(server, picture, files=True), 120))


def test_a_client_of_the_sdk_drives_it_over_http_where_files_stay_closed(
    environment: dict[str, str], picture: str
) -> None:
    command = [sys.executable, *SERVE, "--transport", "http", "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            url = next(line.split()[-1] for line in child.stderr if "http://" in line)
            asyncio.run(asyncio.wait_for(drive(url, picture, files=False), 120))
        finally:
            child.terminate()
            child.communicate(timeout=30)


HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}
TAKES = {"Accept": "application/json, text/event-stream"}


def over_http(
    environment: dict[str, str], *arguments: str, ask: Callable[[str], Any], serve: Sequence[str] = SERVE
) -> Any:
    """What `ask` finds at the URL of a server that is started for it."""
    command = [sys.executable, *serve, "--transport", "http", "--port", "0", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            return ask(next(line.split()[-1] for line in child.stderr if "http://" in line))
        finally:
            child.terminate()
            child.communicate(timeout=30)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_other_machines_are_not_served_without_a_key(environment: dict[str, str], host: str) -> None:
    command = [sys.executable, *SERVE, "--transport", "http", "--port", "0", "--host", host]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "without an API key: anybody could send requests (--api-key KEY" in done.stderr
    assert done.stderr.count("\n") == 1


# What qvl[server] brings and qvl[agent] does not.
WITHOUT_SERVER = (
    "import sys\n"
    "for name in ('fastapi', 'httptools', 'orjson', 'prometheus_client', 'uvloop'): sys.modules[name] = None\n"
    "from qvl.cli import main; main()"
)


@pytest.mark.parametrize(
    "serve",
    [SERVE, pytest.param(["-c", WITHOUT_SERVER, "mcp"], marks=pytest.mark.slow)],
    ids=["", "with qvl[agent] alone"],
)
def test_a_key_is_asked_of_everybody_where_there_is_one(environment: dict[str, str], serve: list[str]) -> None:
    def ask(url: str) -> list[int]:
        url = url.replace("0.0.0.0", "127.0.0.1")
        sent: list[list[tuple[str, str]]] = [
            [],
            [("Authorization", "Bearer wrong")],
            [("Authorization", "Bearer right"), ("Authorization", "Bearer wrong")],
            [("Authorization", "Bearer right")],
        ]
        with httpx.Client(trust_env=False, timeout=60) as client:
            return [client.post(url, json=HELLO, headers=[*TAKES.items(), *own]).status_code for own in sent]

    keyed = {**environment, "QVL_API_KEY": "right"}
    assert over_http(keyed, "--host", "0.0.0.0", ask=ask, serve=serve) == [401, 401, 401, 200]


def test_pages_of_other_sites_do_not_reach_a_server_without_keys(environment: dict[str, str]) -> None:
    def ask(url: str) -> list[int]:
        strange = [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {}]
        with httpx.Client(trust_env=False, timeout=60) as client:
            return [client.post(url, json=HELLO, headers={**TAKES, **own}).status_code for own in strange]

    assert over_http(environment, ask=ask) == [421, 403, 200]
