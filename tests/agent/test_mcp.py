from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root)), "XDG_CACHE_HOME": str(tmp_path)}


async def drive(server: Any, picture: str, *, files: bool) -> None:
    """What an agent host does, over any transport."""
    async with Client(server) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"analyze", "ask", "search"}
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
