"""One id from the agent's run down to the log line of the server that answered, in real processes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from qvl import Pipeline
from qvl.agent import Catalog, build_agent
from tests.agent.conftest import SAMPLE
from tests.cli.conftest import install

SEARCH = [("search_products", {"brand": "NORVIK", "category": "mug"})]
PLUGIN = f"""
import dataclasses
import qvl
from qvl.types import SamplingParams
from tests.agent.conftest import ShopModel

class Clerk(ShopModel):
    @property
    def capabilities(self):
        return dataclasses.replace(super().capabilities, sampling=SamplingParams.names())

@qvl.hookimpl
def register_backends(register):
    register("clerk", lambda model: Clerk("[1] fits.", model=model))
    register("agent", lambda model: Clerk({SEARCH!r}, "Take [1].", model=model))
"""


class Server:
    """`qvl serve` with JSON logs, and the lines that it wrote."""

    def __init__(self, model: str, env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "qvl.cli", "serve", model, "--port", "0", "--cache", "off", "--no-canary"]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.ready = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("  address"):
                self.url = line.split()[1] + "/v1"
                self.ready.set()

    def asked(self, number: int) -> list[dict[str, Any]]:
        """The log lines of the chat requests, of which there are `number`; a line follows its answer."""
        end = time.monotonic() + 60
        while True:
            found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
            found = [line for line in found if line.get("path") == "/v1/chat/completions"]
            if len(found) >= number or time.monotonic() > end:
                assert len(found) == number, self.lines
                return found
            time.sleep(0.01)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(120)
        self._reader.join(30)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "qvl_clerk.py").write_text(PLUGIN)
    install(tmp_path, "clerk", "qvl_clerk")
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root)), "XDG_CACHE_HOME": str(tmp_path)}


@pytest.fixture
def server(request: pytest.FixtureRequest, environment: dict[str, str]) -> Iterator[Server]:
    found = Server(request.param, environment)
    try:
        assert found.ready.wait(120), found.lines
        yield found
    finally:
        found.close()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["clerk:one"], indirect=True)
def test_one_id_from_the_command_to_the_log_lines_of_both_sides(
    server: Server, environment: dict[str, str], picture: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "qvl.cli", "agent", "-f", picture, "--json", "-v", "--cache", "off"]
    command += [
        "--model",
        "openai:one",
        "--base-url",
        server.url,
        "-O",
        "probe=false",
        "--index",
        str(tmp_path / "index.db"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    recommendation = json.loads(done.stdout.splitlines()[-1])["recommendation"]
    assert recommendation["written_by"] == "model"
    one = recommendation["request_id"]
    assert one
    ours = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {line["step"] for line in ours if line.get("request_id") == one and "step" in line} == {
        "analyze",
        "search",
        "answer",
    }
    # The look and the answer are two requests of one run.
    assert [line["request_id"] for line in server.asked(2)] == [one, one]


@pytest.mark.parametrize("server", ["agent:one"], indirect=True)
def test_a_free_agents_requests_share_the_id_of_their_run(server: Server, picture: str, tmp_path: Path) -> None:
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    content: list[Any] = [{"type": "image", "base64": data, "mime_type": "image/png"}, {"type": "text", "text": "?"}]
    with (
        Pipeline("openai:one", base_url=server.url, probe=False, cache="off") as pipeline,
        Catalog(SAMPLE, index=tmp_path / "index.db") as catalog,
    ):
        agent = build_agent(pipeline, catalog)
        state = agent.invoke({"messages": [HumanMessage(content)]})
        assert state["messages"][-1].text.startswith("Take Norvik Cima 500")
        assert len({message.id for message in state["messages"]}) == len(state["messages"])
        assert [line["request_id"] for line in server.asked(3)] == [state["request_id"]] * 3
        again = agent.invoke({"messages": [HumanMessage("and else?")]})
        assert again["request_id"] != state["request_id"]
        # It names what no search found, and is asked once more, within the same run.
        assert [line["request_id"] for line in server.asked(5)[3:]] == [again["request_id"]] * 2
