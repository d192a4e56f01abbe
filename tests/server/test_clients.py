"""Other clients: LangChain's, and the curl lines of the README as they stand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.conftest import Running, data_url

README = Path(__file__).parents[2] / "README.md"


def test_langchain_asks_about_pictures_and_streams(server: Running) -> None:
    openai = pytest.importorskip("langchain_openai")
    chat = openai.ChatOpenAI(model="echo-vl", base_url=f"{server.url}/v1", api_key="none", temperature=0)
    content = [{"type": "image_url", "image_url": {"url": data_url("blue")}}, {"type": "text", "text": "colour"}]
    found = chat.invoke([{"role": "user", "content": content}])
    assert found.content == "blue 64x64, colour"
    assert found.usage_metadata["total_tokens"] > 0
    assert "".join(piece.content for piece in chat.stream("one two three")) == "one two three"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_curl_lines_of_the_readme_run(server: Running) -> None:
    if not README.exists():
        pytest.skip("there is no README here")
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console|shell)?\n(.*?)```", text, re.S)
    lines = [part for block in blocks for part in re.findall(r"^curl (?:.|\n(?!\n|curl |#|[a-z]+ ))*", block, re.M)]
    lines = [
        line.replace("http://localhost:8000", server.url)
        for line in lines
        if "localhost:8000" in line and "..." not in line
    ]
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line.replace("curl ", "curl -sS --fail-with-body ", 1)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=README.parent,
        )
        assert done.returncode == 0, line + done.stdout + done.stderr
        if done.stdout.startswith("{"):
            json.loads(done.stdout)
